"""What share of each kind of text a selection dropped, counted in tokens.

A corpus does not hold the kinds: they are found again by counting documents. The chunks of a domain, joined,
are its documents in the order of the file, each with an end of text (data/chunking.py).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..data.corpus import Corpus
from ..data.encoding import is_taken
from .noise import CLEAN, IN_DEMO

ALL_NOISE = "all noise"


class Share(NamedTuple):
    """Of one kind of text: its tokens in the corpus, and what share of them each selection dropped."""

    label: str
    tokens: int
    dropped: dict[str, float]


def shares_dropped(
    corpus: Corpus,
    rows: Sequence[Mapping[str, str]],
    take: tuple[float, float],
    kept: Mapping[str, np.ndarray],
) -> list[Share]:
    """The kinds of noise, all noise, and clean text by domain, as far as there is any.

    Args:
        rows: the documents ("text", "domain", "kind") in the order of the file that the corpus was made of.
        take: the share of them that it holds.
        kept: bool [chunks] of each selection by its name.
    """
    labels = [*IN_DEMO, *(f"{CLEAN}: {domain}" for domain in sorted(corpus.domains[1]))]
    counts = tokens_by_label(corpus, [row for row in rows if is_taken(row["text"], take)], labels)
    counts = np.insert(counts, len(IN_DEMO), counts[:, : len(IN_DEMO)].sum(1), 1)
    labels.insert(len(IN_DEMO), ALL_NOISE)
    totals = counts.sum(0)
    dropped = {name: counts[~keep].sum(0) for name, keep in kept.items()}
    return [
        Share(label, int(totals[i]), {name: float(lost[i] / totals[i]) for name, lost in dropped.items()})
        for i, label in enumerate(labels)
        if totals[i]
    ]


def tokens_by_label(corpus: Corpus, rows: Sequence[Mapping[str, str]], labels: Sequence[str]) -> np.ndarray:
    """int64 [chunks, labels]: how many tokens of each chunk are of each kind. An end of text belongs to its
    document.

    Args:
        rows: the documents of the corpus, in order.
        labels: kinds of noise, and "clean: DOMAIN".
    """
    documents: dict[str, list[int]] = {}  # domain → the label of each of its documents
    for row in rows:
        label = f"{CLEAN}: {row['domain']}" if row["kind"] == CLEAN else row["kind"]
        documents.setdefault(row["domain"], []).append(labels.index(label))
    codes, names = corpus.domains
    counts = np.zeros((len(corpus), len(labels)), np.int64)
    ended = dict.fromkeys(names, 0)  # documents
    for chunk, ids in enumerate(corpus.rows(range(len(corpus)))):
        domain, ends = names[codes[chunk]], ids == corpus.eos_token_id
        document = ended[domain] + np.cumsum(ends) - ends
        counts[chunk] = np.bincount(np.array(documents[domain])[document], minlength=len(labels))
        ended[domain] += int(ends.sum())
    return counts
