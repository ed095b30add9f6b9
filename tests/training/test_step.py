"""The step against plain PyTorch, the schedule against its definition."""

import dataclasses
import functools
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from training_runs import EOS, STUDENT, plain_loss
from transformers import AutoModelForCausalLM

from miniplm.config import OptimizerConfig
from miniplm.data.batches import IGNORE_INDEX
from miniplm.data.order import DataOrder, global_batch
from miniplm.models.decoder import Decoder, student_config
from miniplm.models.loading import load_model
from miniplm.training import step as training_step
from miniplm.training.step import learning_rate, make_optimizer, num_targets, train_step


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
        training_step.summed_loss(model, batch, torch.bfloat16).backward()
        parts.append({name: parameter.grad.double() for name, parameter in model.named_parameters()})
    model.zero_grad()
    for batch in global_batch(rows * 6, EOS, 40):
        training_step.summed_loss(model, batch, torch.bfloat16).backward()
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
    assert num_targets([batch]) == sum(int((row[:-1] != EOS).sum()) for row in rows)


def test_static_shapes_change_nothing(folder, rows):
    """What a graph would need: tokens without targets in a document at the end, and empty documents."""
    (batch,) = global_batch(rows, EOS, 10_000)
    fill, tokens = 320 - len(batch.targets), 320
    assert fill > 0
    bounds = torch.cat([batch.cu_seqlens, torch.full((5,), tokens, dtype=torch.int32)])
    padded = dataclasses.replace(
        batch,
        input_ids=torch.cat([batch.input_ids, torch.full((fill,), EOS)]),
        targets=torch.cat([batch.targets, torch.full((fill,), IGNORE_INDEX)]),
        cu_seqlens=bounds,
        max_seqlen=max(batch.max_seqlen, fill),
    )
    losses, gradients = [], []
    for one in (batch, padded):
        model = load_model(folder)
        loss = training_step.summed_loss(model, one, torch.float32)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert num_targets([padded]) == num_targets([batch])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


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
