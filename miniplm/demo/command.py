"""miniplm demo."""

from functools import partial
from pathlib import Path

from ..config import DemoConfig
from ..pipeline import add_report, plan_stages, read_stages, run_stages
from .estimate import counted_tokens, expected_seconds, in_words, measured_speed
from .result import print_result
from .text import VOCABULARY, train_tokenizer, write_text

PIPELINE = Path(__file__).with_name("demo.yaml")


def demo(settings: DemoConfig) -> None:
    """Text with known noise, tokenizer, teacher, reference, scores, selections, three students, evaluation,
    export: on this machine, offline, seeded."""
    output = Path(settings.output)
    print("[0] text: what this Python carries, with known noise; a tokenizer trained on it", flush=True)
    text = write_text(output / "text", settings.seed)
    tokenizer = train_tokenizer(text, output / "tokenizer")
    stages = read_stages(PIPELINE)
    known = {"text": str(text), "tokenizer": str(tokenizer), "seed": str(settings.seed)}
    planned = plan_stages(stages, output, known)
    seconds = expected_seconds(
        planned,
        partial(counted_tokens, tokenizer=str(tokenizer)),
        partial(measured_speed, vocab_size=VOCABULARY),
    )
    print(
        f"This will take about {in_words(seconds)}, by steps of the models timed on this machine.", flush=True
    )
    run_stages(stages, output, known)
    print_result(output, {stage.name: stage.settings for stage in planned})
    add_report(output)
