"""run and demo: chain the stages of a YAML file.

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
stage runs. A stage that is complete is skipped; one that was killed continues.
"""

import importlib
import string
from pathlib import Path

from . import config
from .runtime.errors import UserError
from .runtime.files import read_json


def run(settings: config.RunConfig):
    """Run all stages of a pipeline file. UserError before anything runs when the file asks for something that
    does not exist."""
    run_stages(read_stages(settings.config), settings.output)


def read_stages(path) -> dict:
    """The stages of a YAML file, by name."""
    import yaml

    try:
        stages = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"pipeline file {path} is not valid YAML ({' '.join(str(error).split())})") from None
    if (
        not isinstance(stages, dict)
        or not stages
        or not all(isinstance(values, dict) for values in stages.values())
    ):
        raise UserError(
            f"pipeline file {path} must map stage names to settings (see configs/quickstart.yaml)"
        )
    return stages


def run_stages(stages: dict, output, stage_outputs: dict | None = None):
    """Check all stages, then run them in order. Arguments as in plan_stages."""
    planned = plan_stages(stages, output, stage_outputs)
    for number, (name, kind, settings) in enumerate(planned, 1):
        print(f"\n[{number}/{len(planned)}] {name}: {kind}", flush=True)
        getattr(importlib.import_module(f".stages.{kind}", __package__), kind)(settings)


def plan_stages(stages: dict, output, stage_outputs: dict | None = None) -> list[tuple]:
    """(name, stage, settings) of each stage, checked.

    Args:
        stages: name → settings, with the key `stage`.
        stage_outputs: names that `${…}` may refer to beside the stages before.
    """
    output, stage_outputs, planned = Path(output), dict(stage_outputs or {}), []
    for name, values in stages.items():
        values = dict(values)
        kind = values.pop("stage", None)
        if kind not in config.STAGES:
            raise UserError(f"stage {name!r}: `stage` is {kind!r}; choose from {', '.join(config.STAGES)}")
        if not name.replace("-", "").replace("_", "").isalnum() or name in stage_outputs:
            raise UserError(f"stage {name!r}: a name takes letters, digits, - and _, and is used once")
        if kind != "generate":
            if "output" in values:
                raise UserError(f"stage {name!r}: leave out `output`, the stage writes to {output / name}")
            values["output"] = str(output / (f"{name}.json" if kind == "evaluate" else name))
        try:
            planned.append(
                (name, kind, config.from_dict(config.STAGES[kind], _resolve(values, stage_outputs)))
            )
        except ValueError as error:
            raise UserError(f"stage {name!r}: {error}") from None
        if kind != "generate":
            stage_outputs[name] = values["output"]
    return planned


def _resolve(value, stage_outputs: dict):
    """`${name}` replaced in every string of a nested value."""
    if isinstance(value, str):
        try:
            return _Template(value).substitute(stage_outputs)
        except KeyError as error:
            raise ValueError(
                f"${{{error.args[0]}}} is no stage before this one; those are "
                f"{', '.join(stage_outputs) or 'none'}"
            ) from None
        except ValueError:
            raise ValueError(
                f"{value!r}: write ${{name}} for the place of a stage and $$ for a dollar sign"
            ) from None
    if isinstance(value, dict):
        return {key: _resolve(inner, stage_outputs) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, stage_outputs) for inner in value]
    return value


class _Template(string.Template):
    idpattern = r"(?a:[_a-zA-Z0-9-]+)"


def demo(settings: config.DemoConfig):
    """Text, tokenizer, teacher, reference, scores, selection, two students, evaluation, export: on this
    machine, offline, seeded."""
    from .demo.text import train_tokenizer, write_text

    output = Path(settings.output)
    print("[0] text: what this Python carries; a tokenizer trained on it", flush=True)
    text = write_text(output / "text")
    tokenizer = train_tokenizer(text, output / "tokenizer")
    stages = read_stages(Path(__file__).with_name("demo") / "demo.yaml")
    run_stages(stages, output, {"text": str(text), "tokenizer": str(tokenizer)})
    _print_result(output)


def _print_result(output: Path):
    """Both students side by side, and where the model is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    models = {
        "teacher": "teacher",
        "reference": "reference",
        "student": "student (refined)",
        "control": "student (random)",
    }
    losses = {name: read_json(output / f"{name}-loss.json") for name in models}
    domains = list(losses["student"]["domains"])
    table = Table(title="Held-out loss, nats per token (students of equal size and equal training FLOPs)")
    table.add_column("model")
    for heading in ["all", *domains]:
        table.add_column(Text(heading), justify="right")
    for name, label in models.items():
        figures = [losses[name]["loss"], *(losses[name]["domains"][domain]["loss"] for domain in domains)]
        table.add_row(label, *("not finite" if figure is None else f"{figure:.4f}" for figure in figures))
    console = Console()
    console.print(table)
    student, control = losses["student"]["loss"], losses["control"]["loss"]
    if student is not None and control is not None:
        console.print(
            f"The student's held-out loss: {student:.4f} trained on the refined corpus, {control:.4f} on a "
            f"random one of the same size."
        )
    console.print(
        Text(
            f"The student as a Hugging Face model: {output / 'model'}  "
            f"(AutoModelForCausalLM.from_pretrained opens it)"
        )
    )
