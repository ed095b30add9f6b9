"""A corpus is what its fingerprint says: no damage gets through, and none ends in anything but one line."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from corpora import forget_checksums, write_corpus
from damages import damage_some_file, swap

from miniplm.data import verify
from miniplm.data.corpus import Corpus
from miniplm.data.verify import Damaged, without_layout
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import fingerprint, hash_files, read_json, write_json

FILES = [30, 1, 29]  # chunks in each
REMEDY = "restore it, or run its prepare command again, which mends it"


def make(folder, tokenizer, files=FILES) -> Path:
    rng = random.Random(0)
    chunks = [[rng.randrange(500) for _ in range(rng.randrange(1, 40))] for _ in range(sum(files))]
    return Path(write_corpus(folder, chunks, tokenizer, [rng.choice("ab") for _ in chunks], files))


def everything(folder) -> tuple:
    """All that a stage takes from a corpus."""
    corpus = Corpus(folder)
    codes, names = corpus.domains
    rows = [ids.tolist() for ids in corpus.rows(range(len(corpus)))]
    kept = [table.to_pydict() for table in corpus.filtered(np.ones(len(corpus), bool), 10**9)]
    return rows, kept, codes.tolist(), names, corpus.highest_id, corpus.manifest, corpus.num_tokens.tolist()


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        everything(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_no_random_damage_gets_through(tiny_tokenizer, tmp_path, seed):
    whole = make(tmp_path / "whole", tiny_tokenizer)
    expected, rng = everything(whole), random.Random(seed)
    refused = 0
    for number in range(70):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        done = damage_some_file(folder, rng, but=("manifest.json",))
        try:
            found = everything(folder)
        except UserError as error:
            refused += 1
            kind, name = done.split()
            assert "\n" not in str(error)
            if kind != "swap":  # of two files either may be named
                assert name in str(error) or "data-00000.arrow to data-00002.arrow" in str(error), done
        else:
            assert found == expected, done
    assert refused > 40  # what is not refused is in a file's layout, or in settings that no stage reads


def test_the_damaged_file_is_named(tiny_tokenizer, tmp_path):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    shard = folder / "data-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    expected = f"corpus {folder} is damaged: data-00001.arrow is not as written: {REMEDY}"
    assert refusal(folder) == expected  # known since it was written
    shutil.copytree(folder, tmp_path / "copy")  # here its hash was never known but to the manifest
    assert "data-00001.arrow is not as written" in refusal(tmp_path / "copy")
    forget_checksums(tmp_path / "copy")
    assert "its files data-00000.arrow to data-00002.arrow are not all as written" in refusal(
        tmp_path / "copy"
    )
    shard.write_bytes(content[:-200])
    assert "data-00001.arrow is not as written" in refusal(folder)
    (tmp_path / "copy" / "data-00001.arrow").write_bytes(content[:-200])
    assert "data-00001.arrow cannot be read (" in refusal(tmp_path / "copy")
    shard.unlink()
    assert "data-00001.arrow is missing" in refusal(folder)


def test_swapped_files_are_named(tiny_tokenizer, tmp_path):
    folder = make(tmp_path / "corpus", tiny_tokenizer, [5, 5])
    swap(folder / "data-00000.arrow", random.Random(0))
    assert "data-00000.arrow, data-00001.arrow are not as written" in refusal(folder)


def test_files_are_read_once_and_again_when_they_change(tiny_tokenizer, tmp_path, monkeypatch):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    monkeypatch.setattr(verify, "SILENT_BYTES", 10**9)
    read = []
    monkeypatch.setattr(verify, "hash_files", lambda paths: read.extend(paths) or hash_files(paths))
    Corpus(folder)
    while read:  # until they have been at rest for long enough to be trusted
        read.clear()
        Corpus(folder)
    shard = folder / "data-00002.arrow"
    shard.write_bytes(shard.read_bytes())
    Corpus(folder)
    assert read == [shard]


def test_a_memory_that_is_wrong_does_no_harm(tiny_tokenizer, tmp_path, monkeypatch):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    wrong = {"hash": "0" * 16, "chunks": 9, "tokens": 9, "lowest": 0, "highest": 9, "fault": None}
    monkeypatch.setattr(verify.FileFacts, "get", lambda self, path: wrong)
    assert len(Corpus(folder)) == sum(FILES)


def test_many_bytes_are_read_with_a_bar(tiny_tokenizer, tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(verify, "SILENT_BYTES", 10)
    Corpus(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    assert f"verify: {size:,} of {size:,} bytes" in capsys.readouterr().err


# --- files that are not what a corpus holds, under a fingerprint that fits ---


def fit_manifest(folder: Path) -> Path:
    """Make the manifest's fingerprint that of the files as they are."""
    hashes = [hash_files([path]) for path in sorted(folder.glob("data-*.arrow"))]
    return forget_checksums(folder, fingerprint=fingerprint(hashes))


def forge(folder: Path, columns: dict) -> Path:
    """The second file holds these columns, and the manifest fits."""
    path = folder / "data-00001.arrow"
    schema = None if "x" in columns else pa.ipc.open_stream(path.read_bytes()).schema
    batch = pa.record_batch(columns, schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return fit_manifest(folder)


def lists(*chunks) -> pa.Array:
    return pa.array(chunks, pa.list_(pa.int32()))


def int32s(*values) -> bytes:
    return np.array(values, "<i4").tobytes()


@pytest.mark.parametrize(
    "offsets", [(0, 2_000_000_000), (0, 4), (-5, 3), (3, 1), (-(2**31), 2**31 - 1), (4, 7)]
)
def test_forged_offsets(tiny_tokenizer, tmp_path, offsets):
    columns = {"input_ids": lists([5, 6, 7]), "domain": ["a"], "num_tokens": pa.array([3], pa.int32())}
    folder = forge(make(tmp_path / "corpus", tiny_tokenizer), columns)
    path = folder / "data-00001.arrow"
    content = path.read_bytes()
    start = content.rindex(int32s(0, 3), 0, content.index(int32s(5, 6, 7)))
    path.write_bytes(content[:start] + int32s(*offsets) + content[start + 8 :])
    assert "data-00001.arrow cannot be read (" in refusal(fit_manifest(folder))


FORGERIES = {
    "id below": (
        lists([5, -1, 6]),
        3,
        "data-00001.arrow holds the id -1, the tokenizer has the ids 0 to 499",
    ),
    "id above": (lists([5, 500, 6]), 3, "data-00001.arrow holds the id 500"),
    "id huge": (lists([5, 2**31 - 1]), 2, "data-00001.arrow holds the id 2147483647"),
    "null chunk": (lists(None), 3, "data-00001.arrow holds a chunk without input_ids (number 0)"),
    "null id": (lists([5, None, 6]), 3, "data-00001.arrow holds a chunk with an id that is null"),
    "empty chunk": (lists([]), 0, "data-00001.arrow holds a chunk without ids (number 0)"),
    "wrong length": (lists([5, 6]), 3, "data-00001.arrow says that chunk 0 has 3 ids, and it has 2"),
    "null length": (lists([5, 6]), None, "data-00001.arrow holds a chunk without num_tokens"),
    "two chunks": (lists([5], [6]), 1, "its files hold 61 chunks, its manifest says 60"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_chunks(tiny_tokenizer, tmp_path, name):
    ids, length, words = FORGERIES[name]
    columns = {
        "input_ids": ids,
        "domain": ["a"] * len(ids),
        "num_tokens": pa.array([length] * len(ids), pa.int32()),
    }
    assert words in refusal(forge(make(tmp_path / "corpus", tiny_tokenizer), columns))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_no_damage_crashes_even_under_a_fingerprint_that_fits(tiny_tokenizer, tmp_path, seed):
    """What a fuzzer would do: bits flipped in the file, and the manifest made to fit."""
    whole, rng = make(tmp_path / "whole", tiny_tokenizer), random.Random(seed)
    shard = (whole / "data-00000.arrow").read_bytes()
    for number in range(60):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        content = bytearray(shard)
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / "data-00000.arrow").write_bytes(content)
        fit_manifest(folder)
        try:
            rows = everything(folder)[0]
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(0 <= token < 500 for ids in rows for token in ids)


def test_other_columns(tiny_tokenizer, tmp_path):
    folder = forge(make(tmp_path / "corpus", tiny_tokenizer), {"x": [1]})
    assert "data-00001.arrow does not have the columns of a corpus" in refusal(folder)


# --- the tokenizer ---


def edit(path: Path, change) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False))


TOKENIZER_EDITS = {
    "tokenizer.json": [
        lambda settings: settings["model"]["vocab"].update(
            {"Ġt": 41, settings["model"]["merges"][0][0]: 300}
        ),
        lambda settings: settings["model"]["vocab"].popitem(),
        lambda settings: settings["model"]["vocab"].update(new=500),
        lambda settings: settings["added_tokens"].clear(),
    ],
    "tokenizer_config.json": [
        lambda settings: settings.update(eos_token="a"),
        lambda settings: settings.pop("eos_token"),
        lambda settings: settings.update(eos_token={"content": "a"}),
        lambda settings: settings.update(eos_token=7),
    ],
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, changes in TOKENIZER_EDITS.items() for change in changes]
)
def test_an_edited_tokenizer(tiny_tokenizer, tmp_path, name, change):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    edit(folder / "tokenizer" / name, change)
    assert f"tokenizer/{name}" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 10_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_none(tiny_tokenizer, tmp_path, name, content):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    (folder / "tokenizer" / name).write_bytes(content)
    assert name in refusal(folder)
    (folder / "tokenizer" / name).unlink()
    assert name in refusal(folder)


def test_a_tokenizer_that_makes_its_library_panic(tiny_tokenizer, tmp_path, capfd):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    edit(
        folder / "tokenizer" / "tokenizer.json",
        lambda settings: settings.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    )
    assert "tokenizer/tokenizer.json cannot be read (the tokenizers library panicked)" in refusal(folder)
    assert capfd.readouterr().err == ""


def test_json_without_layout():
    rng = random.Random(0)
    letters = '"\\ \n\t{}[]:,é🙂1a'
    for _ in range(200):
        value = {
            "".join(rng.choices(letters, k=rng.randrange(9))): [
                "".join(rng.choices(letters, k=rng.randrange(9))),
                rng.choice([1.5e-7, -3, None, True, {}, []]),
            ]
            for _ in range(4)
        }
        for layout in (dict(indent=2), dict(indent="\t"), {}):
            text = json.dumps(value, ensure_ascii=rng.random() < 0.5, **layout)
            compact = json.dumps(value, ensure_ascii=text.isascii(), separators=(",", ":"))
            assert without_layout(text) == compact or json.loads(without_layout(text)) == value
            assert not set(without_layout(json.dumps({"a": [1, {}]}, **layout))) & set(" \n\t")
    assert without_layout('{ "a b" : "c\\" d" ,\n "e": [ 1.50, 2 ] }') == '{"a b":"c\\" d","e":[1.50,2]}'


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "tokenizer/tokenizer_config.json"])
def test_no_bit_of_a_small_file_is_flipped_unseen(tiny_tokenizer, tmp_path, name):
    """All that is said, not only what is used here."""
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    path = folder / name
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert name in refusal(folder)
    path.write_bytes(content)
    Corpus(folder)


def test_damaged_is_a_users_error_with_a_reason(tiny_tokenizer, tmp_path):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    (folder / "state.json").write_text("{}")
    with pytest.raises(Damaged) as caught:
        Corpus(folder)
    assert caught.value.reason == "state.json is missing or not as written"
    (folder / "state.json").unlink()
    assert "state.json is missing" in refusal(folder)


@pytest.mark.parametrize(
    "key, value", [("rows", 59), ("tokens", 1), ("vocab_size", 400), ("eos_token_id", 3)]
)
def test_a_manifest_that_says_something_else(tiny_tokenizer, tmp_path, key, value):
    folder = make(tmp_path / "corpus", tiny_tokenizer)
    whole = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", {**whole, key: value})
    assert f"{folder / 'manifest.json'} is not as written: restore it, or run" in refusal(folder)
    write_json(folder / "manifest.json", whole)
    forget_checksums(folder, **{key: value})
    assert f"corpus {folder} is damaged" in refusal(folder)
