"""Fitting the n-gram model (models/ngram.py): ridge regression by conjugate gradients, in passes over the
chunks (Hestenes & Stiefel, 1952).

Minimised is Σᵢ nᵢ (yᵢ − mean − x̄ᵢ·w)² + ridge · |w|², where x̄ᵢ are the counts of chunk i's n-grams by its nᵢ
scored positions: the noise of a mean falls with their number. The solution is that of
(Σᵢ cᵢ x̄ᵢᵀ + ridge) w = Σᵢ cᵢ (yᵢ − mean) with the counts cᵢ = nᵢ x̄ᵢ; a pass multiplies the left-hand side.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..models.ngram import Grams

TOLERANCE = 1e-3  # of the residual, by the right-hand side

Batches = Callable[[], Iterable[tuple[Grams, np.ndarray]]]  # the chunks, and their scores float64 [R]


class RidgeState(NamedTuple):
    """How far a fit has come. weights, residual, direction: float64 [buckets]; first: the norm of the
    right-hand side; mean: of the scores, by the chunks' positions."""

    weights: np.ndarray
    residual: np.ndarray
    direction: np.ndarray
    first: float
    mean: float
    passes: int = 0

    @property
    def error(self) -> float:
        """Of the residual, by the right-hand side."""
        return float(np.linalg.norm(self.residual)) / self.first if self.first else 0.0

    @property
    def done(self) -> bool:
        return self.error <= TOLERANCE


def begin(batches: Batches, buckets: int) -> RidgeState:
    """A fit before its first pass: the right-hand side, in a pass of its own."""
    residual, counted, total, positions = np.zeros(buckets), np.zeros(buckets), 0.0, 0
    for found, scores in batches():
        found.add_transposed(scores, residual)
        found.add_transposed(np.ones(len(scores)), counted)
        total += float(found.counts @ scores)
        positions += int(found.counts.sum())
    mean = total / positions
    residual -= mean * counted
    return RidgeState(np.zeros(buckets), residual, residual.copy(), float(np.linalg.norm(residual)), mean)


def improve(state: RidgeState, batches: Batches, ridge: float) -> RidgeState:
    """One pass, a step of conjugate gradients."""
    weights, residual, direction, first, mean, passes = state
    product = ridge * direction
    for found, _ in batches():
        found.add_transposed(found.means(direction), product)
    before = residual @ residual
    step = before / (direction @ product)
    weights, residual = weights + step * direction, residual - step * product
    direction = residual + (residual @ residual) / before * direction
    return RidgeState(weights, residual, direction, first, mean, passes + 1)


def tensors(state: RidgeState) -> dict[str, np.ndarray]:
    """The state for a file, exactly."""
    return {name: np.asarray(value) for name, value in state._asdict().items()}


def load(found: dict[str, np.ndarray] | None) -> RidgeState | None:
    """The state in the tensors of a file, if there are any."""
    if found is None:
        return None
    plain = {name: found[name].item() for name in ("first", "mean", "passes")}
    return RidgeState(**{**found, **plain})
