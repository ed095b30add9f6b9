"""Corpus rows → packed batches.

A chunk of n ids gives n − 1 predictions: position i has input id i and predicts id i + 1. A position whose
input is EOS predicts the first token of an unrelated document, so its target is IGNORE_INDEX: it is neither
scored nor trained.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from .corpus import Corpus

IGNORE_INDEX = -100
Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Packed rows without padding.

    input_ids [T] int64; targets [T] int64, IGNORE_INDEX where nothing is predicted; cu_seqlens [B+1] int32,
    the bounds within which attention stays; max_seqlen, the longest of those; row_cu_seqlens [R+1] int32, the
    bounds of the corpus rows (equal to cu_seqlens unless attention stays within documents).
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    row_cu_seqlens: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """On the device; from pinned memory the copies go on while the host does."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In memory from which a GPU copies while the host goes on."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(
            change(self.input_ids),
            change(self.targets),
            change(self.cu_seqlens),
            self.max_seqlen,
            change(self.row_cu_seqlens),
        )


def pinned(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Iterate over the batches, in pinned memory if they go to a GPU. Made where the batches are made: in the
    background."""
    for batch in batches:
        yield batch.pin_memory() if device.type == "cuda" else batch


def pack(rows: Sequence[np.ndarray], eos_token_id: int, document_mask: bool = False) -> Batch:
    """Pack chunks (each an int array of n ≥ 1 ids, n − 1 positions; one id alone gives none) into a Batch.

    Args:
        document_mask: attention stays within documents (they end with EOS) instead of spanning the chunk.
    """
    lengths = np.fromiter((len(row) - 1 for row in rows), np.int64, len(rows))
    row_bounds = np.concatenate([[0], np.cumsum(lengths)])
    empty = np.zeros(0, np.int64)
    inputs = np.concatenate([*(row[:-1] for row in rows), empty]).astype(np.int64)
    targets = np.concatenate([*(row[1:] for row in rows), empty]).astype(np.int64)
    after_eos = inputs == eos_token_id
    targets[after_eos] = IGNORE_INDEX
    bounds = row_bounds
    if document_mask:
        bounds = np.union1d(row_bounds, np.flatnonzero(after_eos) + 1)
    longest = int(np.diff(bounds).max(initial=0))
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(bounds.astype(np.int32)),
        longest,
        torch.from_numpy(row_bounds.astype(np.int32)),
    )


def squared_lengths(corpus: "Corpus", document_mask: bool = False) -> np.ndarray:
    """int64 [chunks]: Σ n² over the stretches of n positions that attention stays within, as `pack` has them.
    With document_mask the corpus is read for it."""
    if not document_mask:
        return (corpus.num_tokens - 1) ** 2
    squares = np.zeros(len(corpus), np.int64)
    for chunk in range(len(corpus)):
        ids = corpus.rows([chunk])[0][:-1]
        starts = np.flatnonzero(ids == corpus.eos_token_id) + 1
        squares[chunk] = (np.diff(starts, prepend=0, append=len(ids)) ** 2).sum()
    return squares


def split_by_tokens(num_tokens: Sequence[int] | np.ndarray, batch_tokens: int) -> list[slice]:
    """Cut consecutive rows into groups whose positions (num_tokens − 1 each) fit into batch_tokens, one row
    at least.

    A pure function of the row lengths: the same rows always give the same groups.
    """
    groups, start, total = [], 0, 0
    for row, length in enumerate(np.asarray(num_tokens).tolist()):
        if row > start and total + length - 1 > batch_tokens:
            groups.append(slice(start, row))
            start, total = row, 0
        total += length - 1
    if start < len(num_tokens):
        groups.append(slice(start, len(num_tokens)))
    return groups


def prefetch(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Iterate over `items` while a background thread makes the next `depth`. An exception there is raised
    here."""
    # An item in a tuple of its own, an exception, or None at the end.
    ready: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[Item] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item,))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        stop.set()
