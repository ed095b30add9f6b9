"""What a run costs in FLOPs. It follows from its corpus, its settings and the shapes of its models, so it is
known before the first step, and stopping changes nothing of it.

Counted are the products of the layers and of the head, and causal attention, on the positions that are gone
through: the model's FLOPs, as the paper counts them. What is computed a second time to save memory
(activation checkpointing, attention's scores in its backward pass), padding, norms and the optimiser do not
count.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from ..config import MAX_STEPS
from ..data.order import DataOrder
from ..models.flops import ForwardFlops
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


def flops_of_run(output: str | Path) -> int:
    """What the finished run in `output` cost to train.

    Raises:
        UserError: it holds no finished run, or the run does not say.
    """
    found = read_manifest(output, "train", what="run").get("flops")
    if found is None:
        raise UserError(
            f"run {output} does not say what it cost, it was trained before costs were counted: give the "
            f"FLOPs themselves with --flops"
        )
    what = f"{Path(output) / MANIFEST} is not a manifest of miniplm"
    return read_record(TrainingFlops, found, what, "restore it, or make its folder again").training
