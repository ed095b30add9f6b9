"""Folders that one process writes at a time, and JSON from anywhere."""

import json
import os
import subprocess
import sys

import pytest

from miniplm.runtime.errors import UserError
from miniplm.runtime.files import atomic_folder, read_json, write_json

WRITER = """
import sys
from miniplm.runtime.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "mine").touch()
    print("writing", flush=True)
    sys.stdin.readline()
"""


def start_writer(path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.fixture
def writer(tmp_path):
    """(a folder, a process that is writing it)."""
    process = start_writer(tmp_path / "folder")
    yield tmp_path / "folder", process
    process.kill()
    process.wait()


def test_a_folder_has_one_writer(writer):
    path, process = writer
    with pytest.raises(UserError, match=r"another process is writing .*folder: wait"), atomic_folder(path):
        pytest.fail("two at once")
    process.communicate("\n")
    assert process.returncode == 0 and [found.name for found in path.iterdir()] == ["mine"]
    assert [found.name for found in path.parent.iterdir()] == ["folder"]


def test_a_killed_writer_is_in_nobodys_way(writer):
    path, process = writer
    process.kill()
    process.wait()
    assert (path.parent / ".folder.tmp" / "mine").exists()
    with atomic_folder(path) as temporary:
        (temporary / "new").mkdir()
    assert [found.name for found in path.iterdir()] == ["new"]


def test_what_was_written_in_the_meantime_stays(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(UserError, match="in the meantime"), atomic_folder(path) as temporary:
        (temporary / "new").touch()
        path.mkdir()
        (path / "theirs").touch()
    assert [found.name for found in path.iterdir()] == ["theirs"]
    assert [found.name for found in tmp_path.iterdir()] == ["folder"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "new").touch()
    assert [found.name for found in (tmp_path / "folder").iterdir()] == ["new"]


def test_names_that_are_no_utf8(tmp_path):
    value = {"name": os.fsdecode(b"caf\xe9"), "other": "漢字"}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


DAMAGED = {
    "cut": b'{"a": [1, 2',
    "empty": b"",
    "no UTF-8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "two values": b"{} {}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.json is not valid JSON \(.+\): restore it") as caught:
        read_json(path)
    assert str(caught.value).isprintable()


def test_missing_json(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "file.json")
    write_json(tmp_path / "file.json", [1, None])
    assert read_json(tmp_path / "file.json") == [1, None] == json.loads((tmp_path / "file.json").read_text())
