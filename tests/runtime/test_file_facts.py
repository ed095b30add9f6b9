"""What is remembered of files: as long as they are what they were, and no damage to the memory matters."""

import json
import os
import random
import time

import pytest

from miniplm.runtime import file_facts as memory
from miniplm.runtime.file_facts import FileFacts, cache_folder, file_facts, signature

FACTS = {"hash": "abc", "chunks": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path):
    """A file that has been at rest for long enough."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    time.sleep(2 * memory.SETTLED_NS / 1e9)
    return path


def remember(path, facts=FACTS):
    with file_facts() as found:
        found.put(path, signature(path), facts)


def test_a_later_run_knows_a_file_as_it_is(path):
    assert FileFacts().get(path) == {}
    remember(path)
    assert FileFacts().get(path) == FACTS
    assert FileFacts().get(path.parent / "cache" / ".." / "file") == FACTS  # the same file


def rewrite(path):
    path.write_bytes(b"CONTENT")


def rewrite_and_put_back_the_time(path):
    before = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path):
    path.with_name("other").write_bytes(b"content")
    os.replace(path.with_name("other"), path)


@pytest.mark.parametrize("change", [rewrite, rewrite_and_put_back_the_time, replace, os.unlink])
def test_a_changed_file_is_not_known_but_what_it_was(path, change):
    remember(path)
    change(path)
    assert FileFacts().get(path) == {}
    assert FileFacts().latest(path) == FACTS


def test_a_file_that_was_written_just_now_is_known_as_the_latest_only(tmp_path, monkeypatch):
    """Within one tick of the file system's clock it could change without a trace."""
    monkeypatch.setattr(memory, "SETTLED_NS", 10**12)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    remember(path)
    assert FileFacts().get(path) == {} and FileFacts().latest(path) == FACTS


def test_no_damage_to_the_memory_gives_other_facts(path):
    remember(path)
    file = cache_folder() / memory.FILE
    whole, rng = file.read_bytes(), random.Random(0)
    answers = set()
    for _ in range(400):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content if rng.random() < 0.8 else content[: rng.randrange(len(content))])
        answers.add(json.dumps(FileFacts().get(path)))
        answers.add(json.dumps(FileFacts().latest(path)))
    assert answers <= {json.dumps(FACTS), "{}"} and "{}" in answers
    for content in (b"[]", b"null", b"[" * 100_000, b'{"%b": 3}' % os.fsencode(path), b"\xff"):
        file.write_bytes(content)
        assert FileFacts().get(path) == {}
    remember(path)  # and it is mended
    assert FileFacts().get(path) == FACTS


def test_where_nothing_can_be_kept_nothing_fails(path, monkeypatch):
    monkeypatch.setenv("MINIPLM_CACHE", str(path / "no-folder"))
    remember(path)
    assert FileFacts().get(path) == {}


def test_the_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MINIPLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/miniplm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder()) == "/home/someone/.cache/miniplm"


def test_the_latest_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MAX_FILES", 3)
    for number in range(5):
        (tmp_path / str(number)).write_text("x")
        remember(tmp_path / str(number), {"n": number})
    known = [FileFacts().latest(tmp_path / str(number)) for number in range(5)]
    assert known == [{}, {}, {"n": 2}, {"n": 3}, {"n": 4}]
