"""SIGTERM and SIGINT at a moment of one's own choosing."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came; the exit code is 128 + the signal's number."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Yield a raise_if_interrupted() that raises Interrupted once SIGTERM or SIGINT has come. A second signal
    ends the process at once.

    Outside the main thread, where Python allows no handlers, raise_if_interrupted() never raises.
    """
    received: list[int] = []
    previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def receive(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)

    def raise_if_interrupted() -> None:
        if received:
            raise Interrupted(128 + received[0])

    if threading.current_thread() is threading.main_thread():
        previous.update(
            {signum: signal.signal(signum, receive) for signum in (signal.SIGTERM, signal.SIGINT)}
        )
    try:
        yield raise_if_interrupted
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
