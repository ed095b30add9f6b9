"""Locks that keep other processes out of a file or folder, on file systems without locks too.

Where the system's locks work they are used, through filelock: a kill ends them. Where a file system knows
none (ENOLCK, ENOSYS, EOPNOTSUPP: some NFS and FUSE mounts) a heartbeat file stands in, whose time of change
its holder renews: while it is fresh it keeps others out, an old one is taken over. Its age is measured
against a file just written beside it, so that the clocks of the machines need not agree.
"""

import contextlib
import errno
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from .errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which a heartbeat file is nobody's
SETTLE = 1.0  # seconds in which all who take over the same one have written their name
POLL = 0.05
PATIENCE = 3 * STALE  # seconds that are long enough to wait for who holds a lock for a moment, or was killed


class Occupied(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def lock(path: str | os.PathLike, refusal: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file while the block runs. A kill ends that too, and leaves a file that is in nobody's way.

    Where the file cannot be made, nobody is kept out.

    Args:
        wait: seconds to wait for another process that holds it.
    Raises:
        Occupied: another process holds it still; the text is `refusal`.
    """
    path, deadline = Path(path), time.monotonic() + wait
    while (release := _take(path)) is None:
        if time.monotonic() >= deadline:
            if _heartbeat_file(path).exists():
                refusal += f" (if it was killed: its heartbeat counts for {STALE:.0f} seconds)"
            raise Occupied(refusal)
        time.sleep(POLL)
    try:
        yield
    finally:
        release()


def _take(path: Path) -> Callable[[], None] | None:
    """What gives the lock back; None where another process holds it."""
    held = filelock.FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock tells of its own way out, which a kill does not end
            held.acquire(blocking=False)
    except filelock.Timeout:
        return None
    except PermissionError:  # the file is another account's, or the folder is: writing there will tell
        return lambda: None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            return lambda: None  # writing there will tell
        return _take_without_locks(path)
    if isinstance(held, filelock.SoftFileLock):
        held.release()
        return _take_without_locks(path)

    def release() -> None:
        # Removed while it is held: who opens it in between finds that it has lost its name, and tries anew.
        with contextlib.suppress(OSError):
            os.unlink(path)
        held.release()

    return release


def _heartbeat_file(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.tmp')}.heartbeat.tmp")


def _take_without_locks(path: Path) -> Callable[[], None] | None:
    path.unlink(missing_ok=True)  # which filelock made before it found that it cannot be locked
    file, name = _heartbeat_file(path), uuid.uuid4().hex
    try:
        if not _claim(file, name):
            return None
    except OSError:
        return lambda: None  # writing there will tell
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(OSError):
                if file.read_text() == name:
                    os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()

    def release() -> None:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            if file.read_text() == name:
                file.unlink()

    return release


def _claim(file: Path, name: str) -> bool:
    """Whether the heartbeat file now holds this name: nobody's was there, or an old one."""
    try:
        with open(file, "x") as created:
            created.write(name)
        return True
    except FileExistsError:
        pass
    now = file.with_name(f".{name}.tmp")
    try:
        now.write_text(name)
        # Opened, so that what is told of it is fresh on NFS too.
        with open(now) as ours, open(file) as theirs:
            if os.fstat(ours.fileno()).st_mtime - os.fstat(theirs.fileno()).st_mtime < STALE:
                return False
        os.replace(now, file)
    except FileNotFoundError:  # its holder has just left
        return _claim(file, name)
    finally:
        now.unlink(missing_ok=True)
    time.sleep(SETTLE)
    return file.read_text() == name
