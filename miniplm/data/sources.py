"""Text sources → blocks of records.

A source is a file, a folder of files, or a Hugging Face dataset. Its records come in blocks of about
BLOCK_BYTES, in order; each block knows the position after it, and reading on from there gives the same blocks
as reading from the start: a stopped run can continue. What is in a record is only found out by read_record,
in the process that gets the block.
"""

import codecs
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import UserError
from ..runtime.files import fingerprint

BLOCK_BYTES = 1 << 18
BLOCK_RECORDS = 4096
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
START = (0, 0, 0)


@dataclass(frozen=True)
class Block:
    """Consecutive records of one file or dataset.

    records: lines of a .jsonl (bytes), else dicts with the values of the wanted columns, as far as there are
    such columns; columns: the names of all columns there are (None for lines: each has its own); name,
    separator, first: say where a record is (`where`); next: the position after the block; size: bytes of the
    source that it stands for.
    """

    records: list
    columns: list | None
    name: str
    separator: str
    first: int
    next: tuple[int, int, int]
    size: int

    def where(self, index: int) -> str:
        """Where records[index] is, for messages: file and line (or row), counted from 1."""
        return f"{self.name}{self.separator}{self.first + index}"


def open_source(data: str, columns: list[str], subset: str | None = None, split: str = "train"):
    """The source `data`: an existing file or folder, else the id of a Hugging Face dataset.

    Args:
        columns: the wanted columns, the text's first.
        subset, split: of a Hugging Face dataset.

    Returns:
        An object with `name` (base name or id), `identity` (JSON-able, differs when the source does), `size`
        (bytes, None if unknown) and `blocks(position)`, which yields the Blocks from `position` on (START:
        all).

    Raises:
        UserError: nothing there, or nothing usable; while reading: a file or dataset that cannot be read.
    """
    path = Path(data).expanduser()
    if path.exists():
        return Files(path, columns)
    if data.endswith(SUFFIXES) or path.is_absolute() or data.startswith((".", "~")) or len(path.parts) > 2:
        raise UserError(
            f"data {data} does not exist: give a file, a folder or the id of a Hugging Face dataset"
        )
    return HubDataset(data, columns, subset, split)


def read_record(record, columns, text_column: str, domain_column: str | None) -> tuple[str, str]:
    """The text and the domain ("default" without a domain column) of a record of a Block that has these
    columns.

    Raises:
        ValueError: the reason why it is a bad record.
    """
    if isinstance(record, bytes):
        record = _parse(record)
    text = _column(record, text_column, columns)
    if not isinstance(text, str):
        raise ValueError(f"column {text_column!r} is {_kind(text)}, not text")
    if domain_column is None:
        return text, "default"
    domain = _column(record, domain_column, columns)
    if not isinstance(domain, (str, int)) or isinstance(domain, bool):
        raise ValueError(f"column {domain_column!r} is {_kind(domain)}, not the name of a domain")
    return text, str(domain)


def _parse(line: bytes) -> dict:
    try:
        record = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON value {_kind(record)}, not an object")
    return record


def _column(record: dict, name: str, columns):
    if name not in record:
        found = ", ".join(map(repr, record if columns is None else columns))[:300] or "none"
        raise ValueError(f"no column {name!r} (there are: {found})")
    value = record[name]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"column {name!r} holds half of a surrogate pair: not valid Unicode") from None
    return _decode(value) if isinstance(value, bytes) else value


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{content[error.start]:02x} at {error.start:,})") from None


def _kind(value) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


class Files:
    """A file, or all files below a folder in the order of their relative names; hidden ones are left out.

    A position is (index of the file, bytes of its uncompressed content, records) before the next record.
    """

    def __init__(self, path: Path, columns: list[str]):
        self.columns = columns
        self.name = os.path.basename(os.path.abspath(path))
        if path.is_file():
            if not _usable(path):
                raise UserError(
                    f"data {path} is of no known type: give {', '.join(SUFFIXES)}, or a folder of those"
                )
            names = {path.name: path}
        else:
            names = {found.relative_to(path).as_posix(): found for found in path.rglob("*") if _usable(found)}
            names = {
                name: names[name]
                for name in sorted(names)
                if not any(part.startswith(".") for part in Path(name).parts)
            }
            if not names:
                raise UserError(
                    f"data folder {path} holds no file that can be read: give {', '.join(SUFFIXES)}"
                )
        self.paths = list(names.values())
        try:
            files = [[name, found.stat().st_size, _hash_ends(found)] for name, found in names.items()]
        except OSError as error:
            raise UserError(f"data cannot be read: {error}") from error
        self.size = sum(size for _, size, _ in files)
        self.identity = {"files": len(files), "bytes": self.size, "fingerprint": fingerprint(files)}

    def blocks(self, position=START):
        import pyarrow

        start, offset, number = position
        for index, path in enumerate(self.paths):
            if index < start:
                continue
            read = {".parquet": _read_rows, ".txt": _read_text}.get(path.suffix, _read_lines)
            separator = ", row " if read is _read_rows else ":"
            try:
                for records, columns, done, size in read(path, self.columns, offset, number):
                    first, number = number + 1, number + len(records)
                    yield Block(records, columns, str(path), separator, first, (index, done, number), size)
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(
                    f"{path} cannot be read ({' '.join(str(error).split())}): restore it or leave it out"
                ) from error
            offset = number = 0


class HubDataset:
    """One split of a Hugging Face dataset, streamed. A position is (0, 0, records)."""

    size = None

    def __init__(self, name: str, columns: list[str], subset: str | None, split: str):
        self.name, self.columns, self.subset, self.split = name, columns, subset, split
        self.identity = {"dataset": name, "subset": subset, "split": split}

    def blocks(self, position=START):
        number = position[2]
        try:
            import datasets

            rows = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
            names: list[str] = []
            for records, size in _group(self._wanted(rows.skip(number), names)):
                first, number = number + 1, number + len(records)
                yield Block(records, names, self.name, ", record ", first, (0, 0, number), size)
        except Exception as error:  # datasets and the network raise many kinds
            raise UserError(
                f"dataset {self.name} cannot be read ({' '.join(str(error).split())[:300]}): give an "
                f"existing file or folder, or an id, "
                "--subset and --split that exist, and see that the Hub can be reached"
            ) from error

    def _wanted(self, rows, names: list[str]):
        for row in rows:
            names[:] = row
            yield {name: row[name] for name in self.columns if name in row}


def _usable(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.is_file()


def _hash_ends(path: Path) -> str:
    """A hash of the first and the last 64 KiB: with the size, enough to notice another file without reading
    100 GB."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
        digest.update(file.read())
    return digest.hexdigest()[:16]


# Each reader takes (path, wanted columns, uncompressed bytes and records to skip) and yields
# (records, names of the columns, uncompressed bytes read so far, bytes of the file that the records stand
# for).


def _read_lines(path: Path, wanted, offset: int, number: int):
    import pyarrow

    with open(path, "rb") as raw:
        file = raw
        if (
            path.suffix != ".jsonl"
        ):  # Arrow reads on across members, and reports a truncated file, which zstandard does not
            file = io.BufferedReader(
                pyarrow.CompressedInputStream(raw, {".gz": "gzip", ".zst": "zstd"}[path.suffix]), BLOCK_BYTES
            )
            for start in range(0, offset, BLOCK_BYTES):
                file.read(min(BLOCK_BYTES, offset - start))
        else:
            file.seek(offset)
        before = raw.tell()
        while lines := file.readlines(BLOCK_BYTES):
            offset += sum(map(len, lines))
            if number == 0:
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
            number += len(lines)
            yield lines, None, offset, raw.tell() - before
            before = raw.tell()


def _read_text(path: Path, wanted, offset: int, number: int):
    if number == 0:
        content = path.read_bytes()
        yield [{wanted[0]: content.removeprefix(codecs.BOM_UTF8)}], wanted[:1], len(content), len(content)


def _read_rows(path: Path, wanted, offset: int, number: int):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
        rows = _rows(file, [name for name in wanted if name in names], number)
        for records, _ in _group(rows):
            yield records, names, 0, round(bytes_per_row * len(records))


def _rows(file, columns: list[str], skip: int):
    """The rows from `skip` on as dicts; row groups before it are not read."""
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if skip >= count:
            skip -= count
            continue
        for batch in file.iter_batches(256, [group], columns):
            values = [_values(batch.column(name)) for name in columns]
            for row in range(skip, batch.num_rows):
                yield {name: column[row] for name, column in zip(columns, values, strict=True)}
            skip = max(0, skip - batch.num_rows)


def _values(column) -> list:
    """The values of an Arrow array; text as bytes, for Arrow does not say which row is not UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _group(records):
    """Lists of records with about BLOCK_BYTES of text, and that number of bytes."""
    group, size = [], 0
    for record in records:
        group.append(record)
        size += sum(len(value) for value in record.values() if isinstance(value, (str, bytes)))
        if size >= BLOCK_BYTES or len(group) == BLOCK_RECORDS:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size
