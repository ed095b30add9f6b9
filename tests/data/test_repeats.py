"""Near-duplicate chunks: groups and cap against all pairs, by exact Jaccard similarity."""

import os
import subprocess
import sys

import numpy as np
import pytest
from corpora import write_corpus

from miniplm.data import repeats
from miniplm.data.corpus import Corpus
from miniplm.data.repeats import repeat_groups, without_repeats

NAN = float("nan")


def mutated(ids, changes, rng) -> list[int]:
    """The ids with so many of them replaced, inserted or removed."""
    ids = list(ids)
    for _ in range(changes):
        place = int(rng.integers(len(ids)))
        ids[place : place + int(rng.integers(2))] = rng.integers(1, 500, int(rng.integers(1, 3))).tolist()
    return ids


def some_chunks(rng) -> list[list[int]]:
    """Originals of many lengths, with copies that have few or many changes, in random order."""
    chunks = []
    for length in [1, 2, 4, 5, 9, 30, 60, 200, 200, 400]:
        original = rng.integers(1, 500, length).tolist()
        chunks.append(original)
        for copy in range(int(rng.integers(5))):
            chunks.append(mutated(original, copy * length // 60, rng))
        chunks.append(original[: length // 2 or 1] + rng.integers(1, 500, length).tolist())
    return [chunks[row] for row in rng.permutation(len(chunks))]


def shingles(ids) -> set[tuple]:
    return {(*ids[start : start + 5], *[None] * (start + 5 - len(ids))) for start in range(len(ids))}


def groups_by_all_pairs(chunks, rows) -> dict[int, int]:
    """Row → the first row of its group, of those in one."""
    sets, first = {row: shingles(chunks[row]) for row in rows}, {row: row for row in rows}
    for one in rows:
        for two in rows:
            if one < two and len(sets[one] & sets[two]) / len(sets[one] | sets[two]) >= 0.8:
                joined = first[one], first[two]
                first = {row: min(joined) if top in joined else top for row, top in first.items()}
    counts = [*first.values()]
    return {row: top for row, top in first.items() if counts.count(top) > 1}


def found_groups(folder, rows) -> dict[int, int]:
    grouped, first = repeat_groups(Corpus(folder), np.array(rows, np.int64))
    return dict(zip(grouped.tolist(), first.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_groups_and_cap_are_those_of_all_pairs(seed, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(repeats, "BLOCK_IDS", 150)  # several blocks, several reads
    monkeypatch.setattr(repeats, "CHUNKS_AT_ONCE", 7)
    rng = np.random.default_rng(seed)
    chunks = some_chunks(rng)
    folder = write_corpus(tmp_path / "corpus", chunks, tiny_tokenizer)
    score = rng.choice(np.float32([0.5, 0.25, -1.0, 2.0, NAN]), len(chunks))
    rows = np.flatnonzero(np.isfinite(score)).tolist()
    expected = groups_by_all_pairs(chunks, rows)
    assert found_groups(folder, rows) == expected and len(set(expected.values())) > 3
    for most in (1, 2):
        dropped = set()
        for top in set(expected.values()):
            members = sorted((row for row in rows if expected.get(row) == top), key=lambda r: (-score[r], r))
            dropped |= set(members[most:])
        capped, figures = without_repeats(Corpus(folder), score, most)
        gone = np.isfinite(score) & ~np.isfinite(capped)
        assert set(np.flatnonzero(gone)) == dropped
        np.testing.assert_array_equal(capped[~gone], score[~gone])
        assert figures == {
            "jaccard": 0.8,
            "groups": len(set(expected.values())),
            "chunks": len(expected),
            "dropped": len(dropped),
        }
    assert without_repeats(Corpus(folder), score, 10)[1]["dropped"] == 0


def test_a_chain_is_one_group(tiny_tokenizer, tmp_path):
    """Neighbours alike, the ends not."""
    ids = np.random.default_rng(0).integers(1, 500, 200).tolist()
    chunks = [ids[10 * step : 10 * step + 150] for step in range(6)]
    assert len(shingles(chunks[0]) & shingles(chunks[5])) == 150 - 50 - 4
    assert found_groups(write_corpus(tmp_path / "c", chunks, tiny_tokenizer), range(6)) == dict.fromkeys(
        range(6), 0
    )


def test_how_often_a_pair_is_found(tiny_tokenizer, tmp_path, monkeypatch):
    """By its similarity, beside 1 − (1 − s^6)^20: with the threshold away, what shares a band is a pair."""
    monkeypatch.setattr(repeats, "JACCARD", 0.0)
    rng, pairs, length = np.random.default_rng(3), 150, 120
    for kept, similarity in ((80, 76 / 164), (100, 96 / 144)):
        chunks = []
        for _ in range(pairs):
            ids = rng.integers(1, 10**6, length + 100).tolist()
            chunks += [ids[:length], ids[:kept] + ids[length : 2 * length - kept]]
        for one, two in zip(chunks[::2], chunks[1::2], strict=True):
            both = len(shingles(one) & shingles(two))
            assert both / (2 * length - both) == pytest.approx(similarity)
        corpus = FakeCorpus(chunks)
        grouped, _ = repeat_groups(corpus, np.arange(len(chunks)))
        expected = 1 - (1 - similarity**repeats.ROWS) ** repeats.BANDS
        spread = (expected * (1 - expected) / pairs) ** 0.5
        assert abs(len(grouped) / 2 / pairs - expected) < 4 * spread


class FakeCorpus:
    def __init__(self, chunks):
        self.chunks = [np.array(ids, np.int32) for ids in chunks]

    def rows(self, indices):
        return [self.chunks[index] for index in indices]


def test_no_bucket_takes_for_ever(monkeypatch):
    """Many chunks that share a band and are no near-duplicates are compared with a few each."""
    monkeypatch.setattr(repeats, "COMPARED", 5)
    monkeypatch.setattr(repeats, "_band_keys", lambda corpus, chunks: np.zeros((20, len(chunks)), np.uint64))
    counted = []
    monkeypatch.setattr(repeats, "jaccard", lambda one, other: counted.append(1) or 0.0)
    rng = np.random.default_rng(0)
    corpus = FakeCorpus([rng.integers(1, 500, 10).tolist() for _ in range(300)])
    grouped, _ = repeat_groups(corpus, np.arange(300))
    assert len(grouped) == 0 and len(counted) <= 20 * 5 * 300


def test_hashes_are_the_same_everywhere():
    """Beside SplitMix64's published first values from state 0, and in processes with other hash seeds."""
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in repeats._mixed(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
    code = (
        "import numpy as np; from miniplm.data.repeats import _shingle_hashes as h; "
        "print(h([np.arange(9, dtype=np.int32), np.arange(3, dtype=np.int32)]).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(set(eval(outputs.pop()))) == 12  # three of them run over the end
