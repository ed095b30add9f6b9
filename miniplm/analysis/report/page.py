"""The report: what runs came to, as one HTML file that needs nothing else.

What is told comes from manifests, scores, corpora and metrics; text in it may be anything. The template
escapes all of it, and what would not be seen (control characters, marks that turn the direction of writing)
is written out. Equal inputs give equal bytes.
"""

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from ...runtime.errors import UserError
from ...runtime.files import atomic_write
from ...runtime.progress import note
from ...runtime.text import IN_PROSE, printable
from ..ledger_tables import shown, time_shown
from .selections import scored_sections
from .sources import Sources, gather
from .training import MAX_RUNS, Training, comparisons, curves, loss_tables, read_training, styles, task_table

TEMPLATE = "report.html.jinja"
MARK = '<meta name="generator" content="miniplm report">'  # in the template; by it a report is known
MAX_NAME = 80  # letters of a name
MAX_SETTINGS = 6_000  # letters of an output's settings
MAX_OUTPUTS = 60  # in the provenance
PACKAGES = ("miniplm", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "triton")

Result = TypeVar("Result")


def write_report(runs: Sequence[str], output: str | Path) -> list[str]:
    """Write the report of these runs; what gather says of them.

    Returns: why something is left out, a line each.
    Raises:
        UserError: there is nothing to report, or `output` is a file of another kind.
    """
    path = Path(output)
    _refuse_another_file(path)
    sources = gather(runs)
    text = render(sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return sources.left_out


def _refuse_another_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"output {path} is a folder: give the name of an .html file")
    if path.exists():
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(1_000):
                raise UserError(
                    f"output {path} is no report of miniplm: choose another --output or delete it"
                )


def render(sources: Sources) -> str:
    """The page."""
    trainings = _each(sources, sources.of("train"), lambda path: read_training(sources, path))
    trainings.sort(key=_place)
    if len(trainings) > MAX_RUNS:
        sources.left_out.append(f"{len(trainings) - MAX_RUNS} runs beyond the first {MAX_RUNS}.")
        trainings = trainings[:MAX_RUNS]
    if not trainings:
        sources.left_out.append("Training: no finished run of train is here.")
    scored = scored_sections(sources)
    losses, tasks = loss_tables(sources), task_table(sources)
    if not losses:
        sources.left_out.append("Held-out losses: no file of evaluate about these models is here.")
    if not tasks:
        sources.left_out.append("Tasks: none were asked (evaluate --tasks).")
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=_title(trainings, sources),
            scored=scored,
            trainings=trainings,
            styles=styles(trainings),
            loss=curves(trainings, "loss", "Training loss"),
            eval_loss=curves(trainings, "eval_loss", "Held-out loss on the way"),
            comparisons=comparisons(trainings),
            losses=losses,
            tasks=tasks,
            outputs=_provenance(sources),
            versions=_versions(),
            left_out=sources.left_out,
        )
    )


def _each(sources: Sources, paths: Iterable[Path], read: Callable[[Path], Result]) -> list[Result]:
    """What `read` gives of each; one that is damaged is left out, with a line."""
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except UserError as error:
            note(str(error))
            sources.left_out.append(f"{path.name}: it is damaged, or a part of it is missing.")
    return found


def _title(trainings: Sequence[Training], sources: Sources) -> str:
    students = [each.name for each in trainings if each.role == "student"]
    return " · ".join((students or [path.name for path in sources.outputs])[:4]) or "evaluations"


def _place(training: Training) -> tuple[bool, bool]:
    """Students first, among them those of selected text."""
    return training.role != "student", not training.learnt_from_selected


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_seen,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"name": _name, "shown": shown, "duration": time_shown, "thousands": "{:,}".format}
    return environment


def _seen(value: Any) -> Any:
    return printable(value, IN_PROSE) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _name(value: object) -> str:
    """Any text as a name: one line, not a long one."""
    line = " ".join(str(value)[: 4 * MAX_NAME].split())
    return line if len(line) <= MAX_NAME else line[:MAX_NAME] + "…"


# ---- provenance ----


def _provenance(sources: Sources) -> list[dict[str, Any]]:
    """Of each output what it is, by what it is known, and its settings."""
    rows = []
    for path, manifest in list(sources.outputs.items())[:MAX_OUTPUTS]:
        facts = {
            "fingerprint": manifest.get("fingerprint"),
            "weights": sources.hashes.get(path),
            "checksum of the manifest": manifest.get("checksum"),
            "source": manifest.get("source"),
            "teacher": manifest.get("teacher"),
            "reference": manifest.get("reference"),
            "scored with torch": manifest.get("torch"),
        }
        settings = json.dumps(manifest["identity"], indent=1)
        rows.append(
            {
                "name": path.name,
                "stage": manifest["stage"],
                "facts": {key: value for key, value in facts.items() if value},
                "settings": settings[:MAX_SETTINGS] + ("…" if len(settings) > MAX_SETTINGS else ""),
            }
        )
    if len(sources.outputs) > MAX_OUTPUTS:
        sources.left_out.append(f"Provenance: {len(sources.outputs) - MAX_OUTPUTS} more outputs.")
    return rows


def _versions() -> dict[str, str]:
    """What made this page."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
