"""The header of a GGUF file, walked through before a library reads it: what it counts and measures must lie
within the file. Nothing is allocated by a number in it.

"GGUF", version, number of tensors, number of settings; the settings (key, type, value); the tensors (name,
dimensions, type, offset); at the next multiple of the alignment the data. Texts have their length before
them, all numbers are little-endian (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import mmap
import os
import struct
from typing import Any, NamedTuple

from .errors import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_KEY = 2**16 - 1  # bytes of a name
MAX_DIMENSIONS = 4
MAX_SETTINGS, MAX_TENSORS, MAX_TEXTS = 2**16, 2**20, 2**24  # well above any; they bound the time
MAX_READ = 2**12  # numbers of a list; of a longer one nothing is needed
DEFAULT_ALIGNMENT = 32


class GgufHeader(NamedTuple):
    """settings: the numbers, by key; of a list of numbers the largest. elements: of all tensors."""

    settings: dict[str, Any]
    elements: int


class _Fault(Exception):
    """What is wrong with the file, in words."""


class _Reader:
    def __init__(self, content: mmap.mmap):
        self.content, self.place = content, 0

    def skip(self, size: int, what: str) -> int:
        """Go past so many bytes, and give the place of the first."""
        start = self.place
        if size > len(self.content) - start:
            raise _Fault(f"{what} goes past its end")
        self.place += size
        return start

    def numbers(self, code: str, what: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        return struct.unpack_from(f"<{count}{code}", self.content, self.skip(size, what))

    def text(self, what: str, longest: int | None = None) -> bytes:
        (length,) = self.numbers("Q", what)
        if longest is not None and length > longest:
            raise _Fault(f"{what} is {length:,} bytes long")
        start = self.skip(length, what)
        return self.content[start : self.place] if longest is not None else b""

    def name(self, what: str) -> str:
        try:
            return self.text(what, MAX_KEY).decode()
        except UnicodeDecodeError:
            raise _Fault(f"{what} is no UTF-8") from None


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        UserError: the file is not whole, or is none.
    """
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise _Fault("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _walk(_Reader(content))
    except _Fault as fault:
        raise UserError(f"{path} is not a whole GGUF file ({fault}): copy or download it again") from None


def _walk(reader: _Reader) -> GgufHeader:
    if reader.content[:4] != b"GGUF":
        raise _Fault("it does not begin with GGUF")
    reader.skip(4, "its beginning")
    (version,) = reader.numbers("I", "its version")
    if version not in (2, 3):
        raise _Fault(f"its version is {version}, not 2 or 3")
    tensors, settings = reader.numbers("Q", "its beginning", 2)
    if settings > MAX_SETTINGS or tensors > MAX_TENSORS:
        raise _Fault(f"it counts {settings:,} settings and {tensors:,} tensors")
    found: dict[str, Any] = {}
    for number in range(settings):
        key = reader.name(f"the name of setting {number:,}")
        if key in found:
            raise _Fault(f"it has {key!r} twice")
        found[key] = _value(reader, f"the value of {key!r}")
    alignment = found.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise _Fault(f"its alignment is {alignment}")
    names: set[str] = set()
    places: list[tuple[int, int, str]] = []
    elements = 0
    for number in range(tensors):
        name, size, offset, count = _tensor(reader, number)
        if name in names:
            raise _Fault(f"it has the tensor {name!r} twice")
        names.add(name)
        places.append((offset, offset + size, name))
        elements += count
    _check_places(places, len(reader.content) - math.ceil(reader.place / alignment) * alignment)
    return GgufHeader({key: value for key, value in found.items() if value is not None}, elements)


def _value(reader: _Reader, what: str) -> Any:
    """A number, or the largest of a list; None for text."""
    (kind,) = reader.numbers("I", what)
    if kind in SCALARS:
        return reader.numbers(SCALARS[kind], what)[0]
    if kind == STRING:
        reader.text(what)
        return None
    if kind != ARRAY:
        raise _Fault(f"{what} is of a type that there is not, {kind}")
    (kind,) = reader.numbers("I", what)
    (length,) = reader.numbers("Q", what)
    if kind == STRING:
        if length > MAX_TEXTS:
            raise _Fault(f"{what} is a list of {length:,} texts")
        for _ in range(length):
            reader.text(what)
        return None
    if kind not in SCALARS:
        raise _Fault(f"{what} is a list of a type that there is not, {kind}")
    if length > MAX_READ:
        reader.skip(struct.calcsize(f"<{SCALARS[kind]}") * length, what)
        return None
    return max(reader.numbers(SCALARS[kind], what, length), default=None)


def _tensor(reader: _Reader, number: int) -> tuple[str, int, int, int]:
    """(name, bytes, offset, elements) of a tensor."""
    name = reader.name(f"the name of tensor {number:,}")
    what = f"tensor {name!r}"
    (dimensions,) = reader.numbers("I", what)
    if dimensions > MAX_DIMENSIONS:
        raise _Fault(f"{what} has {dimensions:,} dimensions")
    shape = reader.numbers("Q", what, dimensions)
    (kind,) = reader.numbers("I", what)
    (offset,) = reader.numbers("Q", what)
    elements = math.prod(shape)
    return name, _bytes(kind, elements, what), offset, elements


def _bytes(kind: int, elements: int, what: str) -> int:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:  # nothing will read it without the package
        return 0
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _Fault(f"{what} is of a type that there is not, {kind}") from None
    if elements % block:
        raise _Fault(f"{what} has {elements:,} elements, no multiple of {block}")
    return elements // block * size


def _check_places(places: list[tuple[int, int, str]], size: int) -> None:
    """The tensors lie within the data, whose size is given, and apart."""
    last = 0
    for start, end, name in sorted(places):
        if end > size:
            raise _Fault(f"tensor {name!r} goes past its end")
        if start < last:
            raise _Fault(f"tensor {name!r} lies over another")
        last = end
