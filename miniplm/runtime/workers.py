"""A map over worker processes that keeps order, does not read ahead, and leaves nobody behind."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from .errors import UserError

ITEMS_PER_WORKER = 4  # items per worker that are read, worked on, or waiting for their turn

Argument = TypeVar("Argument")
Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    make: Callable[[Argument], Callable[[Item], Result]],
    argument: Argument,
    items: Iterable[Item],
    workers: int,
) -> Generator[Result, None, None]:
    """Yield function(item) for each of `items`, in their order, where function = make(argument) is made once
    in each worker.

    One worker is this process. More are started fresh (not forked: this process may have threads), leave
    Ctrl-C to this one, and end with it, however it ends. At most ITEMS_PER_WORKER items per worker are under
    way. Close the generator to stop early.

    Raises:
        UserError: a worker died. What make and function raise is raised here.
    """
    if workers == 1:
        yield from map(make(argument), items)
        return
    context = multiprocessing.get_context("spawn")
    parent_alive, hold = context.Pipe(duplex=False)
    under_way: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(workers, context, _start, (parent_alive, make, argument)) as pool:
        try:
            for item in items:
                with _interrupts_blocked():  # submit starts processes, and they inherit it
                    under_way.append(pool.submit(_call, item))
                if len(under_way) == ITEMS_PER_WORKER * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (killed, or out of memory): run the same command again, "
                "with --workers 1 where memory is short"
            ) from None
        except BaseException:
            hold.close()
            raise


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_function: Callable[[Any], Any]  # in a worker


def _start(parent_alive: Connection, make: Callable[[Any], Any], argument: Any) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=exit_with_parent, args=(parent_alive,), daemon=True).start()
    try:
        _function = make(argument)
    except Exception as error:  # raised by the first call, for here it would only break the pool
        _function = partial(_fail, error)


def _fail(error: Exception, item: Any) -> Any:
    raise error


def exit_with_parent(parent_alive: Connection) -> None:
    """Return never: end this process when the other end of the pipe closes."""
    with contextlib.suppress(EOFError, OSError):
        parent_alive.recv()  # nothing is ever sent: this returns when the other end closes, by kill -9 too
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
