"""What the settings of several stages share: their types, and the rules for a value."""

import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Optional

from .fields import shown

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

MAX_BATCH_TOKENS = 2**24  # of one forward pass: more fits into no memory
MAX_VOCABULARY = 2**24
MAX_COUNT = 2**63 - 1  # of what is only counted (steps, chunks, tokens): numpy's and Arrow's largest integer
MAX_SEED = 2**64 - 1  # torch's


@dataclass(frozen=True)
class ByDevice:
    """A default that depends on the device. As `metadata["default"]` of a field it is shown by the help."""

    cpu: int
    gpu: int

    def on(self, device_type: str) -> int:
        return self.cpu if device_type == "cpu" else self.gpu

    def __str__(self) -> str:
        return f"{self.cpu:,} on the CPU, {self.gpu:,} on a GPU"


BATCH_TOKENS = ByDevice(2_048, 65_536)
MICRO_BATCH_TOKENS = ByDevice(4_096, 65_536)
BATCH_CHUNKS = ByDevice(8, 64)
SHARD_CHUNKS = ByDevice(256, 16_384)


def require(holds: bool, rule: str) -> None:
    """ValueError with the rule, unless it holds."""
    if not holds:
        raise ValueError(rule)


def require_count(settings: Any, *names: str, low: int = 1, high: int = MAX_COUNT, group: str = "") -> None:
    """ValueError unless the whole numbers under these names lie from `low` to `high`; None is left out.

    Args:
        group: what comes before the names in a message, with its dot.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            require(value >= low, f"{group}{name} must be at least {low}, got {value}")
            require(value <= high, f"{group}{name} must be at most {high:,}, got {value:,}")


def require_finite(settings: Any, *names: str, positive: bool = False, group: str = "") -> None:
    """ValueError unless the numbers under these names are finite, and at least 0, or above 0 where they must
    be positive; None is left out."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            require(math.isfinite(value), f"{group}{name} must be finite, got {value}")
            if positive:
                require(value > 0, f"{group}{name} must be above 0, got {value}")
            else:
                require(value >= 0, f"{group}{name} must not be negative, got {value}")


def require_texts(settings: Any, *may_be_empty: str, group: str = "", any_bytes: str = "") -> None:
    """ValueError unless every text among the settings can be a name: not empty, without NUL, and UTF-8.

    Args:
        any_bytes: the setting that names files which only Python opens: any name that a file can have.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(text, str):
                continue
            name = group + field.name
            require(bool(text) or field.name in may_be_empty, f"{name} must not be empty")
            require("\0" not in text, f"{name} must not hold a NUL character")
            try:
                os.fsencode(text) if field.name == any_bytes else text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name} must be UTF-8, got {shown(text)}: rename it") from None


def require_output(path: Optional[str], name: str = "output") -> None:
    """ValueError unless the path names a file or folder of its own, and no device, pipe or socket."""
    if path is None:
        return
    require(Path(path).name not in ("", ".."), f"{name} must have a name of its own, got {shown(path)}")
    plain = os.path.isdir(path) or os.path.isfile(path) or not os.path.exists(path)
    require(plain, f"{name} {shown(path)} is neither a folder nor a file: choose another")


def require_trace(path: Optional[str]) -> None:
    require_output(path, "profile")
    require(
        path is None or path.endswith((".json", ".json.gz")),
        f"profile must be a .json or .json.gz file, got {shown(path)}",
    )


def require_device(device: str) -> None:
    require(
        re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device) is not None,
        f"device {shown(device)} is not known: give auto, cpu, cuda or cuda:1",
    )
