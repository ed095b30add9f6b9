"""From scores of tokens to those of chunks, and from those to scores of documents."""

from collections.abc import Mapping

import numpy as np

from ..runtime.errors import UserError
from .corpus import Corpus
from .token_scores import TokenScores

CHUNKS_AT_ONCE = 1_000
NEEDED = {  # the columns that a score is made of
    "difference": ("score",),
    "normalised": ("teacher_log_prob", "reference_log_prob"),
    "teacher": ("teacher_log_prob",),
    "reference": ("reference_log_prob",),
}


def summed(columns: Mapping[str, np.ndarray], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The columns with the sums over a chunk's scored tokens (nats) in place of the means `names` (float32
    [chunks]); "num_tokens" is how many those are."""
    with np.errstate(over="ignore"):
        return {
            **columns,
            **{name: columns[name] * columns["num_tokens"].astype(np.float32) for name in names},
        }


def token_quantiles(
    columns: Mapping[str, np.ndarray],
    corpus: Corpus,
    folders: Mapping[str, str],
    names: tuple[str, ...],
    quantile: float,
) -> dict[str, np.ndarray]:
    """The columns with a quantile of a chunk's tokens (nats) in place of the means `names` (float32 [chunks])
    where those are finite. Between two tokens it is interpolated linearly, as numpy does.

    The score of a token is the difference of the two models' log-probabilities of it.

    Args:
        folders: of the scores, by role.
    Raises:
        UserError: a folder holds no log-probabilities per token.
    """
    roles = [role for role in folders if f"{role}_log_prob" in names or "score" in names]
    tokens = {role: TokenScores(folders[role], corpus, f"{role}_loss") for role in roles}
    result = {name: np.full(len(corpus), np.nan, np.float32) for name in names}
    for start in range(0, len(corpus), CHUNKS_AT_ONCE):
        chunks = np.arange(start, min(start + CHUNKS_AT_ONCE, len(corpus)))
        values = {f"{role}_log_prob": -each.of(chunks) for role, each in tokens.items()}
        if "score" in names:
            values["score"] = values["teacher_log_prob"] - values["reference_log_prob"]
        rows = np.repeat(np.arange(len(chunks)), corpus.num_tokens[chunks] - 1)
        for name in names:
            result[name][chunks] = _quantiles(values[name], rows, len(chunks), quantile)
    for name, found in result.items():
        found[~np.isfinite(columns[name])] = np.nan
    return {**columns, **result}


def _quantiles(values: np.ndarray, rows: np.ndarray, count: int, quantile: float) -> np.ndarray:
    """float64 [count]: that of the finite values [n] of each row (int [n], ascending); NaN of none."""
    finite = np.isfinite(values)
    values, rows = values[finite].astype(np.float64), rows[finite]
    values = values[np.lexsort((values, rows))]
    sizes = np.bincount(rows, minlength=count)
    some = np.flatnonzero(sizes)
    place = quantile * (sizes[some] - 1)
    lower = np.floor(place).astype(np.int64)
    first = (np.cumsum(sizes) - sizes)[some]
    low, high = values[first + lower], values[first + np.ceil(place).astype(np.int64)]
    result = np.full(count, np.nan)
    result[some] = low + (high - low) * (place - lower)
    return result


def document_means(corpus: Corpus, score: np.ndarray) -> np.ndarray:
    """Scores of documents, for their chunks: float32 [chunks].

    A document's score is the mean of those of the chunks that it has a part in, each weighted by its ids
    there; a chunk's is the mean of those of its documents, weighted likewise. So each chunk of a document
    that shares none with others gets the document's score. Documents are what EOS ends in the stream of a
    domain (data/chunking.py). A chunk without a finite score counts nowhere, and stays without.

    Args:
        score: float32 [chunks].
    Raises:
        UserError: the corpus has lost chunks, or their ends, so that its documents are not known.
    """
    if corpus.is_cut:
        raise UserError(
            f"document_scores needs whole documents, corpus {corpus.folder} is refined or synthesized: "
            f"select from the corpus that prepare wrote"
        )
    chunk, ids, ends = _parts(corpus)
    domain = corpus.domains[0][chunk]
    order = np.argsort(domain, kind="stable")  # the streams of the domains, one after another
    chunk, ids, ends, domain = chunk[order], ids[order], ends[order], domain[order]
    document = np.concatenate([[0], np.cumsum(ends[:-1] | (np.diff(domain) != 0))]) if len(ids) else chunk

    finite = np.isfinite(score)
    weight = ids * finite[chunk]
    total = np.bincount(document, weight * np.where(finite, score, 0).astype(np.float64)[chunk])
    means = total / np.maximum(np.bincount(document, weight), 1)
    result = np.bincount(chunk, ids * means[document], len(score)) / np.maximum(corpus.num_tokens, 1)
    return np.where(finite, result, np.nan).astype(np.float32)


def _parts(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of documents in the chunks, in corpus order: (the chunk, int64; how many ids, int64; whether
    the document ends there)."""
    found = []
    for start in range(0, len(corpus), CHUNKS_AT_ONCE):
        chunks = np.arange(start, min(start + CHUNKS_AT_ONCE, len(corpus)))
        lengths = corpus.num_tokens[chunks]
        ended = np.concatenate(corpus.rows(chunks)) == corpus.eos_token_id
        last = ended.copy()
        last[np.cumsum(lengths)[lengths > 0] - 1] = True
        last = np.flatnonzero(last)
        found.append((np.repeat(chunks, lengths)[last], np.diff(last, prepend=-1), ended[last]))
    chunk, ids, ends = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return chunk, ids, ends
