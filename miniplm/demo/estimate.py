"""How long the demo will take on this machine, from timed steps of its own models."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import (
    EvaluateConfig,
    OptimizerConfig,
    PrepareConfig,
    ScoreConfig,
    StudentConfig,
    TrainConfig,
)
from ..data.order import global_batch
from ..data.tokenizer import load_tokenizer
from ..models.decoder import Decoder, student_config
from ..pipeline import Planned
from ..runtime.artifacts import recorded
from ..runtime.devices import choose_device, choose_dtype
from ..training.step import eval_loss, make_optimizer, train_step

OTHER_SECONDS = 40.0  # all that is no model's work: text, imports, files, selections, export, report
TIMED_SECONDS = 0.4  # of each kind of step, after one that is not counted
CHUNK, CHUNKS = 256, 8  # predictions of a chunk, and chunks of a timed step


class Speed(NamedTuple):
    """Seconds per token of a model: of a training step, of a forward pass with its losses."""

    step: float
    forward: float


def expected_seconds(
    planned: Sequence[Planned],
    tokens_of: Callable[[str], float],
    speed_of: Callable[[StudentConfig], Speed],
) -> float:
    """What the stages that are not complete will take.

    Args:
        tokens_of: how many tokens a file of text has, by its name.
        speed_of: how fast a model is here.
    """
    seconds = OTHER_SECONDS
    lengths: dict[str, float] = {}  # of corpora by their folders, in tokens
    models: dict[str, StudentConfig] = {}  # by their folders
    for settings in (each.settings for each in planned):
        if isinstance(settings, PrepareConfig):
            lengths[settings.output] = tokens_of(settings.data) * (settings.take[1] - settings.take[0])
        elif isinstance(settings, TrainConfig):
            models[settings.output] = settings.model
            if not recorded(settings.output).get("complete"):
                speed, steps = speed_of(settings.model), settings.steps or 0
                evaluated = steps // settings.eval.interval * settings.eval.chunks * CHUNK
                seconds += steps * settings.batch_tokens * speed.step + evaluated * speed.forward
        elif isinstance(settings, ScoreConfig) and not recorded(settings.output).get("complete"):
            both = [models[folder] for folder in (settings.teacher, settings.reference) if folder]
            seconds += lengths[settings.data] * sum(speed_of(model).forward for model in both)
        elif isinstance(settings, EvaluateConfig) and not Path(settings.output or "").is_file():
            seconds += lengths[settings.data or ""] * speed_of(models[settings.model]).forward
    return seconds


@functools.cache
def measured_speed(model: StudentConfig, vocab_size: int) -> Speed:
    """Times training steps and forward passes of a model with random weights on random ids."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    decoder: Any = Decoder(student_config(model, vocab_size, 0)).to(device)
    optimizer = make_optimizer(decoder, OptimizerConfig())
    rows = np.random.default_rng(0).integers(1, vocab_size, (CHUNKS, CHUNK + 1))
    batches = global_batch(list(rows), 0, CHUNKS * CHUNK)
    step = _seconds(lambda: train_step(decoder, optimizer, batches, 1e-3, 1.0, dtype))
    forward = _seconds(lambda: eval_loss(decoder, batches, dtype))
    return Speed(step / (CHUNKS * CHUNK), forward / (CHUNKS * CHUNK))


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, on average."""
    work()
    start, calls = time.monotonic(), 0
    while (passed := time.monotonic() - start) < TIMED_SECONDS:
        work()
        calls += 1
    return passed / calls


@functools.cache
def counted_tokens(path: str, tokenizer: str) -> int:
    """The tokens of the texts in a JSONL file."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encodings = load_tokenizer(tokenizer).backend_tokenizer.encode_batch_fast(texts)
    return sum(map(len, encodings))


def in_words(seconds: float) -> str:
    """About how long that is."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{10 * max(round(seconds / 10), 1)} seconds"
