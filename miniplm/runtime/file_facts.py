"""What is known of large files, remembered between runs, so that 100 GB are not read at every start.

A fact holds for a file as long as its path, device, inode, size and times of change are what they were. The
memory is one JSON file of the user, outside the folders that it is about: `$MINIPLM_CACHE`, else
`$XDG_CACHE_HOME/miniplm`, else `~/.cache/miniplm`. Whatever is wrong with it, it counts as empty.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import fingerprint

FILE = "files.json"
MAX_FILES = 20_000  # the latest are kept
SETTLED_NS = (
    20_000_000  # a file that was changed more recently could change again within one tick of its clock
)


def cache_folder() -> Path:
    """Where this user's memory is kept."""
    if folder := os.environ.get("MINIPLM_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "miniplm"


def signature(path: str | os.PathLike[str]) -> list[int]:
    """What tells a file from a changed one without reading it; OSError where there is none."""
    found = os.stat(path)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


class FileFacts:
    """Facts (JSON-able dicts) about files, from an earlier run or this one.

    `latest(path)` is what was last known of a path, whether the file has changed since or not.
    """

    def __init__(self) -> None:
        self._known = _read()
        self._new: dict[str, Any] = {}

    def get(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What is known of the file as it is now; {} if nothing is."""
        found, facts = self._entry(path)
        with contextlib.suppress(OSError):
            if found == signature(path):
                return facts
        return {}

    def latest(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What was known of the file that was last at this path; {} if nothing was."""
        return self._entry(path)[1]

    def put(self, path: str | os.PathLike[str], found: list[int], facts: Mapping[str, Any]) -> None:
        """Remember facts about the file that had the signature `found` both before they were found out and
        after. Of one that was changed just before, they are known as the latest only."""
        if time.time_ns() - max(found[-2:]) < SETTLED_NS:
            found = []
        name = os.path.realpath(path)
        self._new[name] = [found, dict(facts), _checksum(name, found, facts)]

    def save(self) -> None:
        """Keep what is new for later runs, if that is possible."""
        if self._new:
            known = {name: entry for name, entry in _read().items() if name not in self._new} | self._new
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
                _write(dict(list(known.items())[-MAX_FILES:]))

    def _entry(self, path: str | os.PathLike[str]) -> tuple[list[int], dict[str, Any]]:
        name = os.path.realpath(path)
        entry = self._new.get(name) or self._known.get(name)
        match entry:
            case [list(found), dict(facts), str(checksum)] if checksum == _checksum(name, found, facts):
                return found, facts
        return [], {}


@contextlib.contextmanager
def file_facts() -> Iterator[FileFacts]:
    """The memory; what the block adds to it is kept, also if it ends in an error."""
    facts = FileFacts()
    try:
        yield facts
    finally:
        facts.save()


def _checksum(name: str, found: list[int], facts: Mapping[str, Any]) -> str:
    return fingerprint([name, found, facts])


def _read() -> dict[str, Any]:
    try:
        content = json.loads((cache_folder() / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home, or JSON is too deep
        return {}
    return content if isinstance(content, dict) else {}


def _write(content: dict[str, Any]) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{FILE}.", dir=folder)  # a name of this process alone
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(temporary, folder / FILE)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # it may have its name already
            os.unlink(temporary)
        raise
