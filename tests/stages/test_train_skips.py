"""train, where losses are not finite: such steps are skipped, and too many of them stop the run."""

import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import check_equal_runs, files, make_config, metrics

from miniplm.config import CheckpointConfig, DistillConfig, EvalConfig
from miniplm.data.order import global_batch
from miniplm.models.loading import load_model
from miniplm.runtime.files import read_json
from miniplm.runtime.interrupts import Interrupted
from miniplm.stages import train as stage
from miniplm.stages.train import train
from miniplm.training import checkpoints, loop
from miniplm.training import step as training_step
from miniplm.training.checkpoints import checkpoint_folder, latest_checkpoint
from miniplm.training.loop import TrainingDiverged
from miniplm.training.starting import initial_model
from miniplm.training.step import learning_rate, make_optimizer, train_step


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


def poison(monkeypatch, steps, kind):
    """Make the loss or the gradient of these steps (1, 2, …) of the next run NaN or infinite."""
    original_step, original_loss, now = loop.train_step, training_step.summed_loss, []

    def counted_step(*arguments):
        now.append(1)
        return original_step(*arguments)

    def poisoned_loss(model, batch, dtype):
        loss = original_loss(model, batch, dtype)
        if len(now) not in steps or not torch.is_grad_enabled():
            return loss
        if kind == "gradient":
            return loss + (model.head_weight.sum() * 0).sqrt()  # adds 0, whose gradient is 0 · ∞
        return loss * kind

    monkeypatch.setattr(loop, "train_step", counted_step)
    monkeypatch.setattr(training_step, "summed_loss", poisoned_loss)


@pytest.mark.parametrize("kind", [math.nan, math.inf, "gradient"])
def test_step_that_is_not_finite_is_skipped(config, kind, monkeypatch, capsys):
    config = replace(config, steps=12, log_interval=3, checkpoint=CheckpointConfig(interval=1, keep=12))
    with monkeypatch.context() as patch:
        poison(patch, {5, 6, 9}, kind)
        train(config)
    lines = {line["step"]: line for line in metrics(config.output)}
    assert sorted(lines) == [3, 5, 6, 9, 12]
    assert [step for step, line in lines.items() if line.get("skipped")] == [5, 6, 9]
    for step in (5, 6, 9):
        assert lines[step]["grad_norm"] is None and lines[step]["lr"] == learning_rate(
            step, 12, config.optimizer
        )
    assert (
        lines[6]["loss"] is None and lines[5]["loss"] and lines[9]["loss"]
    )  # nothing since the line before; the steps 4; 7 and 8
    err = capsys.readouterr().err
    assert [f"step {step} skipped: loss " in err for step in range(1, 13)] == [
        step in (5, 6, 9) for step in range(1, 13)
    ]
    manifest = read_json(f"{config.output}/manifest.json")
    assert manifest["skipped"] == 3 and manifest["steps"] == 12

    def weights(step):
        return checkpoint_folder(config.output, step).joinpath("model.safetensors").read_bytes()

    assert weights(4) == weights(5) == weights(6) != weights(7)

    # Weights and the optimizer's state go on as if the skipped steps had not been: the same updates with the
    # same rates and rows.
    setup, sources = stage._set_up(config)
    model = initial_model(config, setup, sources)
    optimizer = make_optimizer(model, config.optimizer)
    for step in (1, 2, 3, 4, 7, 8, 10, 11, 12):
        batch = global_batch(
            setup.corpus.rows(setup.order.step(step - 1)),
            setup.corpus.eos_token_id,
            config.micro_batch_tokens,
        )
        train_step(model, optimizer, batch, learning_rate(step, 12, config.optimizer), 1.0, torch.float32)
    ours = load_model(latest_checkpoint(config.output))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))


def test_skips_survive_a_stop(config, monkeypatch):
    """A run stopped within a row of skipped steps counts on, and skips what the uninterrupted run skips."""
    config = replace(config, steps=12, max_skipped_steps=4, eval=EvalConfig())
    other = replace(config, output=config.output + "2")
    with monkeypatch.context() as patch:
        poison(patch, {5, 6, 7}, math.nan)
        train(config)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        poison(patch, {5, 6, 7}, math.nan)
        patch.setattr(
            loop, "note", lambda text: "step 6 skipped" in text and os.kill(os.getpid(), signal.SIGTERM)
        )
        train(other)
    with monkeypatch.context() as patch:
        poison(patch, {1}, math.nan)  # its first step is step 7
        train(other)
    check_equal_runs(config.output, other.output)


def test_too_many_in_a_row_stop_the_run(config, monkeypatch, tmp_path):
    config = replace(config, checkpoint=CheckpointConfig(interval=2, keep=1))  # max_skipped_steps 10
    good, copy = checkpoint_folder(config.output, 6), tmp_path / "copy"

    def keep_copy(folder, *arguments):
        checkpoints.save_checkpoint(folder, *arguments)
        if folder == good:
            shutil.copytree(folder, copy)

    with monkeypatch.context() as patch, pytest.raises(TrainingDiverged) as raised:
        poison(patch, set(range(7, 17)), "gradient")
        patch.setattr(loop, "save_checkpoint", keep_copy)
        train(config)
    assert "10 steps in a row, up to step 16" in str(raised.value) and "\n" not in str(raised.value)
    assert files(good) == files(copy) and files(copy)
    assert not checkpoint_folder(config.output, 16).exists()
    assert [line["step"] for line in metrics(config.output) if line.get("skipped")] == list(range(7, 17))
    assert not read_json(f"{config.output}/manifest.json")["complete"]

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingDiverged, match="10 steps in a row, up to step 16"),
    ):
        poison(patch, {1, 2}, math.nan)  # the skips before the latest checkpoint, that of step 14, count on
        train(config)
    train(config)  # what made the loss NaN is gone
    assert read_json(f"{config.output}/manifest.json")["skipped"] == 8
    assert [path.name for path in Path(config.output, "checkpoints").iterdir()] == ["step-00000026"]


def test_nine_in_a_row_do_not_stop_the_run(config, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {*range(3, 12), *range(13, 22)}, math.inf)
        train(config)
    assert read_json(f"{config.output}/manifest.json")["skipped"] == 18


def test_skipped_steps_have_no_losses(config, tiny_model, tmp_path, monkeypatch):
    teacher = DistillConfig(tiny_model(tmp_path / "teacher", seed=7), alpha=0.3)
    config = replace(config, distill=teacher, steps=12, log_interval=5, eval=EvalConfig())
    original, calls = training_step.distillation_losses, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if 5 <= len(calls) <= 8 else 1)  # one micro-batch to a step

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "distillation_losses", poisoned)
        train(replace(config, micro_batch_tokens=10_000))
    lines = {line["step"]: line for line in metrics(config.output)}
    assert sorted(lines) == [5, 6, 7, 8, 10, 12] and [
        step for step, line in lines.items() if line.get("skipped")
    ] == [5, 6, 7, 8]
    for step, line in lines.items():
        assert all(
            (line[name] is None) == (step in (6, 7, 8)) for name in ("loss", "cross_entropy", "kl_divergence")
        )
