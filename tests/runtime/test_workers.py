"""ordered_map: order, no reading ahead, one function per worker, and every way to end."""

import multiprocessing
import os
import signal
import time

import pytest

from miniplm.runtime.errors import UserError
from miniplm.runtime.workers import ITEMS_PER_WORKER, ordered_map


def make_slow_square(unit):
    born = (os.getpid(), time.monotonic())

    def square(x):
        time.sleep(unit * (x % 3))
        if x < 0:
            raise ValueError(f"{x} is negative")
        return x * x, born

    return square


def make_fatal(_):
    def fatal(x):
        if x == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    return fatal


def make_blocked_signals(_):
    return lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, [])


def counted(n, read):
    for item in range(n):
        read.append(item)
        yield item


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_order_and_one_function_per_worker(workers):
    results = list(ordered_map(make_slow_square, 0.002, range(40), workers))
    assert [square for square, _ in results] == [x * x for x in range(40)]
    born = {birth for _, birth in results}
    assert len(born) <= workers and ({pid for pid, _ in born} == {os.getpid()}) == (workers == 1)


@pytest.mark.slow
def test_nothing_is_read_ahead():
    read = []
    results = ordered_map(make_slow_square, 0, counted(100, read), 2)
    for number in range(100):
        next(results)
        assert len(read) <= number + 2 * ITEMS_PER_WORKER
    assert len(read) == 100


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_through(workers):
    results = ordered_map(make_slow_square, 0, [2, -1, 3], workers)
    assert next(results)[0] == 4
    with pytest.raises(ValueError, match="-1 is negative"):
        next(results)
    assert not multiprocessing.active_children()


def test_an_error_while_reading_the_items_comes_through():
    def items():
        yield 1
        raise UserError("cannot be read")

    with pytest.raises(UserError, match="cannot be read"):
        list(ordered_map(make_slow_square, 0, items(), 2))
    assert not multiprocessing.active_children()


def test_no_items():
    assert list(ordered_map(make_slow_square, 0, [], 2)) == []


def test_closing_ends_the_workers_at_once():
    results = ordered_map(make_slow_square, 5, range(1000), 2)  # items 1 and 2 of three take 5 and 10 s
    next(results)
    assert multiprocessing.active_children()
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 4 and not multiprocessing.active_children()


def test_a_killed_worker_is_reported():
    with pytest.raises(UserError, match=r"a worker process died .* --workers 1"):
        list(ordered_map(make_fatal, None, range(100), 2))
    assert not multiprocessing.active_children()


def test_ctrl_c_is_left_to_the_parent():
    for blocked in ordered_map(make_blocked_signals, None, range(4), 2):
        assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
