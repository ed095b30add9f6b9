"""Old names of settings: in flags, in YAML and in Python."""

from dataclasses import dataclass
from typing import ClassVar, List, Optional

import pytest

from miniplm import config


@dataclass(frozen=True)
class Inner:
    """A group."""

    data: Optional[str] = None
    """A text."""
    fast: bool = False
    """A boolean."""
    sizes: List[int] = ()
    """A list."""


@dataclass(frozen=True)
class Outer:
    """Settings."""

    ALIASES: ClassVar[dict[str, str]] = {
        "inner_data": "inner.data",
        "quick": "inner.fast",
        "inner_sizes": "inner.sizes",
        "stop_after": "steps",
    }

    steps: int = 1
    """A number."""
    inner: Inner = Inner()
    """A group."""


def parse(*arguments):
    return config.from_arguments(Outer, list(arguments), prog="test")


def test_flags_take_old_names_in_both_spellings():
    old = parse(
        "--inner-data", "d", "--quick", "--inner_sizes", "1", "2", "--inner-sizes", "3", "--stop-after=5"
    )
    assert old == Outer(5, Inner("d", True, [1, 2, 3]))
    assert old == parse("--inner.data", "d", "--inner.fast", "--inner.sizes", "1", "2", "3", "--steps", "5")
    assert parse("--quick", "--no-quick") == Outer()


def test_yaml_and_python_take_old_names_and_later_flags_win(tmp_path):
    values = {"inner_data": "d", "stop_after": 5, "inner": {"fast": True}}
    assert config.from_dict(Outer, values) == Outer(5, Inner("d", True))
    file = tmp_path / "settings.yaml"
    file.write_text("inner_data: d\nstop_after: 5\ninner: {fast: true}\n")
    assert parse("--config", str(file)) == Outer(5, Inner("d", True))
    assert parse("--config", str(file), "--steps", "6", "--inner.data", "e") == Outer(6, Inner("e", True))


@pytest.mark.parametrize(
    "values",
    [
        {"inner_data": "a", "inner": {"data": "b"}},
        {"inner": {"data": "b"}, "inner_data": "a"},
        {"inner_data": "a", "inner.data": "b"},
    ],
)
def test_an_old_name_beside_its_new_one_is_refused(values, tmp_path):
    message = "^give inner.data or inner_data, its old name, not both$"
    with pytest.raises(ValueError, match=message):
        config.from_dict(Outer, values)
    with pytest.raises(ValueError, match=message):
        parse("--inner.data", "b", "--inner-data", "a")


def test_help_shows_the_new_names_and_says_which_old_ones_work(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    usage, _, end = " ".join(capsys.readouterr().out.split()).rpartition("Old names that still work:")
    assert "--inner.data DATA" in usage and "--inner_data" not in usage
    assert "--inner_data (now --inner.data), --quick (now --inner.fast)" in end


def test_the_old_flags_of_train_still_work():
    old = [
        "--teacher",
        "t",
        "--alpha",
        "0.3",
        "--temperature",
        "2",
        "--eval-data",
        "e",
        "--eval-interval",
        "5",
    ]
    old += ["--eval-rows", "7", "--checkpoint-interval", "8", "--keep-checkpoints", "9"]
    train = config.from_arguments(config.TrainConfig, ["--data", "d", "--output", "o", *old], prog="test")
    assert train.distill == config.DistillConfig("t", 0.3, 2.0)
    assert train.eval == config.EvalConfig("e", 5, 7)
    assert train.checkpoint == config.CheckpointConfig(8, 9)
