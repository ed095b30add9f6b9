"""How long a run has worked, in wall_time.json beside its manifest: all of its processes, killed ones too.

A file of its own, because manifests of equal runs have equal bytes. It determines nothing, so nothing depends
on it: where it is missing or damaged, the time is not known.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .files import read_json, write_json
from .locks import Occupied, lock

WALL_TIME = "wall_time.json"
INTERVAL = 10.0  # seconds: what a kill may lose


def wall_time(folder: str | os.PathLike) -> float | None:
    """Seconds that were worked on the output in `folder`; None where it is not recorded."""
    try:
        seconds = read_json(Path(folder) / WALL_TIME)["seconds"]
    except (UserError, OSError, KeyError, TypeError):
        return None
    known = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < math.inf
    return float(seconds) if known else None


@contextlib.contextmanager
def timed(folder: str | os.PathLike) -> Iterator[None]:
    """Add the time that the block takes to that of `folder`, every INTERVAL and at its end; processes at work
    on it at the same time each add theirs. A disk that takes no more is for the work itself to tell."""
    saved, done = time.monotonic(), threading.Event()

    def save() -> None:
        nonlocal saved
        with (
            contextlib.suppress(OSError, Occupied),
            lock(Path(folder) / ".wall_time.lock.tmp", "", wait=INTERVAL),
        ):
            now = time.monotonic()
            seconds = (wall_time(folder) or 0.0) + now - saved
            write_json(Path(folder) / WALL_TIME, {"seconds": round(seconds, 3)})
            saved = now

    def keep_saving() -> None:
        while not done.wait(INTERVAL):
            save()

    thread = threading.Thread(target=keep_saving, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        save()
