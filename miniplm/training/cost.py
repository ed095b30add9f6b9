"""What a run costs in FLOPs. It follows from its corpus, its settings and the shapes of its models, so it is
known before the first step, and stopping changes nothing of it.

Counted are the products of the layers and of the head, and causal attention, on the positions that are gone
through: the model's FLOPs, as the paper counts them. What is computed a second time to save memory
(activation checkpointing, attention's scores in its backward pass), padding, norms and the optimiser do not
count.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from ..config import MAX_STEPS
from ..data.batches import squared_lengths
from ..data.corpus import Corpus
from ..data.order import DataOrder
from ..models.base import LanguageModel
from ..models.flops import ForwardFlops, forward_cost
from ..runtime.artifacts import MANIFEST, read_manifest
from ..runtime.errors import UserError
from ..runtime.schema import Record, read_record

Flops = Annotated[int, Field(ge=0)]


class TrainingFlops(Record):
    """`flops` in the manifest of a training output."""

    forward: Flops
    backward: Flops
    teacher: Flops = 0
    evaluation: Flops = 0  # of the held-out losses on the way

    @property
    def training(self) -> int:
        """The paper's convention: all but the evaluation."""
        return self.forward + self.backward + self.teacher


class RunCost(NamedTuple):
    """What the steps of a run cost.

    squares: int64 [chunks], of data.batches.squared_lengths; teacher: None without one.
    """

    order: DataOrder
    squares: np.ndarray
    student: ForwardFlops
    teacher: ForwardFlops | None

    def flops(self, steps: int) -> TrainingFlops:
        """Of the first `steps` steps, skipped ones too."""
        tokens = self.order.total(self.order.num_tokens - 1, steps)
        squares = self.order.total(self.squares, steps)
        forward = self.student.of(tokens, squares)
        teacher = self.teacher.of(tokens, squares) if self.teacher else 0
        return TrainingFlops(forward=forward, backward=2 * forward, teacher=teacher)

    def steps_for(self, budget: float) -> int:
        """The number of steps whose cost is nearest to `budget` FLOPs.

        T · 3 N_s / (3 N_s + N_t) of T steps without a teacher, with the FLOPs per token of both models in
        place of their parameters (arXiv 2410.17215). UserError below one step, and above what can be asked
        for.
        """
        order, tokens = self.order, self.order.epoch_tokens
        squares = int(self.squares[order.rows].sum())
        forward = 3 * self.student.of(tokens, squares)
        epoch = forward + (self.teacher.of(tokens, squares) if self.teacher else 0)
        steps = budget * tokens / (epoch * order.batch_tokens)
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(
                f"a step of {order.batch_tokens:,} tokens costs {epoch / tokens * order.batch_tokens:.3g} "
                f"FLOPs, {budget:.3g} are {steps:.3g} steps: give from 1 to {MAX_STEPS:,} steps' worth"
            )
        return round(steps)


def corpus_work(
    corpus: Corpus, document_mask: bool, chunks: np.ndarray | slice = slice(None)
) -> tuple[int, int]:
    """(positions, squared lengths) of chunks of a corpus, in all: what forward passes cost by."""
    squares = squared_lengths(corpus, document_mask)[chunks]
    return int((corpus.num_tokens[chunks] - 1).sum()), int(squares.sum())


def corpus_flops(
    models: Mapping[str, LanguageModel],
    corpus: Corpus,
    document_mask: bool,
    chunks: np.ndarray | slice = slice(None),
) -> dict[str, int]:
    """What forward passes over chunks of a corpus (all, if they are not given) cost, by the models' names."""
    tokens, squares = corpus_work(corpus, document_mask, chunks)
    return {name: forward_cost(model).of(tokens, squares) for name, model in models.items()}


def training_flops_of(manifest: Mapping[str, Any], path: str | Path = MANIFEST) -> TrainingFlops | None:
    """What a finished run has cost by its manifest; None of runs from before costs were counted. UserError
    where it is no manifest.

    Args:
        path: of the manifest, in messages.
    """
    if (found := manifest.get("flops")) is None:
        return None
    what = f"{path} is not a manifest of miniplm"
    return read_record(TrainingFlops, found, what, "restore it, or make its folder again")


def flops_of_run(output: str | Path) -> int:
    """What the finished run in `output` cost to train.

    Raises:
        UserError: it holds no finished run, or the run does not say.
    """
    manifest = read_manifest(output, "train", what="run")
    if (found := training_flops_of(manifest, Path(output) / MANIFEST)) is None:
        raise UserError(
            f"run {output} does not say what it cost, it was trained before costs were counted: give flops "
            f"instead"
        )
    return found.training
