"""--profile: a trace of three steps; results, and what a run leaves behind, are as without it."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from outputs import contents
from training_runs import check_equal_runs, make_config, stop_after

from miniplm.cli import main
from miniplm.config import ScoreConfig
from miniplm.runtime.errors import UserError
from miniplm.runtime.profiling import FIRST, STEPS, trace
from miniplm.stages.score import score
from miniplm.stages.train import train


def traced_steps(path):
    """How many steps are in a trace; it must hold our ops."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    names = [event.get("name", "") for event in json.loads(text)["traceEvents"]]
    assert "miniplm::swiglu" in names
    return len({name for name in names if name.startswith("ProfilerStep#")})


@pytest.mark.slow
def test_training(tiny_corpus, tmp_path, capsys):
    config = make_config(tiny_corpus, tmp_path / "plain")
    train(config)
    path = tmp_path / "trace.json.gz"
    capsys.readouterr()
    train(replace(config, output=str(tmp_path / "traced"), profile=str(path)))
    assert f"a trace is in {path}: open it in chrome://tracing" in capsys.readouterr().err
    assert traced_steps(path) == STEPS
    check_equal_runs(tmp_path / "plain", tmp_path / "traced")
    assert not list(tmp_path.glob(".trace*"))


@pytest.mark.slow
def test_a_run_that_is_stopped_writes_what_was_traced(tiny_corpus, tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    stop_after(replace(make_config(tiny_corpus, tmp_path / "run"), profile=str(path)), FIRST + 2, monkeypatch)
    assert 2 <= traced_steps(path) <= 3  # the step that was broken off had begun


def test_a_run_that_is_too_short_says_so(tiny_corpus, tmp_path, capsys):
    train(
        replace(
            make_config(tiny_corpus, tmp_path / "run"), steps=FIRST - 1, profile=str(tmp_path / "trace.json")
        )
    )
    assert (
        f"no trace: it begins after {FIRST} steps" in capsys.readouterr().err
        and not (tmp_path / "trace.json").exists()
    )


@pytest.mark.slow
def test_scoring(tiny_corpus, tiny_model, tmp_path):
    config = dict(data=tiny_corpus, teacher=tiny_model(tmp_path / "t"), device="cpu", batch_tokens=64)
    score(ScoreConfig(**config, output=str(tmp_path / "plain")))
    score(ScoreConfig(**config, output=str(tmp_path / "traced"), profile=str(tmp_path / "trace.json")))
    assert traced_steps(tmp_path / "trace.json") == STEPS
    assert contents(tmp_path / "plain") == contents(tmp_path / "traced")


def test_a_trace_that_cannot_be_written_is_refused_at_once(tiny_corpus, tmp_path, capsys):
    assert (
        main(
            [
                "train",
                "--data",
                tiny_corpus,
                "--output",
                str(tmp_path / "run"),
                "--profile",
                str(tmp_path / "none" / "trace.json"),
            ]
        )
        == 2
    )
    assert (
        f"there is no folder {tmp_path / 'none'}: make it" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
    assert (
        main(
            [
                "score",
                "--data",
                tiny_corpus,
                "--teacher",
                "x",
                "--output",
                str(tmp_path / "run"),
                "--profile",
                "trace.txt",
            ]
        )
        == 2
    )
    assert "profile must be a .json or .json.gz file, got 'trace.txt'" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no folder"):
        score(
            ScoreConfig(
                data=tiny_corpus,
                teacher="x",
                output=str(tmp_path / "run"),
                profile=str(tmp_path / "none" / "trace.json"),
            )
        )


def test_without_a_path_nothing_is_traced(tmp_path):
    """The profiler, which slows every step down, does not run."""

    def profiled(path):
        with trace(path) as profiler_step:
            found = []
            for _ in range(FIRST + STEPS):
                found.append(torch.autograd._profiler_enabled())
                profiler_step()
            return found

    assert any(profiled(str(tmp_path / "trace.json")))  # so it would show
    assert not any(profiled(None))
