"""What of a text reaches a terminal."""

import subprocess
import sys
import unicodedata

import pytest

from miniplm import cli
from miniplm.runtime.errors import UserError
from miniplm.runtime.progress import note
from miniplm.runtime.text import printable

HOSTILE = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "\x1b]8;;http://evil.example\x07x": r"\x1b]8;;http://evil.example\x07x",
    "\x9b2J": r"\x9b2J",  # the escape sequence of one letter
    "bell\a back\b\r": r"bell\x07 back\x08\r",
    "two\nlines\u2028three\x85": r"two\nlines\u2028three\x85",
    "abc\u202edcba\u2069\u200f": r"abc\u202edcba\u2069\u200f",
    "zero\u200bwidth\ufeff": r"zero\u200bwidth\ufeff",
    "tag\U000e0041": r"tag\U000e0041",
    "\udcff.jsonl": r"\udcff.jsonl",
    "\0": r"\x00",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_what_a_terminal_obeys_is_written_out(text, shown):
    assert printable(text) == shown
    assert printable(OSError(text)) == shown


@pytest.mark.parametrize("text", ["", "plain", "漢字 🙂 é שלום", "[red] {x} \\x1b 'a' \"b\""])
def test_what_is_seen_stays(text):
    assert printable(text) == text


@pytest.mark.slow
def test_every_letter():
    kept = "\n\t"
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        shown = printable(letter, kept)
        if letter in kept:
            assert shown == letter
        elif unicodedata.category(letter)[0] in "CZ" and letter != " ":
            assert shown.isascii() and shown.startswith("\\") and shown.isprintable()
        else:
            assert shown == letter


@pytest.mark.parametrize("text", HOSTILE)
def test_notes_and_errors_of_the_command_line(text, capsys, monkeypatch):
    def fail(*_):
        raise UserError(f"corpus {text} is damaged")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["score"]) == 2
    note(f"corpus {text}")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 2 and printed.replace("\n", "").isprintable()


def test_a_command_that_is_no_word():
    command = [sys.executable, "-m", "miniplm.cli", "\x1b[31m\u202e"]
    found = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert found.returncode == 2 and found.stderr.strip().isprintable() and r"\x1b[31m\u202e" in found.stderr
