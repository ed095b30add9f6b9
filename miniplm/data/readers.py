"""Text files → groups of records, for each format.

Each reader takes (path, wanted columns, uncompressed bytes and records to skip) and yields (records, names of
the columns, uncompressed bytes read so far, bytes of the file that the records stand for). No line and no
value takes more than a bounded amount of memory: one that is too long comes as an Oversized.
"""

import codecs
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .records import MAX_LINE_BYTES, MAX_TEXT_BYTES, Oversized, Record

BLOCK_BYTES = 1 << 18
BLOCK_RECORDS = 4096
ROWS_PER_BATCH = 32  # of a parquet file, at most: so many of the longest texts are in memory at once
BATCH_BYTES = 1 << 26  # of them, about

Groups = Iterator[tuple[list[Record], Sequence[str] | None, int, int]]
Reader = Callable[[Path, Sequence[str], int, int], Groups]


def reader_of(path: Path) -> Reader:
    """The reader for a file of this name."""
    return {".parquet": read_rows, ".txt": read_text}.get(path.suffix, read_lines)


# ---- .jsonl ----


def read_lines(path: Path, wanted: Sequence[str], offset: int, number: int) -> Groups:
    """Lines of a .jsonl, .jsonl.gz or .jsonl.zst as they stand, in groups of BLOCK_BYTES."""
    with open(path, "rb") as raw:
        file: BinaryIO = raw
        if path.suffix == ".jsonl":
            file.seek(offset)
        else:
            file = _uncompressed(raw, path.suffix)
            for start in range(0, offset, BLOCK_BYTES):
                file.read(min(BLOCK_BYTES, offset - start))
        before = raw.tell()
        while group := _some_lines(file):
            lines, size = group
            offset += size
            if number == 0 and isinstance(lines[0], bytes):
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
            number += len(lines)
            yield lines, None, offset, raw.tell() - before
            before = raw.tell()


def _uncompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    import pyarrow

    # Arrow reads on across members, and reports a truncated file, which zstandard does not.
    stream = pyarrow.CompressedInputStream(raw, {".gz": "gzip", ".zst": "zstd"}[suffix])
    return io.BufferedReader(stream, BLOCK_BYTES)


def _some_lines(file: BinaryIO) -> tuple[list[Record], int] | None:
    """The lines that file.readlines(BLOCK_BYTES) gives, and their size in bytes; None at the end."""
    lines: list[Record] = []
    total = counted = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        size = len(line)
        if size > MAX_LINE_BYTES and not line.endswith(b"\n"):
            size += _skip_line(file)
            lines.append(Oversized("a line", size, MAX_LINE_BYTES))
        else:
            lines.append(line)
        total += size
        if size > BLOCK_BYTES - counted:
            break
        counted += size
    return (lines, total) if lines else None


def _skip_line(file: BinaryIO) -> int:
    """Read on to the end of a line; the bytes that were read."""
    size = 0
    while part := file.readline(BLOCK_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


# ---- .txt ----


def read_text(path: Path, wanted: Sequence[str], offset: int, number: int) -> Groups:
    """A text file: one document."""
    if number:
        return
    size = path.stat().st_size
    value: bytes | Oversized = Oversized("a text", size, MAX_TEXT_BYTES)
    if size <= MAX_TEXT_BYTES + len(codecs.BOM_UTF8):
        value = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    yield [{wanted[0]: value}], wanted[:1], size, size


# ---- .parquet ----


def read_rows(path: Path, wanted: Sequence[str], offset: int, number: int) -> Groups:
    """Rows of a parquet file, in groups of about BLOCK_BYTES."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
        rows = _rows(file, [name for name in wanted if name in names], number)
        for records, _ in grouped(rows):
            yield records, names, 0, round(bytes_per_row * len(records))


def _rows(file: Any, columns: list[str], skip: int) -> Iterator[dict[str, Any]]:
    """The rows from `skip` on as dicts; row groups before it are not read."""
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        if skip >= about.num_rows:
            skip -= about.num_rows
            continue
        bytes_per_row = about.total_byte_size / max(about.num_rows, 1)
        batch_rows = int(min(ROWS_PER_BATCH, max(1, BATCH_BYTES / max(bytes_per_row, 1))))
        for batch in file.iter_batches(batch_rows, [group], columns):
            # Many long texts among short ones are not all copied at once.
            step = ROWS_PER_BATCH if batch.nbytes <= BATCH_BYTES else 1
            for start in range(skip, batch.num_rows, step):
                part = batch.slice(start, step)
                values = [_values(part.column(name)) for name in columns]
                for row in range(part.num_rows):
                    yield {name: column[row] for name, column in zip(columns, values, strict=True)}
            skip = max(0, skip - batch.num_rows)


def _values(column: Any) -> list[Any]:
    """The values of an Arrow array; text as bytes, for Arrow does not say which row is not UTF-8."""
    import pyarrow
    import pyarrow.compute

    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    if not (types.is_binary(column.type) or types.is_large_binary(column.type)):
        return column.to_pylist()
    sizes = pyarrow.compute.fill_null(pyarrow.compute.binary_length(column), 0).to_numpy()
    if not len(sizes) or sizes.max() <= MAX_TEXT_BYTES:
        return column.to_pylist()
    return [
        Oversized("a text", int(size), MAX_TEXT_BYTES) if size > MAX_TEXT_BYTES else column[row].as_py()
        for row, size in enumerate(sizes)
    ]


def grouped(records: Iterable[dict[str, Any]]) -> Iterator[tuple[list[Record], int]]:
    """Lists of records with about BLOCK_BYTES of text, and that number of bytes."""
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += sum(len(value) for value in record.values() if isinstance(value, (str, bytes)))
        if size >= BLOCK_BYTES or len(group) == BLOCK_RECORDS:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size
