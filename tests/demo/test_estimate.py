"""How long the demo is said to take: what its stages have yet to do, at the speed of their models."""

import time

import pytest

from miniplm.config import StudentConfig
from miniplm.demo import estimate
from miniplm.demo.estimate import OTHER_SECONDS, Speed, expected_seconds, in_words, measured_speed
from miniplm.pipeline import plan_stages
from miniplm.runtime.artifacts import complete_output, open_output

STAGES = {
    "held-out": {"stage": "prepare", "data": "h", "tokenizer": "t"},
    "pool": {"stage": "prepare", "data": "c", "tokenizer": "t", "take": [0.25, 1.0]},
    "teacher": {
        "stage": "train",
        "data": "${pool}",
        "eval": {"data": "${held-out}", "interval": 10, "chunks": 2},
        "model": {"hidden_size": 64, "num_attention_heads": 2},
        "steps": 25,
        "batch_tokens": 1000,
    },
    "reference": {
        "stage": "train",
        "data": "${pool}",
        "model": {"hidden_size": 32, "num_attention_heads": 2},
        "steps": 5,
        "batch_tokens": 1000,
    },
    "scores": {"stage": "score", "data": "${pool}", "teacher": "${teacher}", "reference": "${reference}"},
    "loss": {"stage": "evaluate", "model": "${reference}", "data": "${held-out}"},
}
TOKENS = {"h": 1e4, "c": 1e6}
SPEEDS = {64: Speed(3e-4, 1e-4), 32: Speed(2e-5, 1e-5)}
PARTS = {
    "teacher": 25 * 1000 * 3e-4 + 2 * 2 * 256 * 1e-4,
    "reference": 5 * 1000 * 2e-5,
    "scores": 0.75e6 * (1e-4 + 1e-5),
    "loss": 1e4 * 1e-5,
}


def seconds(folder) -> float:
    return expected_seconds(
        plan_stages(STAGES, folder), TOKENS.__getitem__, lambda model: SPEEDS[model.hidden_size]
    )


def test_every_stage_counts_until_it_is_complete(tmp_path):
    left = dict(PARTS)
    assert seconds(tmp_path) == pytest.approx(OTHER_SECONDS + sum(left.values()))
    for name, stage in (("teacher", "train"), ("reference", "train"), ("scores", "score")):
        open_output(tmp_path / name, stage, {})
        assert seconds(tmp_path) == pytest.approx(OTHER_SECONDS + sum(left.values()))
        complete_output(tmp_path / name, {})
        del left[name]
        assert seconds(tmp_path) == pytest.approx(OTHER_SECONDS + sum(left.values()))
    (tmp_path / "loss.json").write_text("{}")
    assert seconds(tmp_path) == OTHER_SECONDS


def test_a_step_is_timed_after_one_that_is_not(monkeypatch):
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.1)
    delays = iter([0.3, *[0.02] * 100])
    assert 0.02 <= estimate._seconds(lambda: time.sleep(next(delays))) < 0.15


def test_the_speed_of_a_model(monkeypatch):
    monkeypatch.setattr(estimate, "TIMED_SECONDS", 0.01)
    model = StudentConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, model_type="llama"
    )
    speed = measured_speed(model, 50)
    assert 0 < speed.forward < 1e-2 and 0 < speed.step < 1e-2


def test_in_words():
    assert [in_words(value) for value in (3, 44, 89, 91, 400)] == [
        "10 seconds",
        "40 seconds",
        "90 seconds",
        "2 minutes",
        "7 minutes",
    ]
