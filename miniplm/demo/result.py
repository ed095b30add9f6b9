"""What the demo came to: both students side by side, and where the model is."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.files import read_json
from ..runtime.text import printable

# the stage that trains a model (its losses are in <stage>-loss.json) → the model in words
MODELS = {
    "teacher": "teacher",
    "reference": "reference",
    "student": "student (refined)",
    "control": "student (random)",
}


def print_result(output: Path) -> None:
    """Print the losses that the demo's stages wrote under `output`."""
    losses = {name: read_json(output / f"{name}-loss.json") for name in MODELS}
    console = Console()
    console.print(_table(losses))
    student, control = losses["student"]["loss"], losses["control"]["loss"]
    if student is not None and control is not None:
        console.print(
            f"The student's held-out loss: {student:.4f} trained on the refined corpus, {control:.4f} on a "
            f"random one of the same size."
        )
    where = f"The student as a Hugging Face model: {printable(output / 'model')}"
    console.print(Text(f"{where}  (AutoModelForCausalLM.from_pretrained opens it)"))


def _table(losses: dict[str, dict]) -> Table:
    """One line per model, a column for the whole and one for each domain."""
    domains = list(losses["student"]["domains"])
    table = Table(title="Held-out loss, nats per token (students of equal size and equal training FLOPs)")
    table.add_column("model")
    for heading in ["all", *domains]:
        table.add_column(Text(printable(heading)), justify="right")
    for name, label in MODELS.items():
        figures = [losses[name], *(losses[name]["domains"][domain] for domain in domains)]
        table.add_row(label, *(_shown(figure["loss"]) for figure in figures))
    return table


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
