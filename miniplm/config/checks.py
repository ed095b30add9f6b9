"""What the settings of several stages share: their checks and types."""

from typing import Literal, Optional

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _require(holds: bool, rule: str):
    if not holds:
        raise ValueError(rule)


def _require_trace(profile: Optional[str]):
    _require(
        profile is None or profile.endswith((".json", ".json.gz")),
        f"profile must be a .json or .json.gz file, got {profile}",
    )
