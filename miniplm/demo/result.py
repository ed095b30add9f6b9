"""What the demo came to: what was dropped, the models side by side, who won where, and what that does not
show."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.corpus import Corpus
from ..data.score_folders import read_score_manifest
from ..data.scores import read_scores
from ..data.selection import choose, compared
from ..runtime.files import read_json
from ..runtime.text import printable
from .shares import Share, shares_dropped
from .text import read_crawl

# The stages: what a selection is called → the selection, and the student that was trained on it; a stage's
# losses are in <stage>-loss.json.
SELECTIONS = {"global": "refined", "per domain": "refined-per-domain", "random": "random"}
STUDENTS = {"global": "student", "per domain": "student-per-domain", "random": "control"}
MODELS = {"teacher": "teacher", "reference": "reference"} | {
    f"student, {name}": stage for name, stage in STUDENTS.items()
}
ALL = "all"
CAVEATS = (
    "What these figures do not show: one seed and minutes of training, so small differences are chance "
    "(three seeds disagree: docs/experiments/demo.md). The teacher learnt from the pool itself, noise "
    "included; a real one comes from better text. The noise was made, a quarter of the text and in whole "
    "documents: how much of a real crawl is noise, and of what kinds, is another matter."
)

Losses = dict[str, dict[str, float | None]]  # model → domain, or ALL → nats per token, None: not finite


def print_result(output: Path, settings: Mapping[str, Any]) -> None:
    """Print what the demo's stages wrote under `output`.

    Args:
        settings: of the stages, by name.
    """
    losses = {label: _read_losses(output / f"{stage}-loss.json") for label, stage in MODELS.items()}
    console = Console()
    console.print(dropped_table(_shares(output, settings)), loss_table(losses))
    console.print(
        "The kinds are labels that no stage reads. The students are of equal size and trained for as many "
        "tokens, on half of the chunks each. The lower loss wins:"
    )
    students = {name: losses[f"student, {name}"] for name in STUDENTS}
    for line in verdicts(students):
        console.print(Text(printable(line)))
    console.print(Text(CAVEATS))
    where = f"The student of the selection per domain as a Hugging Face model: {printable(output / 'model')}"
    console.print(Text(f"{where}  (AutoModelForCausalLM.from_pretrained opens it)"))


def _read_losses(path: Path) -> dict[str, float | None]:
    evaluation = read_json(path)
    domains = {name: figures["loss"] for name, figures in evaluation["domains"].items()}
    return {ALL: evaluation["loss"], **domains}


def _shares(output: Path, settings: Mapping[str, Any]) -> list[Share]:
    """What each selection dropped, by its rule once more: a refined corpus does not say which it has."""
    pool = Corpus(output / "pool")
    files = read_score_manifest(output / "scores", pool).get("files")
    names = ["teacher_log_prob", "reference_log_prob", "score"]
    columns = read_scores(output / "scores", len(pool), names, files)
    codes, domains = pool.domains
    kept = {}
    for name, stage in SELECTIONS.items():
        score = compared(settings[stage], columns, pool.num_tokens, codes)
        kept[name] = choose(settings[stage], score, pool.num_tokens, codes, domains)
    return shares_dropped(pool, read_crawl(output / "text"), settings["pool"].take, kept)


def dropped_table(shares: list[Share]) -> Table:
    """A line per kind of text, a column per selection."""
    table = Table(title="Dropped of the pool, by tokens")
    table.add_column("kind")
    table.add_column("tokens", justify="right")
    for name in SELECTIONS:
        table.add_column(name, justify="right")
    for share in shares:
        dropped = [f"{share.dropped[name]:.0%}" for name in SELECTIONS]
        table.add_row(Text(printable(share.label)), f"{share.tokens:,}", *dropped)
    return table


def loss_table(losses: Losses) -> Table:
    """A line per model, a column for the whole and one for each domain."""
    table = Table(title="Loss on clean held-out text, nats per token")
    table.add_column("model")
    headings = list(next(iter(losses.values())))
    for heading in headings:
        table.add_column(Text(printable(heading)), justify="right")
    for label, figures in losses.items():
        table.add_row(label, *(_shown(figures[heading]) for heading in headings))
    return table


def verdicts(students: Losses) -> list[str]:
    """One line per domain, the whole last: whose student is best, and by what."""
    headings = list(next(iter(students.values())))
    return [
        _verdict(heading, {name: losses[heading] for name, losses in students.items()})
        for heading in [*(heading for heading in headings if heading != ALL), ALL]
    ]


def _verdict(heading: str, losses: Mapping[str, float | None]) -> str:
    finite = {name: _shown(loss) for name, loss in losses.items() if loss is not None}
    if not finite:
        return f"{heading}: no student's loss is finite"
    lowest = min(finite.values(), key=float)
    best = [name for name, shown in finite.items() if shown == lowest]
    others = [f"{name} {_shown(loss)}" for name, loss in losses.items() if name not in best]
    won = f"{best[0]} wins" if len(best) == 1 else f"{' and '.join(best)} are level"
    return f"{heading}: {won} with {lowest}" + (f"; {', '.join(others)}" if others else "")


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
