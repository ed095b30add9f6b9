import random

import numpy as np
import pyarrow as pa
import pytest

from miniplm.data import corpus as storage
from miniplm.runtime.artifacts import complete_output, open_output
from miniplm.runtime.errors import UserError


def write(folder, shards, with_scores=False):
    """A corpus folder from [[(ids, domain), …], …]."""
    open_output(folder, "prepare", {})
    hashes = []
    for number, rows in enumerate(shards):
        columns = {
            "input_ids": pa.array([ids for ids, _ in rows], pa.list_(pa.int32())),
            "domain": pa.array([domain for _, domain in rows], pa.string()),
            "num_tokens": pa.array([len(ids) for ids, _ in rows], pa.int32()),
        }
        if with_scores:
            columns |= {
                name: pa.array([float(len(ids)) for ids, _ in rows], pa.float32())
                for name in storage.SCORE_COLUMNS
            }
        hashes.append(storage.write_shard(folder, number, columns))
    content = storage.write_dataset_files(folder, hashes, with_scores)
    complete_output(folder, {"rows": sum(map(len, shards)), "eos_token_id": 0, "fingerprint": content})
    return content


def random_shards(seed):
    rng = random.Random(seed)
    return [
        [([rng.randrange(9) for _ in range(rng.randrange(1, 5))], rng.choice("abc")) for _ in range(n)]
        for n in (1, 2500, 0, 3)
    ]


@pytest.mark.parametrize("with_scores", [False, True])
def test_round_trip_here_and_through_datasets(tmp_path, with_scores):
    import datasets

    shards = random_shards(0)
    write(tmp_path / "corpus", shards, with_scores)
    rows = [row for shard in shards for row in shard]
    corpus = storage.Corpus(tmp_path / "corpus")
    order = np.random.default_rng(0).permutation(len(rows))
    assert [ids.tolist() for ids in corpus.rows(order)] == [rows[index][0] for index in order]
    assert corpus.rows([]) == [] and len(corpus) == len(rows)
    assert corpus.highest_id == max(max(ids) for ids, _ in rows)
    assert corpus.num_tokens.tolist() == [len(ids) for ids, _ in rows]
    codes, names = corpus.domains
    assert [names[code] for code in codes] == [domain for _, domain in rows]
    dataset = datasets.load_from_disk(str(tmp_path / "corpus"))
    assert dataset["input_ids"][:] == [ids for ids, _ in rows]
    assert dataset.column_names == [
        "input_ids",
        "domain",
        "num_tokens",
        *(storage.SCORE_COLUMNS if with_scores else []),
    ]


def test_equal_content_has_equal_bytes_and_fingerprint(tmp_path):
    assert (
        write(tmp_path / "a", random_shards(0))
        == write(tmp_path / "b", random_shards(0))
        != write(tmp_path / "c", random_shards(1))
    )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_damaged_or_foreign_folder_is_a_users_error(tmp_path):
    write(tmp_path / "corpus", random_shards(0))
    shard = tmp_path / "corpus" / storage.shard_name(1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="write it again"):
        storage.Corpus(tmp_path / "corpus")
    shard.unlink()
    with pytest.raises(UserError, match="write it again"):
        storage.Corpus(tmp_path / "corpus")
    with pytest.raises(UserError, match="does not exist"):
        storage.Corpus(tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        storage.Corpus(tmp_path / "foreign")
