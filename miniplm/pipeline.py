"""run: chains the stages of a YAML file.

A pipeline file lists the stages in order, each under a name of its own:

    corpus:
      stage: prepare
      data: books.jsonl
      tokenizer: Qwen/Qwen1.5-1.8B
    scores:
      stage: score
      data: ${corpus}
      …

Every other key is a setting of that stage's command. A stage writes to OUTPUT/<name> (evaluate: to
OUTPUT/<name>.json), and `${name}` in a later stage is that place. All settings are checked before the first
stage runs. A stage that is complete is skipped; one that was killed continues. At the end a
report of all of them is written to OUTPUT/report.html.
"""

import importlib
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import config
from .runtime.errors import UserError, reason
from .runtime.progress import note
from .runtime.text import printable

REPORT = "report.html"
NAME_LENGTH = 100  # of a stage: it is a file's name too


class Planned(NamedTuple):
    """A stage that is ready to run."""

    name: str
    stage: str  # "prepare", "score", …
    settings: Any  # of its settings class


def run(settings: config.RunConfig) -> None:
    """Run all stages of a pipeline file.

    Raises:
        UserError: the file asks for something that does not exist (before anything runs), or a stage failed.
    """
    run_stages(read_stages(settings.config), settings.output)
    add_report(settings.output)


def add_report(output: str | Path) -> None:
    """Write OUTPUT/report.html, and say so. Where there is none to make, a line says why: all that was to be
    done is done."""
    path = Path(output) / REPORT
    try:
        importlib.import_module(".analysis.report.page", __package__).write_report([str(output)], path)
    except Exception as error:
        note(f"no report {path}: {error if isinstance(error, UserError) else reason(error)}")
    else:
        print(f"report: {printable(path)}")


def read_stages(path: str | Path) -> dict[str, dict[str, Any]]:
    """The stages of a YAML file, by name; UserError where it holds none."""
    try:
        stages = config.read_mapping(path)
    except ValueError as error:
        raise UserError(f"pipeline file {error}") from None
    if not stages or not all(isinstance(values, dict) for values in stages.values()):
        raise UserError(
            f"pipeline file {path} must map stage names to settings (see configs/quickstart.yaml)"
        )
    return stages


def run_stages(
    stages: Mapping[str, Mapping[str, Any]],
    output: str | Path,
    stage_outputs: Mapping[str, str] | None = None,
) -> None:
    """Check all stages, then run them in order. Arguments and errors as in plan_stages."""
    planned = plan_stages(stages, output, stage_outputs)
    for number, (name, stage, settings) in enumerate(planned, 1):
        print(f"\n[{number}/{len(planned)}] {name}: {stage}", flush=True)
        getattr(importlib.import_module(f".stages.{stage}", __package__), stage)(settings)


def plan_stages(
    stages: Mapping[str, Mapping[str, Any]],
    output: str | Path,
    stage_outputs: Mapping[str, str] | None = None,
) -> list[Planned]:
    """The stages with their settings, checked.

    Args:
        stages: name → settings, with the key `stage`.
        output: the folder under which each stage has its place.
        stage_outputs: names that `${…}` may refer to beside the stages before.
    Raises:
        UserError: a stage's name, kind or settings are wrong, or it refers to what is not before it.
    """
    output, known, planned = Path(output), dict(stage_outputs or {}), []
    for name, values in stages.items():
        _check_name(name, known)
        try:
            stage, values = _with_output(values, output, name)
            settings: object = config.from_dict(config.STAGES[stage], _resolve(values, known))
        except ValueError as error:
            raise UserError(f"stage {name!r}: {error}") from None
        planned.append(Planned(name, stage, settings))
        if stage != "generate":
            known[name] = values["output"]
    return planned


def _check_name(name: object, known: Mapping[str, str]) -> None:
    if (
        not isinstance(name, str)
        or not name.replace("-", "").replace("_", "").isalnum()
        or len(name) > NAME_LENGTH
        or name in known
    ):
        raise UserError(
            f"stage {config.shown(name)}: a name takes up to {NAME_LENGTH} letters, digits, - and _, and is "
            f"used once"
        )


def _with_output(values: Mapping[str, Any], output: Path, name: str) -> tuple[str, dict[str, Any]]:
    """(the stage's kind, its settings with the place that it writes to)."""
    values = dict(values)
    if "stage" not in values:
        raise ValueError(f"`stage` is missing; choose from {', '.join(config.STAGES)}")
    stage = values.pop("stage")
    if not isinstance(stage, str) or stage not in config.STAGES:
        raise ValueError(f"`stage` is {config.shown(stage)}; choose from {', '.join(config.STAGES)}")
    if stage != "generate":
        if "output" in values:
            raise ValueError(f"leave out `output`, the stage writes to {output / name}")
        values["output"] = str(output / (f"{name}.json" if stage == "evaluate" else name))
    return stage, values


def _resolve(value: Any, stage_outputs: Mapping[str, str]) -> Any:
    """`${name}` replaced in every string of a nested value."""
    if isinstance(value, str):
        try:
            return _Template(value).substitute(stage_outputs)
        except KeyError as error:
            raise ValueError(
                f"${{{error.args[0]}}} is not a stage before this one; those are "
                f"{', '.join(stage_outputs) or 'none'}"
            ) from None
        except ValueError:
            raise ValueError(
                f"{config.shown(value)}: write ${{name}} for the place of a stage and $$ for a dollar sign"
            ) from None
    if isinstance(value, Mapping):
        return {key: _resolve(inner, stage_outputs) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, stage_outputs) for inner in value]
    return value


class _Template(string.Template):
    idpattern = r"(?a:[_a-zA-Z0-9-]+)"
