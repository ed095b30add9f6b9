"""YAML from anywhere: plain data, once each, and no larger than it looks."""

import math
import os
import threading
import time

import pytest

from miniplm.config.yaml_files import MAX_BYTES, MAX_DEPTH, load, read_mapping


def test_plain_values():
    text = "a: 1\nb: 1e-3\nc: [x, .inf, -2.5, 1_000]\nd: {e: true, f: null, g: 2024-01-01, h: =}\ni: '1'\n"
    expected = {
        "a": 1,
        "b": 1e-3,
        "c": ["x", math.inf, -2.5, 1000],
        "d": {"e": True, "f": None, "g": "2024-01-01", "h": "="},
        "i": "1",
    }
    assert load(text) == expected
    assert load("") is None and load("x") == "x" and load("-5") == -5 and math.isnan(load(".nan"))


def test_aliases_and_merges_write_out_what_they_name():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\nd: {<<: [*a, {z: 4}]}\n"
    assert load(text) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1, "y": 3},
        "d": {"x": 1, "y": 2, "z": 4},
    }


def bomb(levels: int, width: int, merge: bool = False) -> str:
    """A list or mapping that holds `width` times the one above it: width ** levels values."""
    lines = ["a0: &a0 {x: x}" if merge else "a0: &a0 [x]"]
    for level in range(1, levels + 1):
        inner = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{inner}]}}" if merge else f"[{inner}]"))
    return "\n".join(lines)


REFUSED = {
    "a key twice": ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands twice in one mapping"),
    "a key twice, inside": ("a:\n  - {b: 1, b: 1}\n", "line 2: the key 'b' stands twice"),
    "two merges": ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "the key '<<' stands twice"),
    "a number as a key": ("1: a\n", "line 1: the key '1' is not text: put it in quotes"),
    "a boolean as a key": ("on: a\n", "the key 'on' is not text"),
    "null as a key": ("~: a\n", "the key '~' is not text"),
    "a list as a key": ("[a]: b\n", "the key a list or mapping is not text"),
    "an alias as a key": ("- &a [b]\n- {*a : b}\n", "is not text"),
    "a list in itself": ("a: &a [*a]\n", "an alias stands inside of what it repeats"),
    "a mapping in itself": ("a: &a {b: {c: *a}}\n", "an alias stands inside of what it repeats"),
    "a merge of itself": ("a: &a {<<: *a}\n", "an alias stands inside of what it repeats"),
    "a bomb": (bomb(9, 9), "more than 20,000 values"),
    "a bomb of merges": (bomb(9, 9, merge=True), "more than 20,000 values"),
    "a wide bomb": (bomb(2, 1000), "more than 20,000 values"),
    "a chain of aliases": (bomb(MAX_DEPTH + 1, 1), f"nested more than {MAX_DEPTH} deep"),
    # by our limit, or by that of PyYAML 6.0.4 and newer
    "deep lists": ("[" * 100_000, "nest"),
    "deep mappings": ("{a: " * 100_000, "nest"),
    "deep blocks": ("- " * 50_000, "nest"),
    "an object": ("a: !!python/object/apply:os.system [ls]\n", "is not plain data"),
    "a date": ("a: !!timestamp 2024-01-01\n", "is not plain data"),
    "bytes": ("a: !!binary aGk=\n", "is not plain data"),
    "a set": ("!!set {a, b}\n", "is not plain data"),
    "a number that is none": ("a: !!int x\n", "not valid YAML"),
    "a boolean that is none": ("a: !!bool x\n", "not valid YAML"),
    "a number of 5,000 digits": (f"a: {'9' * 5000}\n", "a number of 5,000 characters"),
    "a hexadecimal one": (f"a: 0x{'f' * 5000}\n", "a number of 5,002 characters"),
    "a colon too many": ("a: b: c\n", "not valid YAML (line 1, column 5)"),
    "an open list": ("a: [1, 2\n", "not valid YAML"),
    "an unknown alias": ("a: *b\n", "not valid YAML (line 1, column 4)"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "a NUL": ("a: \0\n", "not valid YAML"),
    "a tab": ("a:\n\t- b\n", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_and_at_once(text, message):
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load(text)
    assert message in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    assert time.monotonic() - start < 5


def test_files(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("a: ü\n", encoding="utf-8")
    assert read_mapping(path) == {"a": "ü"}
    for content, message in [
        (b"", "must map names to values"),
        (b"- a", "must map names to values"),
        (b"a: \xff", "is not UTF-8 text"),
        (b"a: 1\na: 2\n", "settings.yaml: line 2: the key 'a' stands twice"),
        (b"#" * (MAX_BYTES + 1), "is larger than 256 KiB"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            read_mapping(path)
        assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        ("/dev/zero", "is not a file"),
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / ("x" * 300), "does not exist"),
        ("a\0b", r"'a\x00b' does not exist"),
        ("a\nb", r"'a\nb' does not exist"),
        ("", " does not exist"),
    ]:
        found = []

        def read(path=path, found=found):
            try:
                read_mapping(path)
            except ValueError as error:
                found.append(str(error))

        reader = threading.Thread(target=read, daemon=True)  # a pipe without a writer must not hold it up
        reader.start()
        reader.join(10)
        assert found and message in found[0]
