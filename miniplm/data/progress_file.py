"""How far a stopped run that writes a corpus file by file has come: progress.json in the corpus's folder."""

from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.files import fingerprint, read_json, write_json
from ..runtime.progress import note
from .corpus import changed_shard

PROGRESS = "progress.json"


def save_progress(folder: Path, state: dict[str, Any]) -> None:
    """Write what a stopped run can go on from: JSON-able, with `source` (another one once what is read was
    written to) and `hashes` (of the Arrow files written)."""
    write_json(folder / PROGRESS, {**state, "checksum": fingerprint(state)})


def read_progress(folder: Path, source: Any, name: str) -> dict[str, Any] | None:
    """What a stopped run of this source had saved; None to start from the beginning: there is nothing, or not
    all of what it is about, which is told.

    Args:
        source: as it was saved.
        name: of the source, in messages.
    """
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = read_json(path)
        checksum = state.pop("checksum")
        lost = f"{PROGRESS} is not as written" if checksum != fingerprint(state) else None
    except (UserError, AttributeError, KeyError, TypeError):
        lost = f"{PROGRESS} cannot be read"
    if not lost and state["source"] != source:
        lost = f"data {name} was written to since the run was stopped"
    if not lost and (changed := changed_shard(folder, state["hashes"])):
        lost = f"{changed} is missing or not as written"
    if lost:
        note(f"corpus {folder}: {lost}: starting over")
        path.unlink()
        return None
    return state
