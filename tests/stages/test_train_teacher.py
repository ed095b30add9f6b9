"""train --teacher: Vanilla KD against plain PyTorch with whole logits, and the runs that it makes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    EOS,
    STUDENT,
    check_equal_runs,
    make_config,
    metrics,
    plain_loss,
    stop_after,
    truncate,
)
from transformers import AutoModelForCausalLM, GPT2Config

from miniplm.config import (
    CheckpointConfig,
    DistillConfig,
    EvalConfig,
    ExportConfig,
    OptimizerConfig,
    TrainConfig,
)
from miniplm.data.order import global_batch
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages import train as training
from miniplm.stages.export import export
from miniplm.stages.train import Teacher, make_optimizer, train, train_step
from miniplm.training.checkpoints import latest_checkpoint

TEACHERS = {
    "wider": dict(hidden_size=64, num_hidden_layers=3),
    "higher head": dict(vocab_size=512, tie_word_embeddings=False),
    "lower head": dict(vocab_size=480),
    "adapted": dict(config_class=GPT2Config, n_embd=48, n_layer=1, n_head=2),
}


@pytest.fixture(scope="module")
def teachers(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {name: tiny_model(root / name, seed=7, **settings) for name, settings in TEACHERS.items()}


@pytest.fixture(scope="module")
def student(tiny_model, tmp_path_factory):
    return tiny_model(
        tmp_path_factory.mktemp("student") / "model", seed=1, tie_word_embeddings=False, initializer_range=0.1
    )


@pytest.fixture(scope="module")
def rows():
    """Chunks of very different lengths with EOS inside, ids below 480, one without a target."""
    generator = np.random.default_rng(0)
    chunks = [generator.integers(1, 480, n) for n in (40, 3, 65, 2, 17, 64, 9, 33)]
    for chunk in chunks:
        chunk[generator.random(len(chunk)) < 0.15] = EOS
    chunks[3][:] = EOS
    return chunks


def one_step(model, batches, teacher=None, lr=0.0, dtype=torch.float32):
    """A step without clipping, so that the gradients stay."""
    return train_step(
        model, make_optimizer(model, OptimizerConfig()), batches, lr, 1e9, dtype, teacher=teacher
    )


def with_teacher(config, teacher):
    return replace(config, distill=replace(config.distill, teacher=teacher))


def load_teacher(folder, alpha, temperature=1.0, dtype=torch.float32):
    return Teacher(load_model(folder, dtype).requires_grad_(False), alpha, temperature)


def plain_losses(student, teacher, rows, alpha, temperature, document_mask):
    """(loss, cross-entropy, KL divergence) over all positions whose input is not EOS: transformers' models,
    whole logits, in float64."""
    cross_entropies, divergences = [], []
    vocabulary = min(student.config.vocab_size, teacher.config.vocab_size)
    for row in rows:
        bounds = np.flatnonzero(row[:-1] == EOS) + 1 if document_mask else []
        for inputs, targets in zip(np.split(row[:-1], bounds), np.split(row[1:], bounds), strict=True):
            if len(inputs):
                ids, counted = torch.tensor(inputs)[None], torch.tensor(inputs != EOS)
                z, teacher_z = (
                    model(input_ids=ids).logits[0, counted, :vocabulary] for model in (student, teacher)
                )
                cross_entropies.append(
                    -z.log_softmax(-1).gather(1, torch.tensor(targets)[counted, None])[:, 0]
                )
                p, q = (teacher_z / temperature).softmax(-1), (z / temperature).softmax(-1)
                divergences.append((p * (p / q).log()).sum(-1))
    cross_entropy, divergence = torch.cat(cross_entropies).mean(), torch.cat(divergences).mean()
    return (1 - alpha) * cross_entropy + alpha * divergence, cross_entropy, divergence


# ---- the step ----


@pytest.mark.parametrize("micro_batch_tokens, document_mask", [(1, False), (70, False), (10_000, True)])
@pytest.mark.parametrize(
    "name, alpha, temperature",
    [
        ("wider", 0.3, 1.0),
        ("higher head", 0.5, 2.0),
        ("lower head", 0.9, 0.7),
        ("adapted", 0.5, 1.0),
        ("wider", 1.0, 1.0),
    ],
)
def test_loss_and_gradients_are_those_of_plain_pytorch(
    student, teachers, rows, name, alpha, temperature, micro_batch_tokens, document_mask
):
    theirs, their_teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
        for folder in (student, teachers[name])
    )
    expected = plain_losses(
        theirs, their_teacher.requires_grad_(False), rows, alpha, temperature, document_mask
    )
    expected[0].backward()
    ours, teacher = load_model(student), load_teacher(teachers[name], alpha, temperature)
    batches = global_batch(rows, EOS, micro_batch_tokens, document_mask)
    counts = [training.num_targets([batch]) for batch in batches]
    assert len(counts) == {1: 8, 70: 5, 10_000: 1}[micro_batch_tokens] and (
        len(counts) == 1 or len(set(counts)) > 2
    )
    loss, grad_norm, *parts = one_step(ours, batches, teacher)
    assert [loss, *parts] == pytest.approx([value.item() for value in expected], rel=1e-5)
    gradients = {parameter_name: parameter.grad for parameter_name, parameter in theirs.named_parameters()}
    assert grad_norm == pytest.approx(
        torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item(), rel=1e-4
    )
    for parameter_name, parameter in ours.named_parameters():
        exact = gradients[parameter_name]
        assert (parameter.grad - exact).norm() <= 2e-5 * exact.norm() + 1e-9, parameter_name
    assert (name == "lower head") == (not ours.head_weight.grad[480:].any())


def test_alpha_0_is_training_without_a_teacher_to_rounding_and_alpha_1_leaves_the_targets_out(
    student, teachers, rows
):
    def gradients(rows, alpha=None):
        model = load_model(student)
        teacher = None if alpha is None else load_teacher(teachers["wider"], alpha)
        results = one_step(model, global_batch(rows, EOS, 70), teacher)
        return results, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    (loss, norm), plain = gradients(rows)
    (kd_loss, kd_norm, cross_entropy, _), kd = gradients(rows, 0.0)
    assert (kd_loss, cross_entropy, kd_norm) == pytest.approx((loss, loss, norm), rel=1e-6)
    assert (kd - plain).norm() <= 1e-6 * plain.norm()  # the count of targets is divided by in another order

    (loss, _, cross_entropy, divergence), by_divergence = gradients(rows, 1.0)
    assert loss == divergence != cross_entropy
    others = [row.copy() for row in rows]
    for row in others:  # the last id of a chunk is a target alone, no input
        row[-1] = 7
    (_, _, other_cross_entropy, other_divergence), by_others = gradients(others, 1.0)
    assert other_divergence == divergence and other_cross_entropy != cross_entropy
    assert torch.allclose(by_others, by_divergence, rtol=0, atol=1e-8) and by_divergence.abs().max() > 1e-3


def test_teacher_is_frozen(student, teachers, rows):
    model, teacher = load_model(student), load_teacher(teachers["wider"], 0.5)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    optimizer = make_optimizer(model, OptimizerConfig())
    for _ in range(2):
        train_step(model, optimizer, global_batch(rows, EOS, 70), 1e-2, 1.0, torch.float32, teacher=teacher)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.model.state_dict().items())
    assert not any(
        tensor is parameter
        for group in optimizer.param_groups
        for tensor in group["params"]
        for parameter in teacher.model.parameters()
    )


def test_bfloat16_step_is_close_and_its_gradients_are_float32(student, teachers, rows):
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(student)
        teacher = load_teacher(teachers["wider"], 0.5, dtype=dtype)
        results[dtype] = one_step(model, global_batch(rows, EOS, 70), teacher, dtype=dtype)
        assert all(
            parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters()
        )
    assert (
        results[torch.bfloat16] == pytest.approx(results[torch.float32], rel=3e-2)
        and results[torch.bfloat16] != results[torch.float32]
    )


def test_step_without_a_target_is_skipped(student, teachers):
    model = load_model(student)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    results = one_step(
        model, global_batch([np.full(5, EOS)], EOS, 10), load_teacher(teachers["wider"], 0.5), lr=1e-2
    )
    assert all(math.isnan(value) for value in (results[0], *results[2:]))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


# ---- whole runs ----


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
    order = training.DataOrder(training.Corpus(tiny_corpus).num_tokens, 200, whole.seed)
    context = order.epoch_tokens // len(order.rows)
    flops = 3 * model.flops_per_token(context) + teacher.flops_per_token(context)
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e11)

    checkpoint, corpus = latest_checkpoint(output), training.Corpus(tiny_corpus)
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
    original, seen = training.distillation_losses, []

    def watching(student, teacher, batch, compute):
        seen.append(
            (
                teacher.model.training,
                {(parameter.dtype, parameter.requires_grad) for parameter in teacher.model.parameters()},
            )
        )
        return original(student, teacher, batch, compute)

    monkeypatch.setattr(training, "distillation_losses", watching)
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


def test_state_of_a_run_from_before_there_were_teachers_continues(config, monkeypatch):
    config = replace(config, distill=DistillConfig())
    stop_after(config, 14, monkeypatch)
    path = Path(latest_checkpoint(config.output)) / "trainer_state.json"
    found = read_json(path)
    assert found["state"].pop("parts") == []
    path.write_text(json.dumps(found))
    train(config)
    assert metrics(config.output)[-1]["step"] == 26


class Killed(BaseException):
    """Nothing catches it: what is on disk is what SIGKILL would leave."""


def kill_in_step(config, step, monkeypatch):
    original, calls = training.train_step, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "train_step", dying)
        train(config)


@pytest.mark.parametrize("end", [stop_after, kill_in_step])
@pytest.mark.parametrize("step", [14, 16])  # amid two lines; at a line
def test_stopped_or_killed_it_ends_in_the_same_bits(config, whole, end, step, monkeypatch):
    end(config, step, monkeypatch)
    state = read_json(Path(latest_checkpoint(config.output)) / "trainer_state.json")["state"]
    assert state["step"] == (12 if end is kill_in_step else step)
    assert (
        len(state["parts"]) == len(state["losses"]) == {12: 3, 14: 2, 16: 0}[state["step"]]
    )  # since the line at 9, 12 or 16
    train(config)
    check_equal_runs(config.output, whole.output)


@pytest.mark.parametrize("call", [1, 30])
def test_stopped_within_a_step_it_ends_in_the_same_bits(config, whole, call, monkeypatch):
    original, calls = training.distillation_losses, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, suppress(training.Interrupted):
        patch.setattr(training, "distillation_losses", stopping)
        train(config)
        raise AssertionError("not stopped")
    train(config)
    check_equal_runs(config.output, whole.output)


def test_skipped_steps_have_no_losses(config, monkeypatch):
    original, calls = training.distillation_losses, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if 5 <= len(calls) <= 8 else 1)  # one micro-batch to a step

    with monkeypatch.context() as patch:
        patch.setattr(training, "distillation_losses", poisoned)
        train(replace(config, steps=12, log_interval=5, micro_batch_tokens=10_000, eval=EvalConfig()))
    lines = {line["step"]: line for line in metrics(config.output)}
    assert sorted(lines) == [5, 6, 7, 8, 10, 12] and [
        step for step, line in lines.items() if line.get("skipped")
    ] == [5, 6, 7, 8]
    for step, line in lines.items():
        assert all(
            (line[name] is None) == (step in (6, 7, 8)) for name in ("loss", "cross_entropy", "kl_divergence")
        )


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
    monkeypatch.setattr(training, "load_model", None)
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
    assert lines[-1]["eval_loss"] < lines[0]["cross_entropy"] - 1 and lines[-1]["eval_loss"] == pytest.approx(
        teacher_loss, abs=0.5
    )


# ---- refusals ----


def test_teacher_that_does_not_fit_leaves_nothing_behind(config, tiny_model, tmp_path):
    broken, reordered = (Path(tiny_model(tmp_path / name)) for name in ("broken", "reordered"))
    truncate(broken / "model.safetensors")
    tokenizer = json.loads((reordered / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (reordered / "tokenizer.json").write_text(json.dumps(tokenizer))
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
    highest = training.Corpus(tiny_corpus).highest_id
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
        (dict(teacher=None), "distill.alpha and distill.temperature have no say without distill.teacher"),
        (
            dict(teacher=None, temperature=1.0),
            "distill.alpha and distill.temperature have no say without distill.teacher",
        ),
        (
            dict(teacher=None, alpha=0.5),
            "distill.alpha and distill.temperature have no say without distill.teacher",
        ),
    ],
)
def test_settings_out_of_range_and_without_a_teacher(config, changed, message):
    with pytest.raises(ValueError, match=message):
        replace(config.distill, **changed)


# ---- the command line, the model card ----


def command(data, output, *arguments, **settings):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "miniplm.cli",
            "train",
            "--data",
            data,
            "--output",
            str(output),
            "--device",
            "cpu",
            *arguments,
        ],
        capture_output=True,
        text=True,
        **settings,
    )


def test_command_line(tiny_corpus, teachers, tmp_path):
    shape = [
        "--model.hidden_size",
        "32",
        "--model.num_hidden_layers",
        "1",
        "--model.num_attention_heads",
        "4",
        "--model.intermediate_size",
        "64",
    ]
    shape += ["--steps", "3", "--batch_tokens", "300", "--peak_tflops", "1"]
    done = command(
        tiny_corpus,
        tmp_path / "out",
        "--teacher",
        teachers["adapted"],
        "--alpha",
        "0.3",
        "--temperature",
        "2",
        *shape,
    )
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "out")
    assert (
        line["loss"] == pytest.approx(0.7 * line["cross_entropy"] + 0.3 * line["kl_divergence"], rel=1e-5)
        and line["kl_divergence"] > 0
    )
    assert "0.7 · cross-entropy + 0.3 · KL divergence" in done.stderr and "trained 3 steps" in done.stdout
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["complete"] and manifest["teacher"] == "adapted"
    for arguments in (
        ["--teacher", teachers["wider"], "--alpha", "2"],
        ["--alpha", "0.3"],
        ["--teacher", str(tmp_path / "nowhere")],
    ):
        refused = command(tiny_corpus, tmp_path / "other", *arguments, *shape)
        assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
        assert not (tmp_path / "other").exists()


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
