"""What is in a record: a text and the name of its domain, or the reason why it is a bad one.

This runs in worker processes; it imports next to nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_TEXT_BYTES = 1 << 24  # of a document in UTF-8; to encode one takes up to 220 times as much memory
MAX_LINE_BYTES = 2 * MAX_TEXT_BYTES  # of a .jsonl: JSON may spell a letter with twice its bytes
MAX_NAMES_SHOWN = 300  # characters


@dataclass(frozen=True)
class Oversized:
    """Stands for a line or a value that is too long to be read. size, limit: in bytes."""

    what: str
    size: int
    limit: int

    def __str__(self) -> str:
        return f"{self.what} of {self.size:,} bytes, more than {self.limit:,}: cut it into several documents"


# A line of a .jsonl, or the values of the wanted columns.
Record = bytes | Oversized | dict[str, Any]


def read_record(
    record: Record, columns: Iterable[str] | None, text_column: str, domain_column: str | None
) -> tuple[str, str]:
    """The text and the domain ("default" without a domain column) of a record of a Block that has these
    columns.

    Raises:
        ValueError: the reason why it is a bad record.
    """
    if isinstance(record, Oversized):
        raise ValueError(str(record))
    values = _parse(record) if isinstance(record, bytes) else record
    text = _column(values, text_column, columns)
    if not isinstance(text, str):
        raise ValueError(f"column {text_column!r} is {_kind(text)}, not text")
    if domain_column is None:
        return text, "default"
    domain = _column(values, domain_column, columns)
    if not isinstance(domain, (str, int)) or isinstance(domain, bool):
        raise ValueError(f"column {domain_column!r} is {_kind(domain)}, not the name of a domain")
    return text, str(domain)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (column {error.colno:,})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON value {_kind(record)}, not an object")
    return record


def _column(record: dict[str, Any], name: str, columns: Iterable[str] | None) -> Any:
    """The value of a column, text as str."""
    if name not in record:
        found = ", ".join(map(repr, record if columns is None else columns))[:MAX_NAMES_SHOWN] or "none"
        raise ValueError(f"no column {name!r} (there are: {found})")
    value = record[name]
    if isinstance(value, Oversized):
        raise ValueError(f"column {name!r} holds {value}")
    if isinstance(value, bytes):
        value = _decode(value)
    if isinstance(value, str):
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise ValueError(f"column {name!r} holds half of a surrogate pair: not valid Unicode") from None
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"column {name!r} holds {Oversized('a text', size, MAX_TEXT_BYTES)}")
    return value


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{content[error.start]:02x} at {error.start:,})") from None


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
