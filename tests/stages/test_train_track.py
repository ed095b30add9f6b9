"""train --track, with modules that stand in for wandb and trackio."""

import importlib
import sys
from dataclasses import replace

import pytest
from training_runs import make_config, metrics

from miniplm.config import TrainConfig
from miniplm.runtime.errors import UserError
from miniplm.stages.train import train

STAND_IN = """
calls = []
failing = set()
def init(**settings):
    calls.append(("init", settings))
    if "init" in failing:
        raise RuntimeError("no account")
def log(figures, step):
    calls.append(("log", step, figures))
    if "log" in failing:
        raise RuntimeError("no network")
def finish():
    calls.append(("finish",))
"""


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{request.param}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield importlib.import_module(request.param)
    del sys.modules[request.param]


def short(data, output, tracker) -> TrainConfig:
    return replace(make_config(data, output), steps=6, track=tracker.__name__)


@pytest.mark.slow
def test_every_line_goes_there(tiny_corpus, tmp_path, tracker):
    config = short(tiny_corpus, tmp_path / "run", tracker)
    train(config)
    first, *logged, last = tracker.calls
    assert first[0] == "init" and first[1]["project"] == "miniplm" and first[1]["resume"] == "allow"
    assert first[1]["name"].startswith("run-") and first[1]["config"]["steps"] == 6
    assert ("id" in first[1]) == (tracker.__name__ == "wandb")
    assert last == ("finish",)
    lines = metrics(tmp_path / "run")
    assert [call[1] for call in logged] == [line["step"] for line in lines] == [4, 6]
    for (_, _, figures), line in zip(logged, lines, strict=True):
        assert figures.items() >= {key: value for key, value in line.items() if key.endswith("loss")}.items()
        assert all(isinstance(value, float) for value in figures.values())
    # it determines nothing: an equal run without is complete
    train(replace(config, track=None))
    assert len(tracker.calls) == 4


@pytest.mark.slow
def test_a_failure_on_the_way_is_a_line(tiny_corpus, tmp_path, tracker, capsys):
    tracker.failing.add("log")
    train(short(tiny_corpus, tmp_path / "run", tracker))
    said = capsys.readouterr().err
    assert said.count("training goes on without it") == 1 and "no network" not in said
    assert [call[0] for call in tracker.calls] == ["init", "log"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 6]


def test_one_that_cannot_start_is_a_users_mistake(tiny_corpus, tmp_path, tracker):
    tracker.failing.add("init")
    with pytest.raises(UserError, match=rf"{tracker.__name__} cannot start \(.*\): log in to it"):
        train(short(tiny_corpus, tmp_path / "run", tracker))


def test_one_that_is_not_installed_leaves_no_folder(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = replace(make_config(tiny_corpus, tmp_path / "run"), track="trackio")
    with pytest.raises(UserError, match="track trackio needs the package trackio: pip install trackio"):
        train(config)
    assert not (tmp_path / "run").exists()
