"""Near-duplicate chunks, found by MinHash.

A shingle is a run of SHINGLE ids; one begins at each id of a chunk, those at its end run over it. Two chunks
are near-duplicates if their sets of shingles have a Jaccard similarity of at least JACCARD, and so are chunks
that a row of near-duplicates joins: a group. (0.8 is what SlimPajama was made with; Lee et al., arXiv
2107.06499, ask for an edit similarity of 0.8.)

MinHash (Broder, 1997): under a random hash the least values of two sets are equal with a probability of their
similarity. BANDS · ROWS of them are compared in bands: two chunks with all ROWS equal in one of the BANDS are
looked at, their similarity is computed exactly, so nothing below the threshold joins two chunks. A pair of
similarity s is found with the probability 1 − (1 − s^ROWS)^BANDS: 0.998 at 0.8, 0.9999997 at 0.9. Documents
whose copies are cut into chunks at other places are no near-duplicates by this measure.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from ..runtime.progress import Progress
from .corpus import Corpus
from .selection import best_first

SHINGLE = 5  # ids
JACCARD = 0.8
BANDS, ROWS = 20, 6
# A chunk is compared with so many before it in its bucket (those equal in a band). It bounds the work where
# very many chunks share a template; those of one group are not compared again.
COMPARED = 32
BLOCK_IDS = 32_768  # hashed at a time, so that they stay in the processor's cache
CHUNKS_AT_ONCE = 10_000
REMEMBERED = 1_024  # chunks whose shingles are kept while they are compared
END = np.uint64(2**32)  # stands for an id past the end of a chunk
FACTOR = np.uint64(
    0xD1342543DE82EF95
)  # of polynomial hashes modulo 2^64 (Steele and Vigna, arXiv 2001.05304)


def without_repeats(corpus: Corpus, score: np.ndarray, most: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The scores (float32 [chunks]), NaN for the chunks that are not among the `most` best of their group of
    near-duplicates, ties in the order of the corpus; and the figures of the groups.

    Chunks without a finite score are in no group.
    """
    chunks, first = repeat_groups(corpus, np.flatnonzero(np.isfinite(score)))
    ranked = best_first(score[chunks])
    ranked = ranked[np.argsort(first[ranked], kind="stable")]  # by group, the best first
    starts = np.searchsorted(first[ranked], first[ranked])
    dropped = chunks[ranked[np.arange(len(ranked)) - starts >= most]]
    score = score.copy()
    score[dropped] = np.nan
    figures = {"groups": len(np.unique(first)), "chunks": len(chunks), "dropped": len(dropped)}
    return score, {"jaccard": JACCARD, **figures}


def repeat_groups(corpus: Corpus, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of `chunks` (int64 [n], ascending, none of them empty) are near-duplicates: (those in a group of
    two or more, int64 [m]; the first chunk of the group of each, int64 [m])."""
    keys = _band_keys(corpus, chunks)
    parent: dict[int, int] = {}  # a chunk in a group → an earlier one of it; a first chunk → itself

    def first_of(chunk: int) -> int:
        while (above := parent.get(chunk, chunk)) != chunk:
            parent[chunk] = parent.get(above, above)  # halves the way for the next time
            chunk = above
        return chunk

    @lru_cache(REMEMBERED)
    def shingles(chunk: int) -> np.ndarray:
        return np.unique(_shingle_hashes(corpus.rows([chunk])))

    for band in range(BANDS):
        for bucket in _buckets(keys[band]):
            members = chunks[bucket].tolist()
            for index, chunk in enumerate(members):
                for other in members[max(index - COMPARED, 0) : index][::-1]:
                    one, two = sorted((first_of(other), first_of(chunk)))
                    if one != two and jaccard(shingles(other), shingles(chunk)) >= JACCARD:
                        parent[one] = parent[two] = one
    grouped = np.array(sorted(parent), np.int64)
    return grouped, np.array([first_of(chunk) for chunk in grouped.tolist()], np.int64)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The similarity of two sets, each an array without repeats."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The indices, ascending, of each key that is there several times."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    bounds = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1], append=~ordered[-1:]))
    for number in np.flatnonzero(np.diff(bounds) > 1):
        yield order[bounds[number] : bounds[number + 1]]


def _band_keys(corpus: Corpus, chunks: np.ndarray) -> np.ndarray:
    """A hash of the ROWS least values of each band: uint64 [BANDS, chunks]."""
    keys = np.empty((BANDS, len(chunks)), np.uint64)
    mixed = _mixed(np.arange(2 * BANDS * ROWS, dtype=np.uint64)).astype(np.uint32)
    flips, factors = mixed[::2], mixed[1::2] | np.uint32(1)
    with Progress("near-duplicates", len(chunks), unit="chunks") as progress:
        for start, rows in _blocks(corpus, chunks):
            hashes = _shingle_hashes(rows).astype(np.uint32)
            starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
            values = np.empty_like(hashes)
            key = np.zeros((BANDS, len(rows)), np.uint64)
            for number, (flip, factor) in enumerate(zip(flips, factors, strict=True)):
                np.bitwise_xor(hashes, flip, out=values)
                np.multiply(values, factor, out=values)  # modulo 2^32
                least = np.minimum.reduceat(values, starts)
                key[number // ROWS] = (key[number // ROWS] + least) * FACTOR
            keys[:, start : start + len(rows)] = _mixed(key)
            progress.update(len(rows))
    return keys


def _blocks(corpus: Corpus, chunks: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(the index of the first one, the ids of each) of chunks in a row that have about BLOCK_IDS ids."""
    for begin in range(0, len(chunks), CHUNKS_AT_ONCE):
        rows = corpus.rows(chunks[begin : begin + CHUNKS_AT_ONCE])
        blocks = np.cumsum([len(row) for row in rows]) // BLOCK_IDS
        bounds = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(rows)]
        for start, stop in pairwise(bounds):
            yield begin + start, rows[start:stop]


def _shingle_hashes(rows: list[np.ndarray]) -> np.ndarray:
    """uint64: a hash of the shingle that begins at each id of the rows (int32 each, not empty), which stand
    one after another."""
    lengths = np.array([len(row) for row in rows])
    places = np.arange(lengths.sum()) + (SHINGLE - 1) * np.repeat(np.arange(len(rows)), lengths)
    padded = np.full(len(places) + (SHINGLE - 1) * len(rows), END)
    padded[places] = np.concatenate(rows)
    hashes = padded[places]
    for offset in range(1, SHINGLE):
        hashes *= FACTOR
        hashes += padded[places + offset]
    return _mixed(hashes)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's next value from each state (uint64): a hash that is the same everywhere."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values
