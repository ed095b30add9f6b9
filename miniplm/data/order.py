"""Which rows of a corpus make up which training step, a function of (row lengths, batch size, seed, step)
alone, and its micro-batches."""

from collections.abc import Sequence

import numpy as np

from ..data.batches import Batch, pack, split_by_tokens
from ..runtime.errors import UserError


class DataOrder:
    """Which rows of a corpus make up which step.

    The rows follow one another in epochs without end, each epoch in an order of its own (a permutation seeded
    with (seed, epoch)) or all in corpus order. Step k takes the rows whose first prediction is among the
    predictions k·B … (k+1)·B − 1 of that stream: every row once per epoch, and after k steps of any corpus
    k·B predictions, to within one row.

    Args:
        num_tokens: int [rows], ids per row; a row of n ids counts n − 1 predictions. Rows without any are
            left out.
        batch_tokens: B.
    Raises:
        UserError: there is nothing to predict, or a row is longer than B, which would leave steps empty.
    """

    def __init__(self, num_tokens: np.ndarray, batch_tokens: int, seed: int, shuffle: bool = True):
        self.num_tokens, self.batch_tokens, self.seed, self.shuffle = num_tokens, batch_tokens, seed, shuffle
        self.rows = np.flatnonzero(num_tokens > 1)
        self.epoch_tokens = int((num_tokens[self.rows] - 1).sum())
        if not self.epoch_tokens:
            raise UserError("the corpus holds no token to predict: train on another one")
        if (longest := int(num_tokens.max()) - 1) > batch_tokens:
            raise UserError(
                f"batch_tokens {batch_tokens} is below the longest chunk of the corpus, {longest} "
                f"predictions: raise it"
            )
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The steps of one pass; the last of them runs on into the next epoch."""
        return -(-self.epoch_tokens // self.batch_tokens)

    def step(self, step: int) -> np.ndarray:
        """The rows of step 0, 1, …, int64, in the order of the stream."""
        start, stop = step * self.batch_tokens, (step + 1) * self.batch_tokens
        parts = []
        for epoch in range(start // self.epoch_tokens, (stop - 1) // self.epoch_tokens + 1):
            rows, starts = self._epoch(epoch)
            first, last = np.searchsorted(
                starts, [start - epoch * self.epoch_tokens, stop - epoch * self.epoch_tokens]
            )
            parts.append(rows[first:last])
        return np.concatenate(parts)

    def total(self, values: np.ndarray, steps: int) -> int:
        """The sum of a value per row of the corpus (int64 [rows]) over the first `steps` steps."""
        epochs, rest = divmod(steps * self.batch_tokens, self.epoch_tokens)
        rows, starts = self._epoch(epochs)
        last = rows[: np.searchsorted(starts, rest)]
        return epochs * int(values[self.rows].sum()) + int(values[last].sum())

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, the predictions before each) of an epoch; the latest one is kept, since steps come in
        order."""
        if self._cached is None or self._cached[0] != epoch:
            rows = (
                np.random.default_rng([self.seed, epoch]).permutation(self.rows)
                if self.shuffle
                else self.rows
            )
            lengths = self.num_tokens[rows] - 1
            self._cached = epoch, rows, np.cumsum(lengths) - lengths
        return self._cached[1:]


def size_for_ranks(num_tokens: int, longest: int, micro_batch_tokens: int, world: int) -> int:
    """Tokens of a micro-batch, at most micro_batch_tokens, of which `world` ranks get equally many of a
    global batch of num_tokens predictions in rows of up to `longest`. For one rank it stays."""
    if world == 1 or micro_batch_tokens <= longest:
        return micro_batch_tokens
    # Less than a row is missing in a micro-batch: of num_tokens / n + longest there are at most n.
    rounds = -(-num_tokens // (world * (micro_batch_tokens - longest)))
    return min(micro_batch_tokens, -(-num_tokens // (world * rounds)) + longest)


def share_of_rank(batches: list[Batch], eos_token_id: int, rank: int, world: int) -> list[Batch]:
    """The micro-batches of a rank. All ranks get equally many: where there is none left, one without a
    target. Of one rank all."""
    share = batches[rank::world]
    if len(share) < -(-len(batches) // world):
        share.append(pack([np.array([eos_token_id, eos_token_id])], eos_token_id))
    return share


def global_batch(
    rows: Sequence[np.ndarray], eos_token_id: int, micro_batch_tokens: int, document_mask: bool = False
) -> list[Batch]:
    """Pack rows (int arrays of ids) into micro-batches of at most micro_batch_tokens predictions; a longer
    row stands alone."""
    return [
        pack(rows[group], eos_token_id, document_mask)
        for group in split_by_tokens([len(row) for row in rows], micro_batch_tokens)
    ]
