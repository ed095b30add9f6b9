"""Which chunks of a corpus a sample holds, for score --sample and for what reads its scores."""

import numpy as np

from .corpus import Corpus


def sampled_chunks(corpus: Corpus, share: float, seed: int) -> np.ndarray:
    """The numbers of the chunks that a sample of a corpus holds, ascending: int64.

    Of each domain's chunks max(1, round(share · chunks)), the first in an order at random. So a larger share
    with the same seed holds all of a smaller one.
    """
    codes, names = corpus.domains
    order = np.random.default_rng(seed).permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]  # one domain after the other
    counts = np.bincount(codes, minlength=len(names))
    quotas = np.maximum(np.round(share * counts), 1)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(order)) - np.repeat(starts, counts)  # within the domain
    return np.sort(order[place < np.repeat(quotas, counts)])
