"""train with a teacher (Vanilla KD): the runs that it makes."""

import json
import math
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    STUDENT,
    check_equal_runs,
    make_config,
    make_teachers,
    metrics,
    plain_loss,
    stop_after,
    swap_two_tokens,
    truncate,
)
from transformers import AutoModelForCausalLM

from miniplm.config import (
    CheckpointConfig,
    DistillConfig,
    EvalConfig,
    ExportConfig,
    OptimizerConfig,
    TrainConfig,
)
from miniplm.data.corpus import Corpus
from miniplm.data.order import DataOrder
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.runtime.interrupts import Interrupted
from miniplm.stages import train as stage
from miniplm.stages.export import export
from miniplm.stages.train import train
from miniplm.training import loop
from miniplm.training import step as training_step
from miniplm.training.checkpoints import latest_checkpoint


@pytest.fixture(scope="module")
def teachers(tiny_model, tmp_path_factory):
    return make_teachers(tiny_model, tmp_path_factory.mktemp("teachers"))


def with_teacher(config, teacher):
    return replace(config, distill=replace(config.distill, teacher=teacher))


@pytest.fixture
def config(tiny_corpus, teachers, tmp_path):
    return replace(
        make_config(tiny_corpus, tmp_path / "out"),
        distill=DistillConfig(teachers["wider"], alpha=0.3, temperature=1.5),
    )


@pytest.fixture(scope="module")
def whole(tiny_corpus, teachers, tmp_path_factory):
    """The config of a run that nothing stopped."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("whole") / "out")
    config = replace(config, distill=DistillConfig(teachers["wider"], alpha=0.3, temperature=1.5))
    train(config)
    return config


def test_run_writes_what_it_says(config, whole, tiny_corpus, tmp_path, capsys):
    output = Path(whole.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 9, 12, 16, 18, 20, 24, 26]
    assert all(list(line)[:4] == ["step", "loss", "cross_entropy", "kl_divergence"] for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(
            0.7 * line["cross_entropy"] + 0.3 * line["kl_divergence"], rel=1e-5
        )

    model, teacher = load_model(latest_checkpoint(output)), load_model(whole.distill.teacher)
    order = DataOrder(Corpus(tiny_corpus).num_tokens, 200, whole.seed)
    context = order.epoch_tokens // len(order.rows)
    flops = 3 * model.flops_per_token(context) + teacher.flops_per_token(context)
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e11)

    checkpoint, corpus = latest_checkpoint(output), Corpus(tiny_corpus)
    with torch.no_grad():  # plain cross-entropy, as without a teacher
        held_out = plain_loss(AutoModelForCausalLM.from_pretrained(checkpoint), corpus.rows(range(6))).item()
    assert lines[-1]["eval_loss"] == pytest.approx(held_out, abs=1e-5)
    assert (
        sum(path.stat().st_size for path in Path(checkpoint).glob("*.safetensors"))
        < 1.1 * 3 * 4 * model.num_parameters()
    )  # no teacher

    manifest = read_json(output / "manifest.json")
    assert {
        name: manifest[name] for name in ("teacher", "loss", "cross_entropy", "kl_divergence", "eval_loss")
    } == {
        "teacher": "wider",
        **{name: lines[-1][name] for name in ("loss", "cross_entropy", "kl_divergence", "eval_loss")},
    }
    assert (manifest["identity"]["alpha"], manifest["identity"]["temperature"]) == (0.3, 1.5)
    assert str(Path(whole.distill.teacher).parent) not in (output / "manifest.json").read_text()

    train(
        replace(config, log_interval=1, checkpoint=CheckpointConfig(interval=100))
    )  # the means over the steps since the last line
    said = capsys.readouterr().err
    assert (
        f"the loss is 0.7 · cross-entropy + 0.3 · KL divergence from {config.distill.teacher} at "
        f"temperature 1.5; "
        f"the teacher takes {teacher.flops_per_token(context) / flops:.0%} of {flops / 1e6:,.2f} MFLOPs per "
        f"token"
    ) in said
    every, last = {line["step"]: line for line in metrics(config.output)}, 0
    for line in lines:
        for name in ("loss", "cross_entropy", "kl_divergence"):
            assert line[name] == pytest.approx(
                np.mean([every[step][name] for step in range(last + 1, line["step"] + 1)]), rel=1e-12
            )
        last = line["step"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_of_a_run_is_frozen_and_computes_in_the_runs_dtype(config, dtype, monkeypatch):
    original, seen = training_step.distillation_losses, []

    def watching(student, teacher, batch, compute):
        seen.append(
            (
                teacher.model.training,
                {(parameter.dtype, parameter.requires_grad) for parameter in teacher.model.parameters()},
            )
        )
        return original(student, teacher, batch, compute)

    monkeypatch.setattr(training_step, "distillation_losses", watching)
    train(replace(config, steps=1, eval=EvalConfig(), dtype=dtype))
    assert seen and all(found == (False, {(getattr(torch, dtype), False)}) for found in seen)
    assert metrics(config.output)[0]["loss"] > 0


def test_runs_without_a_teacher_say_nothing_of_one(config):
    train(replace(config, distill=DistillConfig(), steps=4))
    assert not {"cross_entropy", "kl_divergence"} & metrics(config.output)[0].keys()
    manifest = read_json(f"{config.output}/manifest.json")
    assert not {"teacher", "alpha", "temperature", "cross_entropy"} & (
        manifest.keys() | manifest["identity"].keys()
    )


class Killed(BaseException):
    """Nothing catches it: what is on disk is what SIGKILL would leave."""


def kill_in_step(config, step, monkeypatch):
    original, calls = loop.train_step, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "train_step", dying)
        train(config)


@pytest.mark.parametrize("end", [stop_after, kill_in_step])
@pytest.mark.parametrize("step", [14, 16])  # amid two lines; at a line
def test_stopped_or_killed_it_ends_in_the_same_bits(config, whole, end, step, monkeypatch):
    end(config, step, monkeypatch)
    state = read_json(Path(latest_checkpoint(config.output)) / "trainer_state.json")["state"]
    assert state["step"] == (12 if end is kill_in_step else step)
    assert (
        len(state["loss_components"]) == len(state["losses"]) == {12: 3, 14: 2, 16: 0}[state["step"]]
    )  # since the line at 9, 12 or 16
    train(config)
    check_equal_runs(config.output, whole.output)


@pytest.mark.parametrize("call", [1, 30])
def test_stopped_within_a_step_it_ends_in_the_same_bits(config, whole, call, monkeypatch):
    original, calls = training_step.distillation_losses, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, suppress(Interrupted):
        patch.setattr(training_step, "distillation_losses", stopping)
        train(config)
        raise AssertionError("not stopped")
    train(config)
    check_equal_runs(config.output, whole.output)


def test_every_setting_of_the_teacher_makes_another_run(config, whole, teachers):
    for changed, difference in [
        (dict(alpha=0.4), "alpha was 0.3"),
        (dict(temperature=1.0), "temperature was 1.5"),
        (dict(teacher=teachers["higher head"]), "teacher was"),
        (dict(teacher=None, alpha=0.5, temperature=1.0), "teacher was"),
    ]:
        with pytest.raises(UserError, match=difference):
            train(replace(whole, distill=replace(whole.distill, **changed)))
    first = metrics(whole.output)[0]
    for number, changed in enumerate(
        [dict(alpha=0.4), dict(temperature=1.0), dict(teacher=teachers["higher head"])]
    ):
        variant = replace(
            config,
            output=f"{config.output}{number}",
            steps=4,
            eval=EvalConfig(),
            distill=replace(config.distill, **changed),
        )
        train(variant)
        assert metrics(variant.output)[0]["loss"] != first["loss"]


def test_complete_run_is_left_alone_without_loading_the_teacher(whole, monkeypatch, capsys):
    monkeypatch.setattr(stage, "load_model", None)
    train(whole)
    assert "complete, nothing to do" in capsys.readouterr().out


def test_student_learns_the_teachers_distribution(tiny_corpus, tmp_path):
    """A teacher trained on the corpus; a student that sees nothing but its predictions (alpha 1) comes close
    to it."""
    common = dict(
        data=tiny_corpus,
        model=replace(STUDENT, num_hidden_layers=2),
        batch_tokens=600,
        optimizer=OptimizerConfig(lr=2e-2, warmup_steps=5),
        eval=EvalConfig(data=tiny_corpus),
        device="cpu",
        peak_tflops=1,
        log_interval=5,
    )
    train(TrainConfig(output=str(tmp_path / "teacher"), steps=40, **common))
    train(
        TrainConfig(
            output=str(tmp_path / "student"),
            steps=60,
            seed=11,
            distill=DistillConfig(str(tmp_path / "teacher"), alpha=1.0),
            **common,
        )
    )
    lines = metrics(tmp_path / "student")
    teacher_loss = read_json(tmp_path / "teacher" / "manifest.json")["eval_loss"]
    assert lines[0]["kl_divergence"] > 1 and lines[-1]["kl_divergence"] < 0.2 * lines[0]["kl_divergence"]
    assert lines[-1]["eval_loss"] < lines[0]["cross_entropy"] - 1
    assert lines[-1]["eval_loss"] == pytest.approx(teacher_loss, abs=0.5)


def test_teacher_that_does_not_fit_leaves_nothing_behind(config, tiny_model, tmp_path):
    broken, reordered = (Path(tiny_model(tmp_path / name)) for name in ("broken", "reordered"))
    truncate(broken / "model.safetensors")
    swap_two_tokens(reordered)
    for teacher, message in [
        (str(tmp_path / "missing"), "missing"),
        (str(broken), "model.safetensors is not a whole"),
        (str(reordered), "the tokenizer of .*reordered is not the corpus's"),
        (
            tiny_model(tmp_path / "small", vocab_size=400),
            r"teacher .*small predicts 400 ids, corpus .* has ids up to 4\d\d",
        ),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            train(with_teacher(config, teacher))
        assert "\n" not in str(raised.value) and not Path(config.output).exists()


def test_teacher_below_the_tokenizer_but_above_the_corpus_is_taken_with_a_word(
    config, tiny_model, tiny_corpus, tmp_path, capsys
):
    highest = Corpus(tiny_corpus).highest_id
    assert highest < 499
    with pytest.raises(UserError, match=f"has ids up to {highest}"):
        train(with_teacher(config, tiny_model(tmp_path / "one-less", vocab_size=highest)))
    train(
        replace(
            with_teacher(config, tiny_model(tmp_path / "just", vocab_size=highest + 1)),
            steps=2,
            eval=EvalConfig(),
        )
    )
    assert (
        f"the teacher predicts {highest + 1} ids, the student 500: the loss leaves the rest out"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(alpha=1.5), "alpha must be between 0 and 1, got 1.5"),
        (dict(alpha=-0.1), "alpha must be between 0 and 1"),
        (dict(alpha=math.nan), "alpha must be between 0 and 1"),
        (dict(temperature=0.0), "temperature must be above 0, got 0.0"),
        (dict(teacher=None), "no say without distill.teacher"),
        (dict(teacher=None, temperature=1.0), "no say without distill.teacher"),
        (dict(teacher=None, alpha=0.5), "no say without distill.teacher"),
    ],
)
def test_settings_out_of_range_and_without_a_teacher(config, changed, message):
    with pytest.raises(ValueError, match=message):
        replace(config.distill, **changed)


def test_model_card_says_what_the_loss_was(whole, tmp_path):
    run = Path(shutil.copytree(whole.output, tmp_path / "run"))
    export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "model")))
    text = (tmp_path / "model" / "README.md").read_text()
    assert (
        "| Loss | 0.7 × cross-entropy + 0.3 × KL divergence from the full distribution of wider at "
        "temperature 1.5 (Vanilla KD) |"
    ) in text
    assert (
        "- knowledge-distillation" in text
        and "- data-selection" not in text
        and str(Path(whole.distill.teacher).parent) not in text
    )
    manifest = read_json(run / "manifest.json")
    (run / "manifest.json").write_text(
        json.dumps({"stage": "train", "complete": False, "identity": manifest["identity"]})
    )  # not ended
    export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "unended")))
    assert (
        f"of a model with the hash {manifest['identity']['teacher']} at temperature 1.5"
        in (tmp_path / "unended" / "README.md").read_text()
    )
