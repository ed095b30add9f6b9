"""Calls into libraries that may hang, or write to the terminal on their own."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from .errors import Named

STDERR = 2  # its file descriptor
SECONDS_TO_END = 10

Result = TypeVar("Result")


def call_within(seconds: int, function: Callable[[], Result]) -> Result:
    """function(), made in a thread of its own, which is left behind when it takes too long. What it raises is
    raised here.

    Seconds in which the whole process is stopped do not count.

    Raises:
        Named: after so many seconds.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=call, daemon=True).start()
    try:
        for _ in range(seconds):
            if done.wait(1.0):
                break
    except BaseException:  # Ctrl-C: a thread that came back while Python ends would take it down
        done.wait(SECONDS_TO_END)
        raise
    if errors:
        raise errors[0]
    if not results:
        raise Named(f"no answer within {seconds:,} seconds")
    return results[0]


@contextlib.contextmanager
def held_stderr() -> Iterator[Callable[[], None]]:
    """Hold back what this process writes to stderr, libraries in other languages too, until the block ends.
    Yields a function that drops what has come so far."""
    try:
        terminal = os.dup(STDERR)
    except OSError:  # there is none
        yield lambda: None
        return
    with tempfile.TemporaryFile() as held:

        def drop() -> None:
            os.ftruncate(held.fileno(), 0)

        os.dup2(held.fileno(), STDERR)
        try:
            yield drop
        finally:
            os.dup2(terminal, STDERR)
            os.close(terminal)
            held.seek(0)
            with open(STDERR, "wb", buffering=0, closefd=False) as stderr, contextlib.suppress(OSError):
                stderr.write(held.read().lstrip(b"\0"))  # what comes after a drop has a gap before it
