"""train: the data order against its definition, the step against plain PyTorch, what a run writes."""

import functools
import itertools
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import EOS, STUDENT, files, make_config, metrics, plain_loss, write_corpus

from miniplm.config import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig
from miniplm.data.batches import IGNORE_INDEX
from miniplm.data.order import DataOrder, global_batch
from miniplm.models.decoder import Decoder, student_config
from miniplm.models.loading import load_model
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages import train as training
from miniplm.stages.train import learning_rate, make_optimizer, train, train_step
from miniplm.training.checkpoints import latest_checkpoint


@pytest.fixture
def config(tiny_corpus, tmp_path):
    return make_config(tiny_corpus, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """The config of a run that nothing stopped."""
    config = make_config(tiny_corpus, tmp_path_factory.mktemp("whole") / "out")
    train(config)
    return config


# ---- data order ----


def stream(num_tokens, seed, shuffle, epochs):
    """(row, first prediction) over the epochs, one by one."""
    at = 0
    for epoch in range(epochs):
        rows = [row for row, n in enumerate(num_tokens) if n > 1]
        if shuffle:
            rows = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
        for row in rows:
            yield row, at
            at += int(num_tokens[row]) - 1


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "rows, longest, batch_tokens", [(200, 40, 100), (57, 1025, 1024), (5, 12, 500), (1, 9, 8), (300, 3, 7)]
)
def test_steps_cut_the_stream_of_epochs_by_tokens(rows, longest, batch_tokens, shuffle):
    num_tokens = np.random.default_rng(rows).integers(0, longest + 1, rows)  # 0 and 1 give no prediction
    num_tokens[-1] = longest
    order = DataOrder(num_tokens, batch_tokens, seed=3, shuffle=shuffle)
    steps = 2 * order.steps_per_epoch + 3
    epochs = -(-steps * batch_tokens // order.epoch_tokens)
    expected = [[] for _ in range(steps)]
    for row, start in stream(num_tokens, 3, shuffle, epochs):
        if start < steps * batch_tokens:
            expected[start // batch_tokens].append(row)
    got = [order.step(step).tolist() for step in range(steps)]
    assert got == expected
    assert all(got)  # no step is empty
    seen = np.cumsum([sum(num_tokens[row] - 1 for row in part) for part in got])
    assert (abs(seen - batch_tokens * np.arange(1, steps + 1)) < longest).all()
    for step in reversed(range(steps)):  # whatever was asked for before
        assert (
            DataOrder(num_tokens, batch_tokens, seed=3, shuffle=shuffle).step(step).tolist()
            == order.step(step).tolist()
            == got[step]
        )


def test_epochs_and_seeds_differ_and_corpus_order_is_kept():
    num_tokens = np.full(50, 11)

    def epoch(number, seed=1, shuffle=True):
        return DataOrder(num_tokens, 500, seed, shuffle).step(number).tolist()

    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(50))
    assert len({tuple(rows) for rows in (epoch(0), epoch(1), epoch(0, seed=2), range(50))}) == 4
    assert epoch(0, shuffle=False) == epoch(7, shuffle=False) == list(range(50))


def test_order_refuses_what_leaves_steps_empty():
    with pytest.raises(
        UserError, match="batch_tokens 9 is below the longest chunk of the corpus, 10 predictions"
    ):
        DataOrder(np.array([3, 11, 4]), 9, 0)
    assert DataOrder(np.array([3, 11, 4]), 10, 0).steps_per_epoch == 2
    for nothing in ([], [1, 0, 1]):
        with pytest.raises(UserError, match="no token to predict"):
            DataOrder(np.array(nothing, np.int64), 10, 0)


# ---- the step ----


def test_learning_rate():
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.25, warmup_steps=10)
    rates = [learning_rate(step, 50, config) for step in range(1, 51)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[29] == pytest.approx((2.0 + 0.5) / 2)  # half-way between peak and end
    assert rates[49] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(1, 1, OptimizerConfig(lr=2.0, warmup_steps=0)) == pytest.approx(0.2)
    assert [learning_rate(step, 4, config) for step in (1, 4)] == pytest.approx(
        [0.2, 0.8]
    )  # the run ends within the warm-up


@pytest.fixture(scope="module")
def rows():
    """Chunks of very different lengths with EOS inside, some with next to nothing to predict."""
    generator = np.random.default_rng(0)
    chunks = [generator.integers(1, 500, n) for n in (40, 3, 65, 2, 17, 64, 9, 33)]
    for chunk in chunks:
        chunk[generator.random(len(chunk)) < 0.15] = EOS
    chunks[3][:] = EOS  # no target at all
    return chunks


@pytest.fixture
def folder(tiny_model, tmp_path):
    return tiny_model(tmp_path / "model", seed=1, tie_word_embeddings=False, initializer_range=0.1)


@pytest.mark.parametrize("micro_batch_tokens", [1, 70, 10_000])
def test_step_is_that_of_plain_pytorch(folder, rows, micro_batch_tokens):
    from transformers import AutoModelForCausalLM

    config = OptimizerConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1, max_grad_norm=0.5)
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double(),
        load_model(folder),
    )
    adam = torch.optim.AdamW(
        theirs.parameters(),
        lr=1,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=False,
    )
    optimizer = make_optimizer(ours, config)
    batches = global_batch(rows, EOS, micro_batch_tokens)
    assert len(batches) == {1: 8, 70: 5, 10_000: 1}[micro_batch_tokens]
    for step in range(1, 4):
        adam.param_groups[0]["lr"] = step * config.lr
        adam.zero_grad()
        expected = plain_loss(theirs, rows)
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.max_grad_norm)
        adam.step()
        loss, grad_norm = train_step(
            ours, optimizer, batches, step * config.lr, config.max_grad_norm, torch.float32
        )
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert grad_norm == pytest.approx(expected_norm.item(), rel=1e-4) and grad_norm > config.max_grad_norm
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.double(), theirs[name], atol=1e-5), name


def test_bfloat16_compute_accumulates_in_float32(folder, rows):
    model = load_model(folder)
    parts = []  # the gradient of each micro-batch on its own
    for batch in global_batch(rows * 6, EOS, 40):
        model.zero_grad()
        training.summed_loss(model, batch, torch.bfloat16).backward()
        parts.append({name: parameter.grad.double() for name, parameter in model.named_parameters()})
    model.zero_grad()
    for batch in global_batch(rows * 6, EOS, 40):
        training.summed_loss(model, batch, torch.bfloat16).backward()
    assert len(parts) > 30
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        exact = sum(part[name] for part in parts)
        assert (parameter.grad - exact).norm() <= 1e-6 * exact.norm(), name
        rounded = functools.reduce(
            lambda total, part, name=name: (total + part[name]).bfloat16().double(),
            parts,
            torch.zeros_like(exact),
        )
        assert (rounded - exact).norm() > 1e-3 * exact.norm(), name  # what adding up in bfloat16 would give


def test_bfloat16_step_is_close_and_keeps_small_updates(folder, rows):
    batches, models = global_batch(rows, EOS, 100), {}
    for dtype in (torch.float32, torch.bfloat16):
        models[dtype] = model = load_model(folder)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss, _ = train_step(model, make_optimizer(model, OptimizerConfig()), batches, 1e-6, 1.0, dtype)
        models[dtype].loss = loss
        for (
            name,
            parameter,
        ) in model.named_parameters():  # 1e-6 is far below the resolution of bfloat16 weights
            moved = (parameter - before[name]).abs()
            assert parameter.dtype == torch.float32 and 0 < moved.max() < 2e-6, name
    assert models[torch.bfloat16].loss == pytest.approx(models[torch.float32].loss, rel=3e-3)
    assert models[torch.bfloat16].loss != models[torch.float32].loss


def test_step_without_a_target_is_skipped(folder):
    model = load_model(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss, _ = train_step(
        model,
        make_optimizer(model, OptimizerConfig()),
        global_batch([np.full(5, EOS)], EOS, 10),
        1e-2,
        1.0,
        torch.float32,
    )
    assert math.isnan(loss)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_targets_after_eos_are_ignored(rows):
    batch = global_batch(rows, EOS, 10_000)[0]
    assert ((batch.targets == IGNORE_INDEX) == (batch.input_ids == EOS)).all()
    assert training.num_targets([batch]) == sum(int((row[:-1] != EOS).sum()) for row in rows)


def test_core_needs_no_corpus_on_disk(monkeypatch):
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = [np.arange(2, 2 + n) for n in (9, 30, 17)]
    order = DataOrder(np.array([len(row) for row in rows]), 40, seed=0)
    model = Decoder(student_config(STUDENT, 50, EOS))
    optimizer = make_optimizer(model, OptimizerConfig())
    losses = [
        train_step(
            model,
            optimizer,
            global_batch([rows[row] for row in order.step(step)], EOS, 20),
            1e-2,
            1.0,
            torch.float32,
        )[0]
        for step in range(20)
    ]
    assert losses[-1] < losses[0] - 1


# ---- whole runs ----


def test_run_writes_what_it_says(whole, tiny_corpus, capsys):
    from safetensors import safe_open
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = Path(whole.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [4, 8, 9, 12, 16, 18, 20, 24, 26]
    assert [line["step"] for line in lines] == steps
    assert [line["step"] for line in lines if "eval_loss" in line] == [9, 18, 26]
    assert [line["lr"] for line in lines] == [learning_rate(step, 26, whole.optimizer) for step in steps]
    corpus_tokens = training.Corpus(tiny_corpus).num_tokens
    order = DataOrder(corpus_tokens, 200, whole.seed)
    tokens = np.cumsum([(corpus_tokens[order.step(step)] - 1).sum() for step in range(26)])
    assert [line["tokens"] for line in lines] == [tokens[step - 1] for step in steps]
    model = load_model(latest_checkpoint(output))
    flops = 3 * model.flops_per_token(order.epoch_tokens // len(order.rows))
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e11)

    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-00000024",
        "step-00000026",
    ]
    checkpoint = latest_checkpoint(output)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    corpus = training.Corpus(tiny_corpus)
    with torch.no_grad():
        assert lines[-1]["eval_loss"] == pytest.approx(
            plain_loss(theirs, corpus.rows(range(6))).item(), abs=1e-5
        )
    assert (
        AutoTokenizer.from_pretrained(checkpoint)("a model")["input_ids"]
        == AutoTokenizer.from_pretrained(corpus.tokenizer)("a model")["input_ids"]
    )
    with safe_open(f"{checkpoint}/optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name, _ in model.named_parameters()
        }
    assert all(path.suffix in (".json", ".safetensors") for path in Path(checkpoint).iterdir())

    manifest = read_json(output / "manifest.json")
    assert manifest["complete"] and manifest["stage"] == "train"
    expected = {
        "steps": 26,
        "skipped": 0,
        "tokens": int(tokens[-1]),
        "loss": lines[-1]["loss"],
        "eval_loss": lines[-1]["eval_loss"],
        "parameters": theirs.num_parameters(),
    }
    assert {key: manifest[key] for key in expected} == expected
    assert (
        manifest["corpus"]["fingerprint"] == corpus.fingerprint
        and manifest["corpus"]["domains"] == corpus.manifest["domains"]
    )
    assert (
        str(output) not in (output / "manifest.json").read_text()
        and tiny_corpus not in (output / "manifest.json").read_text()
    )

    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {
        "loss",
        "eval_loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
    }
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]

    before = files(output)
    train(
        replace(
            whole,
            log_interval=1,
            checkpoint=CheckpointConfig(interval=2, keep=1),
            micro_batch_tokens=64,
            max_skipped_steps=1,
        )
    )
    assert "complete, nothing to do" in capsys.readouterr().out
    assert files(output) == before


def test_logged_loss_is_the_mean_over_the_interval(config, whole, capsys):
    train(replace(config, log_interval=1))
    every = {line["step"]: line["loss"] for line in metrics(config.output)}
    assert sorted(every) == list(range(1, 27))
    last = 0
    for line in metrics(whole.output):
        assert line["loss"] == pytest.approx(
            np.mean([every[step] for step in range(last + 1, line["step"] + 1)]), rel=1e-12
        )
        last = line["step"]
    out = capsys.readouterr().out
    assert (
        "trained 26 steps on" in out and f"loss {every[26]:.4f}, held-out loss" in out and "tokens/s" in out
    )


def test_micro_batches_do_not_change_the_mathematics(config, whole):
    train(replace(config, micro_batch_tokens=100_000))
    for one, many in zip(metrics(config.output), metrics(whole.output), strict=True):
        assert (
            one["loss"] == pytest.approx(many["loss"], rel=1e-4)
            and one["eval_loss" if "eval_loss" in one else "lr"]
        )
        assert one["tokens"] == many["tokens"]


def test_it_learns(tiny_corpus, tmp_path):
    pattern = random.Random(0).choices(range(1, 500), k=37)
    data = write_corpus(
        tmp_path / "corpus", [(pattern * 3)[i % 37 : i % 37 + 60] for i in range(50)], tiny_corpus
    )
    train(
        TrainConfig(
            data=data,
            output=str(tmp_path / "out"),
            model=STUDENT,
            steps=60,
            batch_tokens=600,
            optimizer=OptimizerConfig(lr=2e-2, warmup_steps=5),
            eval=EvalConfig(data=data),
            device="cpu",
            peak_tflops=1,
        )
    )
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert metrics(tmp_path / "out")[0]["loss"] > 4
    assert manifest["loss"] < 0.2 and manifest["eval_loss"] < 0.2 < math.log(500) / 20


def test_default_is_one_pass_and_a_small_corpus_repeats(config, tiny_corpus):
    epoch_tokens = int((training.Corpus(tiny_corpus).num_tokens - 1).sum())
    train(replace(config, steps=None))
    assert read_json(f"{config.output}/manifest.json")["steps"] == -(-epoch_tokens // 200)
    train(
        replace(
            config,
            steps=None,
            batch_tokens=3 * epoch_tokens + 5,
            output=config.output + "2",
            micro_batch_tokens=4096,
        )
    )
    manifest = read_json(f"{config.output}2/manifest.json")
    assert manifest["steps"] == 1 and 0 <= manifest["tokens"] - (3 * epoch_tokens + 5) < 65


def test_settings_reach_the_mathematics(config, whole):
    losses = {json.dumps(metrics(whole.output)[0]["loss"])}
    variants = [
        dict(seed=11),
        dict(shuffle=False),
        dict(document_mask=True),
        dict(dtype="bfloat16"),
        dict(model=replace(STUDENT, vocab_size=512)),
        dict(optimizer=replace(config.optimizer, betas=(0.5, 0.6))),
    ]
    for number, changed in enumerate(variants):
        # Equal up to here, another run from there: the first run's folder refuses each.
        with pytest.raises(UserError, match="another train run"):
            train(replace(whole, **changed))
        variant = replace(config, output=f"{config.output}{number}", steps=4, eval=EvalConfig(), **changed)
        train(variant)
        losses.add(json.dumps(metrics(variant.output)[0]["loss"]))
    assert len(losses) == len(variants) + 1
