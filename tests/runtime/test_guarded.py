"""Calls that hang are left, and what libraries write to the terminal is held back."""

import os
import subprocess
import sys
import threading
import time

import pytest

from miniplm.runtime.errors import Named
from miniplm.runtime.guarded import call_within, held_stderr


def test_a_result_and_an_error_come_through():
    assert call_within(5, lambda: 3) == 3
    assert call_within(5, lambda: None) is None
    with pytest.raises(KeyError):
        call_within(5, lambda: {}["x"])


def test_a_call_that_hangs_is_left_in_time():
    release = threading.Event()
    start = time.monotonic()
    with pytest.raises(Named, match="no answer within 1 seconds"):
        call_within(1, release.wait)
    assert time.monotonic() - start < 5
    release.set()


def test_a_thread_that_hangs_does_not_keep_the_process():
    code = (
        "import threading; from miniplm.runtime.guarded import call_within\n"
        "try: call_within(1, threading.Event().wait)\n"
        "except ValueError: print('left')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_stderr_comes_at_the_end_or_is_dropped(capfd):
    with held_stderr() as drop:
        os.write(2, b"noise\n")
        drop()
        os.write(2, b"news\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "news\n"
    with pytest.raises(ValueError), held_stderr():
        os.write(2, b"last words\n")
        raise ValueError
    assert capfd.readouterr().err == "last words\n"


def test_without_stderr():
    code = (
        "import os; os.close(2)\n"
        "from miniplm.runtime.guarded import held_stderr\n"
        "with held_stderr() as drop: drop(); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n"
