"""Scaling: L(C) = A · C^−α + L∞, fitted to runs that ended.

C is what a run's training cost in FLOPs, L its held-out loss in nats per token, L∞ the loss that no compute
gets below (arXiv 2410.17215; Hoffmann et al., arXiv 2203.15556). The curve goes through the ends of runs of
several lengths, each with a learning rate that has decayed. The losses on the way of one long run lie above
it, for the learning rate is still high there, and a curve through them bends too late. `run_point` therefore
takes the last step of a run, and nothing before it.

    points = [run_point("runs/1b"), run_point("runs/2b"), …]
    law = fit_scaling_law(points)
    law.predict(1e21), law.loss_interval(1e21), law.flops_for(3.3)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from ..runtime.errors import UserError
from ..training.checkpoints import read_training_output, training_output
from ..training.cost import flops_of_run

MIN_POINTS = 4  # one more than the law has constants: what is left over measures the noise
MAX_FINAL_LR_RATIO = 0.1  # of the peak: a schedule that ends higher has not decayed
EXPONENTS = (1e-3, 4.0)  # α is sought between these
GRID, REFINEMENTS = 40, 5  # values of α per search, and searches between the neighbours of the best

Numbers: TypeAlias = float | np.ndarray


class Point(NamedTuple):
    """The end of one run."""

    flops: float  # of its training
    loss: float  # held-out, nats per token
    run: str = ""  # the training output, for messages
    corpus: str = ""  # fingerprint of the held-out corpus; losses on different ones do not compare


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(C) = amplitude · C^−exponent + irreducible_loss, and what its points leave open."""

    amplitude: float
    """A, in nats per token · FLOPs^α."""
    exponent: float
    """α."""
    irreducible_loss: float
    """L∞, in nats per token."""
    noise: float
    """Standard deviation of the points around the curve, in nats per token."""
    level: float
    """Of the intervals: 0.95 is 95%."""
    resampled: np.ndarray
    """float64 [resamples, 3]: (log A, α, L∞) of fits to points that could as well have come out."""

    def predict(self, flops: float) -> float:
        """The loss of a run that costs this much, nats per token."""
        return float(_loss(math.log(self.amplitude), self.exponent, self.irreducible_loss, flops))

    def loss_interval(self, flops: float) -> Interval:
        """The interval of the curve at this cost (a single run lies around the curve with `noise`)."""
        log_amplitude, exponent, limit = self.resampled.T
        return self._interval(_loss(log_amplitude, exponent, limit, flops))

    def flops_for(self, loss: float) -> float:
        """The cost at which the curve reaches a loss, in FLOPs. UserError at L∞ or below."""
        if loss <= self.irreducible_loss:
            raise UserError(
                f"a loss of {loss} is not reached at any cost: the curve stays above "
                f"{self.irreducible_loss:.4f}"
            )
        return math.exp((math.log(self.amplitude) - math.log(loss - self.irreducible_loss)) / self.exponent)

    @property
    def amplitude_interval(self) -> Interval:
        """A's; it spans orders of magnitude, for A and α move together."""
        return self._interval(np.exp(self.resampled[:, 0]))

    @property
    def exponent_interval(self) -> Interval:
        return self._interval(self.resampled[:, 1])

    @property
    def irreducible_loss_interval(self) -> Interval:
        return self._interval(self.resampled[:, 2])

    def _interval(self, values: np.ndarray) -> Interval:
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(float(low), float(high))


def fit_scaling_law(
    points: Sequence[Point], level: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> ScalingLaw:
    """Fit the law by least squares on the losses, with intervals from a parametric bootstrap.

    The curve is fitted again to `resamples` sets of losses drawn around it. The noise of each draw is the
    fit's, √(sum of squares / χ²), χ² with as many degrees of freedom as there are points beyond three: few
    points then widen the intervals as Student's t does.

    Args:
        points: at least 4, of runs of different costs; each as `run_point` gives it.
        level: of the intervals.
    Raises:
        UserError: there are too few points, two of one run or of one cost alone, losses on different corpora,
            or losses that do not fall towards a limit as compute grows.
    """
    _check(points)
    flops = np.array([point.flops for point in points], np.float64)
    losses = np.array([point.loss for point in points], np.float64)
    found, sums_of_squares = _fit(np.log(flops), losses[None])
    (log_amplitude, exponent, limit), squares = map(float, found[0]), float(sums_of_squares[0])
    at_an_end = exponent < 1.01 * EXPONENTS[0] or exponent > EXPONENTS[1] / 1.01
    if at_an_end or limit <= 0 or not math.isfinite(log_amplitude):
        raise UserError(
            "the losses do not fall towards a limit as compute grows, so there is no law to fit: give runs "
            "that differ more in compute, or more of them"
        )
    rng, freedom = np.random.default_rng(seed), len(points) - 3
    scales = np.sqrt(squares / rng.chisquare(freedom, (resamples, 1)))
    drawn = _loss(log_amplitude, exponent, limit, flops) + scales * rng.standard_normal(
        (resamples, len(points))
    )
    return ScalingLaw(
        amplitude=math.exp(log_amplitude),
        exponent=exponent,
        irreducible_loss=limit,
        noise=math.sqrt(squares / freedom),
        level=level,
        resampled=_fit(np.log(flops), drawn)[0],
    )


def run_point(output: str | Path, flops: float | None = None, step: int | None = None) -> Point:
    """The point of a run that ended: its held-out loss at the last step.

    Args:
        output: a training output, or the checkpoint of its last step.
        flops: what the run's training cost; default: what its manifest says.
        step: the line of metrics.jsonl to take; default, and all that is taken, is the last one.
    Raises:
        UserError: the run was stopped, `output` or `step` is a place on its way, its learning rate does not
            decay, or it has no finite held-out loss. The line says which.
    """
    checkpoint, manifest = read_training_output(output)
    identity, steps = manifest["identity"], manifest["identity"]["steps"]
    reached = checkpoint.state.step if step is None else step
    if reached != steps or not manifest["complete"]:
        raise UserError(
            f"{output} at step {reached:,} of {steps:,} is a point on the way of a run: its learning rate "
            f"has not decayed, so its loss lies above that of a run of this length; end the run, or train "
            f"one of {reached:,} steps"
        )
    optimizer = identity["optimizer"]
    if optimizer["warmup_steps"] >= steps or optimizer["min_lr_ratio"] > MAX_FINAL_LR_RATIO:
        last = (
            "warm-up is not over at the last step"
            if optimizer["warmup_steps"] >= steps
            else f"min_lr_ratio is {optimizer['min_lr_ratio']:g}"
        )
        raise UserError(
            f"{output} did not let its learning rate decay ({last}): train it with optimizer.min_lr_ratio at "
            f"most {MAX_FINAL_LR_RATIO:g} and fewer warm-up steps than steps"
        )
    if manifest.get("eval_loss") is None:
        raise UserError(f"{output} has no finite held-out loss at its last step: train it with eval.data")
    flops = flops_of_run(training_output(checkpoint.folder)) if flops is None else flops
    return Point(flops, manifest["eval_loss"], str(output), identity.get("eval_corpus", ""))


def _check(points: Sequence[Point]) -> None:
    for point in points:
        if not (0 < point.flops < math.inf and 0 < point.loss < math.inf):
            raise UserError(
                f"a point needs a cost and a loss above 0, got {point.flops} FLOPs and {point.loss} "
                f"({point.run or 'no run named'})"
            )
    runs = [point.run for point in points if point.run]
    if twice := [run for run in dict.fromkeys(runs) if runs.count(run) > 1]:
        raise UserError(
            f"{twice[0]} gives more than one point: a run has one end, and its losses before lie above the "
            f"curve; give one run for each point"
        )
    if len({point.corpus for point in points if point.corpus}) > 1:
        raise UserError("the runs were evaluated on different corpora: their losses do not compare")
    different = len({point.flops for point in points})
    if different < MIN_POINTS:
        raise UserError(
            f"{different} different costs do not determine a law of three constants and its noise: give at "
            f"least {MIN_POINTS} runs of different length"
        )


def _loss(log_amplitude: Numbers, exponent: Numbers, irreducible_loss: Numbers, flops: Numbers) -> np.ndarray:
    """The law, for constants or costs that are arrays too."""
    return np.exp(log_amplitude - exponent * np.log(flops)) + irreducible_loss


def _fit(log_flops: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least squares of each row of losses [sets, points]: (log A, α, L∞) [sets, 3], and the sums of
    squares [sets].

    For a given α the law is a straight line in C^−α, so only α has to be searched for. A and L∞ are kept from
    becoming negative.
    """
    centre, sets = log_flops.mean(), np.arange(len(losses))
    low, high = (np.full(len(losses), end) for end in EXPONENTS)
    for _ in range(REFINEMENTS + 1):
        exponents = np.geomspace(low, high, GRID, axis=1)
        x = np.exp(-exponents[..., None] * (log_flops - centre))
        slopes, intercepts, squares = _lines(x, losses[:, None])
        best = squares.argmin(1)
        low, high = exponents[sets, np.maximum(best - 1, 0)], exponents[sets, np.minimum(best + 1, GRID - 1)]
    slope, exponent, limit = slopes[sets, best], exponents[sets, best], intercepts[sets, best]
    with np.errstate(divide="ignore"):  # A is 0 where the losses do not fall
        log_amplitude = np.log(slope) + exponent * centre
    return np.stack([log_amplitude, exponent, limit], 1), squares[sets, best]


def _lines(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes and intercepts, none negative, of the best lines y = slope · x + intercept through the points of
    the last axis, and their sums of squares."""
    from_mean = x - x.mean(-1, keepdims=True)
    slopes = np.maximum((from_mean * y).sum(-1) / (from_mean**2).sum(-1), 0)
    intercepts = y.mean(-1) - slopes * x.mean(-1)
    through_origin = intercepts < 0
    slopes = np.where(through_origin, (x * y).sum(-1) / (x**2).sum(-1), slopes)
    intercepts = np.where(through_origin, 0, intercepts)
    squares = (y - slopes[..., None] * x - intercepts[..., None]) ** 2
    return slopes, intercepts, squares.sum(-1)
