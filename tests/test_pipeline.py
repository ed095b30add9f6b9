import pytest

from miniplm.artifacts import UserError
from miniplm.pipeline import _resolve, read_stages, run_stages


def test_places_are_filled_in_everywhere_and_unknown_ones_refused():
    resolved = _resolve({"a": "${x-1}/checkpoints", "b": ["${y}", 3], "c": "$$5"}, {"x-1": "/o/x", "y": "/o/y"})
    assert resolved == {"a": "/o/x/checkpoints", "b": ["/o/y", 3], "c": "$5"}
    with pytest.raises(ValueError, match=r"\$\{z\} is no stage before this one; those are y"):
        _resolve("${z}", {"y": "/o/y"})
    with pytest.raises(ValueError, match=r"\$\$ for a dollar sign"):
        _resolve("5 $", {})


@pytest.mark.parametrize(("stages", "message"), [
    ({"a": {"stage": "bake"}}, "choose from prepare"),
    ({"a": {"data": "x"}}, "`stage` is None"),
    ({"a": {"stage": "prepare", "data": "x", "tokenizer": "t", "output": "o"}}, "leave out `output`"),
    ({"a/b": {"stage": "prepare", "data": "x", "tokenizer": "t"}}, "letters, digits"),
    ({"a": {"stage": "prepare", "data": "x"}}, "tokenizer"),
    ({"a": {"stage": "prepare", "data": "x", "tokenizer": "t", "flavour": 1}}, "flavour"),
    ({"a": {"stage": "prepare", "data": "${b}", "tokenizer": "t"}, "b": {"stage": "prepare", "data": "x", "tokenizer": "t"}}, "no stage before this one"),
    ({"a": {"stage": "prepare", "data": "x", "tokenizer": "t"}, "b": {"stage": "select", "data": "${a}", "scores": ["${a}"], "ratio": 2}}, "ratio must be"),
])
def test_a_wrong_file_is_refused_before_anything_runs(stages, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_stages(stages, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "a: 3\n", "", "\x00"])
def test_a_file_that_is_no_pipeline(text, tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"pipeline\.yaml"):
        read_stages(path)
