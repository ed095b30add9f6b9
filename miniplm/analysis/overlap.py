"""What two refined corpora have in common, per domain. Chunks are equal that hold the same ids."""

import hashlib
from collections import Counter

import numpy as np

from ..data.corpus import Corpus
from ..runtime.text import printable

CHUNKS_AT_ONCE = 10_000


def overlap(one: Corpus, other: Corpus) -> dict[str, tuple[int, int, int]]:
    """Domain → chunks (in one, in the other, in both); of a chunk that is there several times each counts."""
    ours, theirs = _by_domain(one), _by_domain(other)
    result = {}
    for name in sorted({*ours, *theirs}):
        here, there = ours.get(name, Counter()), theirs.get(name, Counter())
        result[name] = (here.total(), there.total(), (here & there).total())
    return result


def _by_domain(corpus: Corpus) -> dict[str, Counter[bytes]]:
    """How often each chunk, by a hash of its ids, is in a domain."""
    codes, names = corpus.domains
    result: dict[str, Counter[bytes]] = {name: Counter() for name in names}
    for start in range(0, len(corpus), CHUNKS_AT_ONCE):
        rows = np.arange(start, min(start + CHUNKS_AT_ONCE, len(corpus)))
        for code, ids in zip(codes[rows], corpus.rows(rows), strict=True):
            result[names[code]][hashlib.blake2b(ids.tobytes(), digest_size=8).digest()] += 1
    return result


def print_overlap(one: Corpus, other: Corpus) -> None:
    """The table of overlap(one, other), with a line for all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = overlap(one, other)
    title = Text(f"{printable(one.folder)} beside {printable(other.folder)}")
    table = Table("domain", title=title)
    for heading in ("here", "there", "in both", "of here", "of there"):
        table.add_column(heading, justify="right")
    for name, counts in found.items():
        table.add_row(Text(printable(name)), *_cells(counts))
    table.add_section()
    here, there, both = (sum(counts) for counts in zip(*found.values(), strict=True))
    table.add_row("all", *_cells((here, there, both)))
    Console().print(table)


def _cells(counts: tuple[int, int, int]) -> list[str]:
    here, there, both = counts
    shares = [f"{both / kept:.1%}" if kept else "" for kept in (here, there)]
    return [f"{here:,}", f"{there:,}", f"{both:,}", *shares]
