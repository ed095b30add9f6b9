"""select: rules that keep nothing, and scores that cannot be used."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import forget_checksums, write_scores
from selections import (
    DOMAINS,
    LENGTHS,
    NAN,
    REFERENCE,
    TEACHER,
    kept_chunks,
    make_corpus,
    run_select,
)

from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json


@pytest.fixture
def corpus(tiny_tokenizer, tmp_path) -> str:
    return make_corpus(tmp_path / "corpus", tiny_tokenizer)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (dict(ratio=0.05), "ratio 0.05 of 11 chunks is less than one"),
        (dict(ratio=0.2, per_domain=True), "in any domain"),
        (dict(threshold=2.6), "the highest score is 2.5000"),
        (dict(token_budget=6), "token_budget 6"),
        (dict(token_budget=2, per_domain=True), "in any domain"),
        (dict(min_tokens=9), "no chunk of at least 9 tokens has a finite score; lower min_tokens"),
    ],
    ids=str,
)
def test_rule_that_keeps_nothing(tmp_path, corpus, rule, words):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    with pytest.raises(UserError, match=words):
        run_select(corpus, scores, tmp_path / "r", **rule)
    assert not (tmp_path / "r").exists()


def test_no_finite_score(tmp_path, corpus):
    scores = write_scores(tmp_path / "scores", corpus, [NAN] * 11, REFERENCE)
    for rule in (dict(ratio=1.0), dict(threshold=-9.0), dict(token_budget=99), dict(random_seed=1)):
        with pytest.raises(UserError, match="no chunk has a finite score"):
            run_select(corpus, scores, tmp_path / "r", **rule)


def test_corpus_of_one_chunk(tiny_tokenizer, tmp_path):
    corpus = make_corpus(tmp_path / "corpus", tiny_tokenizer, [4], ["a"])
    scores = write_scores(tmp_path / "scores", corpus, [-1.0], [-2.0])
    with pytest.raises(UserError, match="of 1 chunks is less"):
        run_select(corpus, scores, tmp_path / "r")
    run_select(corpus, scores, tmp_path / "r", ratio=1.0)
    assert kept_chunks(tmp_path / "r") == [0]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([*range(10)], "10 entries for the 11 chunks of the corpus and none for 1"),
        ([*range(11), 5], "12 entries"),
        ([*range(10), 5], "none for 1"),
        ([], "none for 11"),
    ],
    ids=["missing", "twice", "twice and missing", "no files"],
)
def test_every_chunk_exactly_once(tmp_path, corpus, order, words):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE, order=np.array(order, np.int64))
    with pytest.raises(UserError, match=words):
        run_select(corpus, scores, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_unusable_score_files(tmp_path, corpus):
    scores = write_scores(tmp_path / "scores", corpus, TEACHER, REFERENCE)
    path = tmp_path / "scores" / "scores-00001.parquet"
    whole, table = path.read_bytes(), pq.read_table(path)

    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            run_select(corpus, scores, tmp_path / "r")
        assert "scores-00001.parquet" in str(caught.value) and "\n" not in str(caught.value)

    for wrong in (whole[:-9], whole[:40], b"", b"nonsense" * 50):
        path.write_bytes(wrong)
        refused("cannot be read")
    pq.write_table(table.drop_columns(["score"]), path)
    refused("cannot be read")
    pq.write_table(table.set_column(0, "index", pa.array(["a"] * 4)), path)
    refused("cannot be read")
    for index in ([4, 5, 6, 11], [-1, 5, 6, 7], [None, 5, 6, 7]):
        pq.write_table(table.set_column(0, "index", pa.array(index)), path)
        refused("does not have")
    path.write_bytes(whole)
    run_select(corpus, scores, tmp_path / "r")


def test_folders_that_do_not_fit(tiny_tokenizer, tmp_path, corpus):
    other = make_corpus(tmp_path / "other", tiny_tokenizer, LENGTHS[::-1], DOMAINS)
    both = write_scores(tmp_path / "both", corpus, TEACHER, REFERENCE)
    foreign = write_scores(tmp_path / "foreign", other, TEACHER, REFERENCE)
    teacher = write_scores(tmp_path / "teacher", corpus, TEACHER)
    masked = write_scores(tmp_path / "masked", corpus, reference=REFERENCE, document_mask=True)
    small = write_scores(tmp_path / "small", corpus, reference=REFERENCE)
    forget_checksums(small, vocab_size=500)
    unfinished = Path(shutil.copytree(both, tmp_path / "unfinished"))
    (unfinished / "manifest.json").write_text(
        json.dumps({**read_json(unfinished / "manifest.json"), "complete": False})
    )
    for folders, words in [
        ([foreign], "another corpus"),
        ([teacher], "no scores of a reference"),
        ([small], "no scores of a teacher"),
        ([both, teacher], "both hold scores of a teacher"),
        ([teacher, teacher], "both hold"),
        ([both, both], "both hold"),
        ([teacher, masked], "document_mask is False and True"),
        ([small, teacher], "vocab_size is 999 and 500"),
        ([unfinished], "is not complete"),
        ([corpus], "'prepare'"),
        ([str(tmp_path / "nowhere")], "does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            run_select(corpus, folders, tmp_path / "r")
    with pytest.raises(UserError, match="expected that of"):
        run_select(both, both, tmp_path / "r")
    assert not (tmp_path / "r").exists()
