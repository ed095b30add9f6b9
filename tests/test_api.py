"""The commands as functions: miniplm.score, miniplm.train, …"""

import importlib
import inspect
import pydoc
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import miniplm
from miniplm import config
from miniplm.cli import COMMANDS
from miniplm.config.fields import Schema
from miniplm.runtime.errors import UserError

FUNCTIONS = [*config.STAGES, "ledger", "report", "run"]
SCORE = dict(data="d", output="o", teacher="t")


@pytest.fixture
def called(monkeypatch):
    """The settings that each command's function was called with."""
    found = []
    for name in FUNCTIONS:
        module = importlib.import_module(f"miniplm.{COMMANDS[name][1]}")
        monkeypatch.setattr(module, name, lambda settings: found.append(settings) or "what it returns")
    return found


def test_keywords_are_the_settings(called):
    assert miniplm.score(**SCORE, shard_chunks=5) == "what it returns"
    miniplm.score(**SCORE, shard_rows=5)
    miniplm.score(config.ScoreConfig(**SCORE, shard_chunks=5))
    assert called == [config.ScoreConfig(**SCORE, shard_chunks=5)] * 3
    miniplm.train(data=Path("d"), output="o", model={"hidden_size": 24}, eval_data="e")
    miniplm.train(data="d", output="o", model=config.StudentConfig(hidden_size=24), eval={"data": "e"})
    assert called[3] == called[4] and called[3].model.hidden_size == 24 and called[3].eval.data == "e"
    miniplm.run(config="pipeline.yaml", output="o")
    assert called[5] == config.RunConfig("pipeline.yaml", "o")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: miniplm.score(**SCORE, shards=5),
            "there is no setting 'shards': did you mean shard_chunks?",
        ),
        (lambda: miniplm.score(data="d"), "output is required"),
        (lambda: miniplm.score(**SCORE, batch_tokens="many"), "batch_tokens: expected a whole number"),
        (lambda: miniplm.train(data="d", output="o", model={"depth": 3}), "no setting 'model.depth'"),
        (lambda: miniplm.train(data="d", output="o", steps=0), "steps must be at least 1, got 0"),
        (lambda: miniplm.score("runs/pool"), "as keywords, or one config.ScoreConfig alone, got 'runs/pool'"),
        (lambda: miniplm.score(config.ScoreConfig(**SCORE), data="d"), "and keywords"),
        (lambda: miniplm.run(config.ScoreConfig(**SCORE)), "one config.RunConfig alone"),
    ],
)
def test_wrong_settings_are_a_value_error_of_one_line(called, call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert called == []


def test_what_a_command_refuses_is_a_value_error(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        miniplm.score(data=tmp_path / "nowhere", output=tmp_path / "o", teacher="t")
    assert issubclass(UserError, ValueError) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_shows_every_setting(name):
    function = getattr(miniplm, name)
    assert name in dir(miniplm) and getattr(miniplm, name) is function
    shown = pydoc.render_doc(function, renderer=pydoc.plaintext)
    schema = Schema(COMMANDS[name][0])
    assert all(f"\n        {setting}: " in shown for setting in schema.kinds)
    assert [*inspect.signature(function).parameters] == [each.name for each in fields(COMMANDS[name][0])]


def test_no_command_has_the_name_of_a_module():
    """`import miniplm.score` would put a module where the function is."""
    root = Path(miniplm.__file__).parent
    assert [name for name in FUNCTIONS if (root / name).exists() or (root / f"{name}.py").exists()] == []
    assert inspect.ismodule(importlib.import_module("miniplm.stages.score")) and callable(miniplm.score)


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="module 'miniplm' has no attribute 'scores'"):
        miniplm.scores  # noqa: B018


def test_importing_is_light():
    code = """
import sys, miniplm
assert not {"torch", "numpy", "jsonargparse", "yaml", "miniplm.cli"} & set(sys.modules)
dir(miniplm), miniplm.train, miniplm.score.__doc__
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_model_takes_the_latest_checkpoint_of_a_training(tiny_model, tmp_path):
    import torch

    for step, seed in ((1, 0), (2, 1)):
        tiny_model(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", seed=seed)
    model = miniplm.load_model(str(tmp_path / "run"))
    latest = miniplm.load_model(str(tmp_path / "run" / "checkpoints" / "step-00000002"), torch.bfloat16)
    assert model.head_weight.dtype == torch.float32 and latest.head_weight.dtype == torch.bfloat16
    assert torch.equal(model.head_weight.bfloat16(), latest.head_weight)
