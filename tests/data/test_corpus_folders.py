"""Corpus folders: what is written is what is read, here and through `datasets`."""

import random

import numpy as np
import pyarrow as pa
import pytest
from corpora import write_corpus
from outputs import contents

from miniplm.data.corpus import Corpus, shard_paths, write_chunks
from miniplm.data.scores import SCORE_COLUMNS
from miniplm.runtime.errors import UserError

FILES = [1, 2500, 0, 3]  # chunks in each


def random_chunks(seed) -> tuple[list[list[int]], list[str]]:
    """Chunks, and the domain of each."""
    rng = random.Random(seed)
    chunks = [[rng.randrange(9) for _ in range(rng.randrange(1, 5))] for _ in range(sum(FILES))]
    return chunks, [rng.choice("abc") for _ in chunks]


def write(folder, tokenizer, seed=0, with_scores=False) -> Corpus:
    chunks, domains = random_chunks(seed)
    return Corpus(write_corpus(folder, chunks, tokenizer, domains, FILES, with_scores))


@pytest.mark.parametrize("with_scores", [False, True])
def test_round_trip_here_and_through_datasets(tiny_tokenizer, tmp_path, with_scores):
    import datasets

    chunks, domains = random_chunks(0)
    corpus = write(tmp_path / "corpus", tiny_tokenizer, with_scores=with_scores)
    order = np.random.default_rng(0).permutation(len(chunks))
    assert [ids.tolist() for ids in corpus.rows(order)] == [chunks[index] for index in order]
    assert corpus.rows([]) == [] and len(corpus) == len(chunks)
    assert corpus.highest_id == max(map(max, chunks))
    assert corpus.num_tokens.tolist() == [len(ids) for ids in chunks]
    codes, names = corpus.domains
    assert [names[code] for code in codes] == domains
    dataset = datasets.load_from_disk(str(tmp_path / "corpus"))
    assert dataset["input_ids"][:] == chunks
    scores = SCORE_COLUMNS if with_scores else []
    assert dataset.column_names == ["input_ids", "domain", "num_tokens", *scores]


@pytest.mark.parametrize("table_bytes", [1, 5_000, 10**9])
def test_filtered_in_tables_of_a_size(tiny_tokenizer, tmp_path, table_bytes):
    chunks, domains = random_chunks(0)
    corpus = write(tmp_path / "corpus", tiny_tokenizer, with_scores=True)
    keep = np.random.default_rng(1).random(len(chunks)) < 0.3
    keep[[0, -1]], keep[1001:2001] = True, False  # the second is a whole record batch
    tables = list(corpus.filtered(keep, table_bytes))
    assert all(table.column_names == ["input_ids", "domain", "num_tokens"] for table in tables)
    found = [row for table in tables for row in table.to_pylist()]
    assert [row["input_ids"] for row in found] == [chunks[index] for index in np.flatnonzero(keep)]
    assert [row["domain"] for row in found] == [domains[index] for index in np.flatnonzero(keep)]
    assert [row["num_tokens"] for row in found] == [len(row["input_ids"]) for row in found]
    assert len(tables) == {1: 4, 5_000: 2, 10**9: 1}[table_bytes]
    assert list(corpus.filtered(np.zeros(len(chunks), bool), 1)) == []


def test_write_chunks_writes_what_write_shard_does(tiny_tokenizer, tmp_path):
    chunks, domains = random_chunks(2)
    rows = [(domain, np.array(ids, np.int32)) for domain, ids in zip(domains, chunks, strict=True)]
    write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer, domains)
    write_chunks(tmp_path, 0, rows)
    tables = [
        pa.ipc.open_stream(path.read_bytes()).read_all()
        for folder in (tmp_path / "corpus", tmp_path)
        for path in shard_paths(folder)
    ]
    assert tables[0].equals(tables[1], check_metadata=True)
    assert [len(column.chunks) for column in tables[1].columns] == [3, 3, 3]  # record batches


def test_equal_content_has_equal_bytes_and_fingerprint(tiny_tokenizer, tmp_path):
    one, two, other = (
        write(tmp_path / name, tiny_tokenizer, seed).fingerprint
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert one == two != other
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_foreign_folder_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Corpus(tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Corpus(tmp_path / "foreign")
