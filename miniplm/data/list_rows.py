"""The rows of a list column of Arrow, in any order, without copying."""

from typing import Any

import numpy as np


class ListRows:
    """Random access to the rows of a list column (a ChunkedArray whose pieces are no slices of others)."""

    def __init__(self, column: Any):
        self._pieces = column.chunks
        self._starts = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, indices: Any) -> list[np.ndarray]:
        """The rows at `indices` (any order, repeats allowed), each a view of the column's memory."""
        indices = np.asarray(indices, dtype=np.int64)
        pieces = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[pieces]  # below Python's numbers, which are faster one by one
        result = []
        for piece, row in zip(pieces.tolist(), rows.tolist(), strict=True):
            offsets, values = self._arrays.get(piece) or self._piece(piece)
            result.append(values[offsets[row] : offsets[row + 1]])
        return result

    def _piece(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, values) of a piece."""
        piece = self._pieces[number]
        self._arrays[number] = piece.offsets.to_numpy(), piece.values.to_numpy()
        return self._arrays[number]
