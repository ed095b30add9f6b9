"""miniplm demo."""

from pathlib import Path

from ..config import DemoConfig
from ..pipeline import add_report, read_stages, run_stages
from .result import print_result
from .text import train_tokenizer, write_text

PIPELINE = Path(__file__).with_name("demo.yaml")


def demo(settings: DemoConfig) -> None:
    """Text, tokenizer, teacher, reference, scores, selection, two students, evaluation, export: on this
    machine, offline, seeded."""
    output = Path(settings.output)
    print("[0] text: what this Python carries; a tokenizer trained on it", flush=True)
    text = write_text(output / "text")
    tokenizer = train_tokenizer(text, output / "tokenizer")
    run_stages(read_stages(PIPELINE), output, {"text": str(text), "tokenizer": str(tokenizer)})
    print_result(output)
    add_report(output)
