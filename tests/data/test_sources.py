"""Sources: every format, reading on from every position, and everything that can be wrong with a file."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from miniplm.data import readers
from miniplm.data.records import read_record
from miniplm.data.sources import START, open_source
from miniplm.runtime.errors import UserError

ROWS = [
    {
        "text": f"Text {number}: é漢🙂\r\n" + "word " * (number % 7),
        "domain": "ab"[number % 2],
        "other": number,
    }
    for number in range(60)
]
LINES = [json.dumps(row, ensure_ascii=number % 2 == 0).encode() + b"\n" for number, row in enumerate(ROWS)]


def write(path, rows=ROWS, lines=LINES):
    """The rows in the format that the name says."""
    content = b"".join(lines)
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=25)
    elif path.name.endswith(".gz"):  # of two members, as concatenated files are
        path.write_bytes(gzip.compress(content[:999]) + gzip.compress(content[999:]))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(content[:999]) + zstandard.compress(content[999:]))
    else:
        path.write_bytes(content)
    return str(path)


def read(source, position=START, columns=("text", "domain")):
    """[(text, domain, where), …] and the blocks."""
    blocks = list(source.blocks(position))
    rows = [
        (*read_record(record, block.columns, *columns), block.where(index))
        for block in blocks
        for index, record in enumerate(block.records)
    ]
    return rows, blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 300)
    monkeypatch.setattr(readers, "BLOCK_RECORDS", 7)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_formats_and_reading_on_from_every_block(tmp_path, name):
    path = write(tmp_path / name)
    source = open_source(path, ["text", "domain"])
    rows, blocks = read(source)
    separator = ", row " if name == "a.parquet" else ":"
    assert rows == [
        (row["text"], row["domain"], f"{path}{separator}{number}") for number, row in enumerate(ROWS, 1)
    ]
    assert len(blocks) > 5 and source.name == name and source.size == os.path.getsize(path)
    assert abs(sum(block.size for block in blocks) - source.size) <= len(
        blocks
    )  # for the progress bar; rows of a parquet file share its size evenly
    for number, block in enumerate(blocks):
        assert list(source.blocks(json.loads(json.dumps(block.next)))) == blocks[number + 1 :]


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf one\r\n\r\ntwo\rthree\n")
    source = open_source(str(path), ["body"])
    rows, [block] = read(source, columns=("body", None))
    assert (
        rows == [(" one\r\n\r\ntwo\rthree\n", "default", f"{path}:1")]
        and list(source.blocks(block.next)) == []
    )


def test_a_folder_of_everything(tmp_path):
    for name in (
        "b.parquet",
        "a/z.jsonl.gz",
        "a/b/c.jsonl",
        "c.txt",
        ".hidden.jsonl",
        ".cache/x.jsonl",
        "a/.y/z.jsonl",
        "README.md",
        "a/data.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        write(tmp_path / name)
    (tmp_path / "d.jsonl").mkdir()
    source = open_source(str(tmp_path) + "/", ["text", "domain"])
    blocks = list(source.blocks())
    names = ["a/b/c.jsonl", "a/z.jsonl.gz", "b.parquet", "c.txt"]
    assert list(dict.fromkeys(block.name for block in blocks)) == [str(tmp_path / name) for name in names]
    assert source.name == tmp_path.name and source.identity["files"] == 4
    assert sum(len(block.records) for block in blocks) == 3 * 60 + 1
    for number in range(0, len(blocks), 5):
        assert list(source.blocks(blocks[number].next)) == blocks[number + 1 :]


def test_identity_changes_with_the_source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 300_000)
    identity = open_source(str(path), ["text"]).identity
    assert open_source(str(path), ["other"]).identity == identity
    for content in (b"y" + b"x" * 299_999, b"x" * 299_999 + b"y", b"x" * 300_001, b""):
        path.write_bytes(content)
        assert open_source(str(path), ["text"]).identity != identity
    path.write_bytes(b"x" * 300_000)
    assert open_source(str(path), ["text"]).identity == identity
    os.rename(path, tmp_path / "b.jsonl")
    assert open_source(str(tmp_path / "b.jsonl"), ["text"]).identity != identity


def test_a_byte_order_mark_and_windows_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", lines=[b"\xef\xbb\xbf" + LINES[0].replace(b"\n", b"\r\n"), *LINES[1:]])
    assert [text for text, *_ in read(open_source(path, ["text"]))[0]] == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()], ids=str
)
def test_parquet_types_of_text(tmp_path, kind):
    texts = ["a", "é", "a", ""]
    column = (
        pa.array([text.encode() for text in texts], kind)
        if kind == pa.binary()
        else pa.array(texts).cast(kind)
    )
    pyarrow.parquet.write_table(pa.table({"text": column, "domain": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    rows, _ = read(open_source(str(tmp_path / "a.parquet"), ["text", "domain"]))
    assert [row[:2] for row in rows] == [("a", "1"), ("é", "2"), ("a", "3"), ("", "4")]


def test_reading_on_within_a_large_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pa.table({"text": [str(number) for number in range(2_000)]}), path, row_group_size=900
    )
    source = open_source(str(path), ["text"])
    for number in (255, 256, 257, 600, 899, 900, 1_500, 2_000):
        rows, _ = read(source, (0, 0, number), columns=("text", None))
        assert rows == [(str(row), "default", f"{path}, row {row + 1}") for row in range(number, 2_000)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_long_texts_in_a_row_group_of_short_ones_are_not_in_memory_at_once(tmp_path):
    texts = ["b"] * 100_000 + ["a" * (1 << 20)] * 512
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, use_dictionary=False, write_batch_size=8)
    code = (
        "import sys; from miniplm.data.sources import open_source\n"
        "for block in open_source(sys.argv[1], ['text']).blocks():\n"
        "    rows = block.first + len(block.records) - 1\n"
        "peak = [int(line.split()[1]) >> 10 for line in open('/proc/self/status') if 'VmHWM' in line]\n"
        "print(rows, *peak)"
    )
    found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    rows, peak = map(int, found.stdout.split())
    assert rows == len(texts) and peak < 500  # MiB, of which Python and Arrow take some 130


def test_bad_rows_of_a_parquet_file(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff", None], pa.binary()).buffers())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": text, "number": [1.5, 2.5, None]}), path)

    def reasons(*columns):
        for block in open_source(str(path), [column for column in columns if column]).blocks():
            for index, record in enumerate(block.records):
                try:
                    read_record(record, block.columns, *columns)
                except ValueError as error:
                    yield f"{block.where(index)}: {error}"

    assert list(reasons("text", None)) == [
        f"{path}, row 2: not UTF-8 (byte 0xff at 0)",
        f"{path}, row 3: column 'text' is null, not text",
    ]
    assert next(reasons("number", None)) == f"{path}, row 1: column 'number' is of type float, not text"
    assert list(reasons("body", "kind")) == [
        f"{path}, row {row}: no column 'body' (there are: 'text', 'number')" for row in (1, 2, 3)
    ]


def test_an_empty_parquet_file(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert list(open_source(str(tmp_path / "a.parquet"), ["text"]).blocks()) == []


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:-3],
        lambda b: b"no such format " * 9,
        lambda b: b + b"rubbish",
        lambda b: b[: len(b) // 2] + bytes(40) + b[len(b) // 2 + 40 :],
    ],
    ids=["half", "tail", "all", "more", "middle"],
)
def test_damaged_files(tmp_path, name, damage):
    path = tmp_path / name
    write(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"^{path} cannot be read .*: restore it or leave it out$") as caught:
        for block in open_source(str(path), ["text", "domain"]).blocks():
            for record in block.records:
                read_record(record, block.columns, "text", "domain")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize(
    "change",
    [
        lambda path, content: os.truncate(path, len(content) // 2),
        lambda path, content: path.write_bytes(content + content),
        lambda path, content: path.write_bytes(bytes(len(content))),
        lambda path, content: os.replace(shutil.copy(path, f"{path}.new"), path),
    ],
    ids=["cut", "grown", "rewritten", "replaced"],
)
def test_a_file_that_changes_while_it_is_read(tmp_path, name, change):
    path = tmp_path / name
    write(path)
    os.utime(path, ns=(0, 0))  # that a change within the clock's tick is seen
    content = path.read_bytes()
    blocks = open_source(str(path), ["text", "domain"]).blocks()
    next(blocks)
    change(path, content)
    with pytest.raises(
        UserError, match=r"was changed while it was read: run the same command again|cannot be"
    ):
        list(blocks)


def test_a_file_that_goes_away(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl")
    source = open_source(str(tmp_path), ["text"])
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"b\.jsonl cannot be read .*No such file"):
        list(source.blocks())


@pytest.mark.parametrize(
    "name", ["nothing.jsonl", "./nothing", "/nothing", "~/nothing", "a/b/c", "a/b.parquet"]
)
def test_missing(name):
    with pytest.raises(
        UserError, match="does not exist: give a file, a folder or the id of a Hugging Face dataset"
    ):
        open_source(name, ["text"])


def test_nothing_usable(tmp_path):
    (tmp_path / "data.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"is of an unknown type: give \.jsonl"):
        open_source(str(tmp_path / "data.csv"), ["text"])
    with pytest.raises(UserError, match=r"can be read \(data\.csv \(of no known type\)\): give \.jsonl"):
        open_source(str(tmp_path), ["text"])
    (tmp_path / "data.csv").unlink()
    with pytest.raises(UserError, match=r"holds no file that can be read: give \.jsonl"):
        open_source(str(tmp_path), ["text"])


def test_hub_dataset(monkeypatch):
    import datasets

    def load_dataset(name, subset, split, streaming):
        assert (name, subset, split, streaming) == ("someone/texts", "en", "test", True)
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("someone/texts", ["text", "domain"], "en", "test")
    assert (
        source.identity == {"dataset": "someone/texts", "subset": "en", "split": "test"}
        and source.name == "someone/texts"
        and source.size is None
    )
    rows, blocks = read(source)
    assert (
        rows
        == [
            (row["text"], row["domain"], f"someone/texts, record {number}")
            for number, row in enumerate(ROWS, 1)
        ]
        and len(blocks) > 5
    )
    for number, block in enumerate(blocks):
        assert list(source.blocks(block.next)) == blocks[number + 1 :]
    with pytest.raises(ValueError, match=r"no column 'body' .there are: 'text', 'domain', 'other'"):
        read(open_source("someone/texts", ["body"], "en", "test"), columns=("body", None))


def test_hub_dataset_that_fails(monkeypatch):
    with pytest.raises(UserError, match=r"^dataset nobody/no-such-dataset cannot be read") as caught:
        list(open_source("nobody/no-such-dataset", ["text"]).blocks())  # the tests run offline
    assert "\n" not in str(caught.value)
    import datasets

    def broken():
        yield ROWS[0]
        raise ConnectionError("the line\nbroke")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(broken)
    )
    with pytest.raises(UserError, match=r"cannot be read \(the network cannot be reached\)"):
        list(open_source("someone/texts", ["text"]).blocks())
