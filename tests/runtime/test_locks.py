"""Locks where the file system has them, and the heartbeat file where it has none."""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from miniplm.runtime import locks
from miniplm.runtime.errors import UserError
from miniplm.runtime.locks import lock

HOLDER = """
import errno, fcntl, sys
def flock(*_):
    raise OSError(int(sys.argv[2]), "none here")
fcntl.flock = flock
from miniplm.runtime import locks
locks.BEAT = 0.05
with locks.lock(sys.argv[1], "taken"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_locks(request, monkeypatch):
    """A file system without locks, and heartbeats that are old after half a second."""

    def flock(*_):
        raise OSError(request.param, "none here")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "STALE", 1.0)
    monkeypatch.setattr(locks, "SETTLE", 0.1)
    return request.param


@pytest.fixture
def holder(tmp_path, no_locks):
    """A process that holds the lock by its heartbeat."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock.tmp"), str(no_locks)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_fresh_heartbeat_keeps_others_out_and_an_old_one_is_taken_over(tmp_path, holder):
    path = tmp_path / ".lock.tmp"
    time.sleep(1.2)  # longer than one sign of life counts
    with (
        pytest.raises(UserError, match=r"taken \(if it was killed: its heartbeat counts for"),
        lock(path, "taken"),
    ):
        pytest.fail("two at once")
    holder.kill()
    holder.wait()
    assert [found.name for found in tmp_path.iterdir()] == [".lock.heartbeat.tmp"]
    with lock(path, "taken", wait=10.0), pytest.raises(UserError, match="taken"), lock(path, "taken"):
        pytest.fail("two at once")
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_ends_with_its_holder(tmp_path, holder):
    holder.communicate("\n")
    assert holder.returncode == 0 and list(tmp_path.iterdir()) == []
    with lock(tmp_path / ".lock.tmp", "taken"):
        pass


def _take_over(path, barrier, answers):
    locks.STALE, locks.SETTLE = 1.0, 0.5

    def flock(*_):
        raise OSError(errno.ENOLCK, "none here")

    def replace_later(*names):  # by then all have seen that it is old
        time.sleep(0.2)
        replace(*names)

    replace, os.replace, fcntl.flock = os.replace, replace_later, flock
    barrier.wait()
    try:
        with lock(path, "taken"):
            answers.put("held")
            barrier.wait()
    except UserError:
        answers.put("refused")
        barrier.wait()


def test_of_those_who_take_over_at_the_same_moment_one_holds_it(tmp_path):
    path, beat = tmp_path / ".lock.tmp", tmp_path / ".lock.heartbeat.tmp"
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        beat.write_text("who was killed")
        os.utime(beat, (1, 1))
        barrier, answers = context.Barrier(3, timeout=30), context.Queue()
        processes = [context.Process(target=_take_over, args=(path, barrier, answers)) for _ in range(3)]
        for process in processes:
            process.start()
        found = sorted(answers.get(timeout=30) for _ in processes)
        for process in processes:
            process.join()
        assert found == ["held", "refused", "refused"]
        assert list(tmp_path.iterdir()) == []


def test_waiting_for_a_lock(tmp_path):
    path, order = tmp_path / ".lock.tmp", []
    child = os.fork()
    if child == 0:
        with lock(path, "taken"):
            (tmp_path / "held").touch()
            time.sleep(0.5)
            (tmp_path / "left").touch()
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="taken"), lock(path, "taken", wait=0.1):
        pytest.fail("two at once")
    with lock(path, "taken", wait=20.0):
        order.append((tmp_path / "left").exists())
    os.waitpid(child, 0)
    assert order == [True]
