"""Evaluations that are not as they were written: one line, whatever is in the file."""

import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniplm.analysis.evaluation import read_evaluation, with_checksum
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import fingerprint, write_json

LOSSES = {"rows": 3, "non_finite_rows": 0, "tokens": 90, "loss": 2.5, "perplexity": 12.25}
CONTENT = {
    "model": "student",
    "weights": "152356e1d201f0e0",
    "corpus": "c21267961033dd02",
    "source": "text.jsonl",
    "document_mask": False,
    "dtype": "float32",
    **LOSSES,
    "domains": {"books": LOSSES, "empty": {**LOSSES, "tokens": 0, "loss": None, "perplexity": None}},
}
NUMBERS = [-1, 2**63, 1.5, True, "3", [], {}]


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        read_evaluation(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 500
    return message


def test_what_was_written_comes_back(tmp_path):
    write_json(tmp_path / "new.json", with_checksum(CONTENT))
    write_json(tmp_path / "old.json", CONTENT)  # from before there was a checksum
    for name in ("new.json", "old.json"):
        found = read_evaluation(tmp_path / name)
        assert found.loss == 2.5 and found.domains["empty"].loss is None
        assert found.fingerprint == fingerprint(CONTENT)  # exports are told apart by it


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (["rows"], NUMBERS),
        (["domains", "books", "tokens"], NUMBERS),
        (["loss"], ["1", True, [], float("nan"), float("inf")]),
        (["domains", "books", "perplexity"], ["1", float("-inf")]),
        (["model"], [None, 1, []]),
        (["document_mask"], [0, "no", None]),
        (["domains"], [None, [], "books", {"books": None}, {"books": []}, {"books": {}}]),
        ([], [[], None, "x", 3, {}, [CONTENT]]),
    ],
)
def test_wrong_types_are_one_line(tmp_path, path, values):
    for value in values:
        content = copy.deepcopy(CONTENT)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if path:
            inner[path[-1]] = value
        (tmp_path / "x.json").write_text(json.dumps(content if path else value))
        assert "is not an evaluation" in refused(tmp_path / "x.json")


@pytest.mark.parametrize("key", CONTENT)
def test_missing_keys_are_one_line(tmp_path, key):
    write_json(tmp_path / "x.json", {name: value for name, value in CONTENT.items() if name != key})
    assert f"({key}: it is missing)" in refused(tmp_path / "x.json")


def test_files_that_are_none(tmp_path):
    assert "does not exist" in refused(tmp_path / "missing.json")
    assert "not a regular file" in refused(tmp_path)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_no_damage_goes_unseen(tmp_path_factory, seed):
    """Bits, cuts and swaps, anywhere in the file."""
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    write_json(path, with_checksum(CONTENT))
    whole = path.read_bytes()
    rng = random.Random(seed)
    damaged = bytearray(whole)
    place, other = (rng.randrange(len(whole)) for _ in range(2))
    match rng.randrange(3):
        case 0:
            damaged[place] ^= 1 << rng.randrange(8)
        case 1:
            del damaged[place:]
        case 2:
            damaged[place], damaged[other] = damaged[other], damaged[place]
    path.write_bytes(damaged)
    try:
        same = json.loads(damaged) == json.loads(whole)
    except ValueError:
        same = False
    if same:
        read_evaluation(path)
    else:
        refused(path)
