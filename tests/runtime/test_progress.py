"""Progress on a terminal, in a log, and where the environment asks for less."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from miniplm.runtime import progress as module
from miniplm.runtime.progress import Progress

WORK = """
import time
from miniplm.runtime.progress import Progress
with Progress("score", 4_000_000, done=1_000_000) as progress:
    for _ in range(3):
        time.sleep(0.15)
        progress.note("MFU 41.2%")
        progress.update(1_000_000)
"""
COLOUR = """
from rich.console import Console
from miniplm.analysis.ledger_tables import print_tables
Console().print("loss 5.25")
print_tables({"runs": [], "comparisons": []})
"""
COLOURS = re.compile(r"\x1b\[(\d+;)*(3[0-8]|4[0-8]|9[0-7]|10[0-7])(;\d+)*m")


def on_terminal(code, **environment) -> str:
    """What a program writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {"TERM": "xterm-256color"} | environment
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TQDM_DISABLE")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=kept | environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_one_bar_with_rate_time_left_and_figures():
    shown = on_terminal(WORK)
    assert shown.count("\n") == 1 and shown.count("\r") > 3
    assert "score:" in shown and " tokens/s" in shown and "MFU 41.2%" in shown and "4.00M/4.00M" in shown
    assert "<00:0" in shown  # the time left


def test_disabled_bars_are_plain_lines():
    shown = on_terminal(WORK, TQDM_DISABLE="1")
    assert shown.startswith("score: 4,000,000 of 4,000,000 tokens, ") and shown.endswith("MFU 41.2%\r\n")
    assert shown.count("\n") == 1 and "\x1b" not in shown


def test_a_log_has_plain_lines_with_rate_and_time_left(capsys, monkeypatch):
    times = iter([0.0, 10.0, 40.0, 40.0, 40.0, 100.0, 100.0, 100.0, 110.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    with Progress("train", 3_000, done=1_000) as progress:
        progress.note("loss 5.2")
        progress.update(500)  # 10 s: no line yet
        progress.update(500)  # 40 s
        progress.update(1_000)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "train: 2,000 of 3,000 tokens, 25/s, 00:40 left, loss 5.2"
    assert last.startswith("train: 3,000 of 3,000 tokens, ") and "left" not in last


def test_no_color_is_honoured():
    assert COLOURS.search(on_terminal(COLOUR))
    plain = on_terminal(COLOUR, NO_COLOR="1")
    assert "5.25" in plain and "training FLOPs" in plain and not COLOURS.search(plain)
