"""Text sources → blocks of records.

A source is a file, a folder of files, or a Hugging Face dataset. Its records come in blocks of about
BLOCK_BYTES (data/readers.py), in order; each block knows the position after it, and reading on from there
gives the same blocks as reading from the start: a stopped run can continue. What is in a record is only found
out by read_record (data/records.py), in the process that gets the block.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..runtime.errors import UserError, reason
from ..runtime.files import fingerprint
from .readers import grouped, read_rows, reader_of
from .records import Record

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
ENDS_BYTES = 1 << 16  # at either end of a file, by which it is known again

Position = tuple[int, int, int]
START: Position = (0, 0, 0)


@dataclass(frozen=True)
class Block:
    """Consecutive records of one file or dataset.

    records: lines of a .jsonl (bytes), else dicts with the values of the wanted columns, as far as there are
    such columns; columns: the names of all columns there are (None for lines: each has its own); name,
    separator, first: say where a record is (`where`); next: the position after the block; size: bytes of the
    source that it stands for.
    """

    records: list[Record]
    columns: Sequence[str] | None
    name: str
    separator: str
    first: int
    next: Position
    size: int

    def where(self, index: int) -> str:
        """Where records[index] is, for messages: file and line (or row), counted from 1."""
        return f"{self.name}{self.separator}{self.first + index}"


class Source(Protocol):
    """Where records come from.

    name: base name or id; identity: JSON-able, differs when the source does; size: bytes, None if unknown;
    left_out: files of a folder that are not read, and why; state: JSON-able, differs when a file was touched,
    None if unknown; changed_ns: when a file was last changed, since the epoch.
    """

    name: str
    identity: dict[str, Any]
    size: int | None
    left_out: list[str]
    state: str | None
    changed_ns: int

    def blocks(self, position: Position = START) -> Iterator[Block]:
        """The Blocks from `position` on (START: all)."""


def open_source(data: str, columns: list[str], subset: str | None = None, split: str = "train") -> Source:
    """The source `data`: an existing file or folder, else the id of a Hugging Face dataset.

    Args:
        columns: the wanted columns, the text's first.
        subset, split: of a Hugging Face dataset.

    Raises:
        UserError: nothing there, or nothing usable; while reading: a file or dataset that cannot be read, or
            that changes.
    """
    path = Path(data).expanduser()
    if path.exists():
        return Files(path, columns)
    if data.endswith(SUFFIXES) or path.is_absolute() or data.startswith((".", "~")) or len(path.parts) > 2:
        raise UserError(
            f"data {data} does not exist: give a file, a folder or the id of a Hugging Face dataset"
        )
    return HubDataset(data, columns, subset, split)


class Files:
    """A file, or all files below a folder in the order of their relative names; hidden ones are left out, and
    linked folders are not entered.

    A position is (index of the file, bytes of its uncompressed content, records) before the next record.
    """

    def __init__(self, path: Path, columns: list[str]):
        self.columns = columns
        self.name = _unicode(os.path.basename(os.path.abspath(path)))
        names, self.left_out = _usable_files(path)
        self.paths = list(names.values())
        try:
            self._found = [_state(found) for found in self.paths]
            files = [(name, found.stat().st_size, _hash_ends(found)) for name, found in names.items()]
        except OSError as error:
            raise UserError(
                f"{error.filename or path} cannot be read ({reason(error)}): restore it or leave it out"
            ) from error
        self.size: int | None = sum(size for _, size, _ in files)
        self.identity = {"files": len(files), "bytes": self.size, "fingerprint": fingerprint(files)}
        self.state: str | None = fingerprint(self._found)
        self.changed_ns = max(changed for _, _, changed in self._found)

    def blocks(self, position: Position = START) -> Iterator[Block]:
        import pyarrow

        start, offset, number = position
        for index, path in enumerate(self.paths):
            if index < start:
                continue
            read = reader_of(path)
            separator = ", row " if read is read_rows else ":"
            try:
                self._check_unchanged(index)
                for records, columns, done, size in read(path, self.columns, offset, number):
                    first, number = number + 1, number + len(records)
                    self._check_unchanged(index)
                    yield Block(records, columns, str(path), separator, first, (index, done, number), size)
                self._check_unchanged(index)  # cut, it would only have ended sooner
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(
                    f"{path} cannot be read ({reason(error)}): restore it or leave it out"
                ) from error
            offset = number = 0

    def _check_unchanged(self, index: int) -> None:
        if _state(self.paths[index]) != self._found[index]:
            raise UserError(
                f"{self.paths[index]} was changed while it was read: run the same command again when nobody "
                f"writes to it"
            )


class HubDataset:
    """One split of a Hugging Face dataset, streamed. A position is (0, 0, records)."""

    size: int | None = None
    state: str | None = None
    changed_ns = 0

    def __init__(self, name: str, columns: list[str], subset: str | None, split: str):
        self.name, self.columns, self.subset, self.split = name, columns, subset, split
        self.identity = {"dataset": name, "subset": subset, "split": split}
        self.left_out: list[str] = []

    def blocks(self, position: Position = START) -> Iterator[Block]:
        number = position[2]
        try:
            import datasets

            rows = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
            names: list[str] = []
            for records, size in grouped(self._wanted(rows.skip(number), names)):
                first, number = number + 1, number + len(records)
                yield Block(records, names, self.name, ", record ", first, (0, 0, number), size)
        except Exception as error:  # datasets and the network raise many kinds
            raise UserError(
                f"dataset {self.name} cannot be read ({reason(error)}): give an "
                f"existing file or folder, or an id, "
                "--subset and --split that exist, and see that the Hub can be reached"
            ) from error

    def _wanted(self, rows: Any, names: list[str]) -> Iterator[dict[str, Any]]:
        for row in rows:
            names[:] = row
            yield {name: row[name] for name in self.columns if name in row}


# ---- files ----


def _usable_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    """(the files to read by their names in `path`, in order; those left out, and why)."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(
                f"data {path} is of an unknown type: give {', '.join(SUFFIXES)}, or a folder of those"
            )
        return {path.name: path}, []
    if not path.is_dir():
        raise UserError(
            f"data {path} is neither a file nor a folder: give {', '.join(SUFFIXES)}, or a folder"
        )
    names, left_out = {}, []
    for found in _visible(path):
        name = found.relative_to(path).as_posix()
        if reason := _why_left_out(found):
            left_out.append(f"{name} ({reason})")
        else:
            names[name] = found
    if not names:
        there = f" ({', '.join(sorted(left_out)[:3])})" if left_out else ""
        raise UserError(
            f"data folder {path} holds no file that can be read{there}: give {', '.join(SUFFIXES)}"
        )
    return {name: names[name] for name in sorted(names)}, sorted(left_out)


def _visible(folder: Path) -> Iterator[Path]:
    """All below a folder that is not hidden, but for folders that are gone into."""

    def refuse(error: OSError) -> None:
        raise UserError(f"data folder {error.filename} cannot be read ({error.strerror}): get the right to")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        yield from (Path(root, name) for name in (*files, *links) if not name.startswith("."))


def _why_left_out(path: Path) -> str | None:
    if path.is_dir():
        return "a linked folder"
    if not path.exists():
        return "a link to nothing"
    if not path.is_file():
        return "no regular file"
    return None if path.name.endswith(SUFFIXES) else "of no known type"


def _unicode(name: str) -> str:
    """The name of a file as Unicode: bytes of it that are no UTF-8 are written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _state(path: Path) -> tuple[int, int, int]:
    """What differs once a file has been written to: inode, size, time of change in ns."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _hash_ends(path: Path) -> str:
    """A hash of both ends: with the size, enough to notice another file without reading 100 GB."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(ENDS_BYTES))
        file.seek(max(0, os.fstat(file.fileno()).st_size - ENDS_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]
