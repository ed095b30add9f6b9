"""A hashed n-gram model of scores, in numpy: linear, without a position and without a hidden layer, as
fastText's features are (Joulin et al., arXiv 1607.01759; hashing: Weinberger et al., arXiv 0902.2206).

A score is a mean over the scored positions of a chunk, and so is the prediction:
mean + (1/n) Σᵢ Σₖ weight[hash(the k ids that end with target i)], k = 1 … orders. It is fitted by ridge
regression over the chunks, each weighted with its n scored positions, whose number its noise falls with:
(Xᵀ N X + ridge · I) w = Xᵀ N (y − mean), N = diag(n). Conjugate gradients solve that in passes over the
chunks; nothing but the weights is kept in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd: Knuth's multiplicative hashing
HALF = np.uint64(32)


class Grams(NamedTuple):
    """The n-grams of R chunks with S scored positions in all.

    buckets: int64 [orders, S], the entry of the table of each n-gram; rows: int64 [S], the chunk of each
    position; counts: int64 [R], its scored positions.
    """

    buckets: np.ndarray
    rows: np.ndarray
    counts: np.ndarray

    def means(self, weights: np.ndarray) -> np.ndarray:
        """float64 [R]: the mean over the positions of the sum of their n-grams' weights; NaN without any."""
        total = np.bincount(self.rows, weights[self.buckets].sum(0), len(self.counts))
        with np.errstate(invalid="ignore"):
            return total / self.counts

    def add_transposed(self, values: np.ndarray, out: np.ndarray) -> None:
        """Add to out [buckets] the chunks' values [R], at each of their n-grams."""
        per_position = values[self.rows]
        for buckets in self.buckets:
            np.add.at(out, buckets, per_position)


def grams(chunks: Sequence[np.ndarray], eos_token_id: int, orders: int, buckets: int) -> Grams:
    """The n-grams that end with the scored ids of chunks: those after the first whose predecessor is not EOS.
    What lies before a chunk is one id of its own."""
    lengths = np.fromiter((len(chunk) for chunk in chunks), np.int64, len(chunks))
    ids = np.concatenate([np.zeros(0, np.int32), *chunks]).astype(np.uint64) + np.uint64(1)  # 0: before it
    rows = np.repeat(np.arange(len(chunks)), lengths)
    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    scored = place > 0
    scored[1:] &= ids[:-1] != eos_token_id + 1
    found = np.flatnonzero(scored)
    place, rows = place[found], rows[found]
    hashed = np.zeros(len(found), np.uint64)
    entries = np.empty((orders, len(found)), np.int64)
    for order in range(orders):
        there = np.where(place >= order, ids[found - np.minimum(order, place)], np.uint64(0))
        hashed = (hashed ^ there) * MULTIPLIER
        hashed ^= hashed >> HALF
        # The high half of hash · buckets: an even share of hashes for each entry, whatever their number.
        entries[order] = ((hashed * MULTIPLIER) >> HALF) * np.uint64(buckets) >> HALF
    return Grams(entries, rows, np.bincount(rows, minlength=len(chunks)))


class NgramProxy(NamedTuple):
    """A fitted model. weights: float32 [buckets]."""

    weights: np.ndarray
    mean: float
    orders: int
    eos_token_id: int

    def predict(self, chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(the numbers of scored positions int64 [R], the predicted scores float64 [R], NaN where there are
        none) of chunks, int [n] each."""
        found = grams(chunks, self.eos_token_id, self.orders, len(self.weights))
        return found.counts, self.mean + found.means(self.weights)

    def flops(self, positions: int, squares: int = 0) -> int:
        """Of the predictions for chunks with so many positions in all: a weight and its sum each."""
        return 2 * self.orders * positions
