"""Scores of chunks and documents against restatements, token by token and document by document."""

import numpy as np
import pytest
from corpora import write_corpus

from miniplm.data import aggregation
from miniplm.data.aggregation import document_means, summed, token_quantiles
from miniplm.data.corpus import Corpus
from miniplm.runtime.errors import UserError

EOS, NAN, INF = 0, float("nan"), float("inf")


def test_sums():
    columns = {"score": np.float32([1.5, NAN, -INF, 2.0]), "num_tokens": np.int32([3, 0, 2, 0])}
    found = summed(columns, ("score",))
    np.testing.assert_array_equal(found["score"], np.float32([4.5, NAN, -INF, 0]))
    assert found["num_tokens"] is columns["num_tokens"] and columns["score"][0] == 1.5


class Stored:
    """Log-probabilities per token as TokenScores gives them: losses, one chunk after the other."""

    def __init__(self, rows):
        self.rows = rows

    def of(self, chunks):
        return np.concatenate([np.zeros(0, np.float32), *(-self.rows[chunk] for chunk in chunks)])


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 1.0])
def test_quantiles_are_those_chunk_by_chunk(quantile, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregation, "CHUNKS_AT_ONCE", 7)
    rng, lengths = np.random.default_rng(5), [1, 2, 3, 9, 40, 1, 6, 5, 8, 30, 2, 4]
    corpus = Corpus(write_corpus(tmp_path / "corpus", [[5] * length for length in lengths], tiny_tokenizer))
    tokens = {}
    for role in ("teacher", "reference"):
        tokens[role] = [np.float32(rng.choice([-1.0, -2.5, -7.0, NAN], length - 1)) for length in lengths]
        tokens[role][7][:] = NAN
    monkeypatch.setattr(
        aggregation, "TokenScores", lambda folder, corpus, rule: Stored(tokens[rule.removesuffix("_loss")])
    )
    mean = np.float32([NAN, -1, -1, -1, -1, NAN, -INF, -1, -1, -1, -1, -1])
    columns = {"teacher_log_prob": mean, "reference_log_prob": mean, "score": mean, "num_tokens": lengths}
    folders = {"teacher": "t", "reference": "r"}
    for names in (("score",), ("reference_log_prob",), ("teacher_log_prob", "reference_log_prob")):
        found = token_quantiles(columns, corpus, folders, names, quantile)
        assert all(found[name] is columns[name] for name in columns if name not in names)
        for name, row in ((name, row) for name in names for row in range(len(lengths))):
            if name == "score":
                values = tokens["teacher"][row] - tokens["reference"][row]
            else:
                values = tokens[name.removesuffix("_log_prob")][row]
            values = values[np.isfinite(values)]
            if len(values) and np.isfinite(mean[row]):
                assert found[name][row] == pytest.approx(np.quantile(values, quantile), rel=1e-6)
            else:
                assert np.isnan(found[name][row])


def streams(rng) -> tuple[list[list[int]], list[str], dict[str, list[list[tuple[int, int]]]]]:
    """(chunks, their domains, per domain the documents: the (chunk, ids there) of each of their parts)."""
    chunks, domains = [], []
    for row in range(60):
        domains.append(str(rng.choice(["a", "b", "c"])))
        chunks.append(rng.integers(1, 500, int(rng.integers(1, 12))).tolist())
        for place in np.flatnonzero(rng.random(len(chunks[row])) < rng.choice([0, 0.1, 0.6])):
            chunks[row][place] = EOS
    documents: dict[str, list[list[tuple[int, int]]]] = {}
    for domain in set(domains):
        found, opened = [], False
        for row in (row for row in range(60) if domains[row] == domain):
            for token in chunks[row]:
                if not opened:
                    found.append({})
                found[-1][row] = found[-1].get(row, 0) + 1
                opened = token != EOS
        documents[domain] = [list(document.items()) for document in found]
    return chunks, domains, documents


@pytest.mark.parametrize("seed", range(5))
def test_document_means_are_those_document_by_document(seed, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregation, "CHUNKS_AT_ONCE", 7)
    rng = np.random.default_rng(seed)
    chunks, domains, documents = streams(rng)
    corpus = Corpus(write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer, domains))
    score = rng.normal(size=len(chunks)).astype(np.float32)
    score[rng.random(len(chunks)) < 0.2] = NAN
    score[3] = -INF
    total = np.zeros(len(chunks))
    for parts in (document for domain in documents.values() for document in domain):
        counted = [(row, ids) for row, ids in parts if np.isfinite(score[row])]
        weight = sum(ids for _, ids in counted)
        mean = sum(ids * float(score[row]) for row, ids in counted) / weight if weight else 0.0
        for row, ids in parts:
            total[row] += ids * mean
    expected = np.where(np.isfinite(score), total / [len(ids) for ids in chunks], NAN)
    found = document_means(corpus, score)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert (found != score)[np.isfinite(score)].any()


def test_each_chunk_of_a_document_gets_its_score(tiny_tokenizer, tmp_path):
    """A document of three chunks, one of one chunk, one that ends within a chunk where the next begins."""
    chunks = [[1, 2, 3, 4], [5, 6, 7, 8], [9, EOS], [1, 2, EOS], [3, 4], [5, 6, EOS, 7], [8, EOS]]
    corpus = Corpus(write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer))
    found = document_means(corpus, np.float32([1, 2, 3, 7, 0, 5, 3]))
    first, third, last = (4 * 1 + 4 * 2 + 2 * 3) / 10, (2 * 0 + 3 * 5) / 5, (1 * 5 + 2 * 3) / 3
    expected = [first, first, first, 7, third, (3 * third + last) / 4, last]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_documents_that_are_not_whole(tiny_tokenizer, tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "corpus", [[1, 2], [3, 4]], tiny_tokenizer, with_scores=True))
    with pytest.raises(UserError, match=r"document_scores needs whole documents, corpus .* is refined"):
        document_means(corpus, np.float32([1, 2]))
