"""The step with a teacher against plain PyTorch with whole logits."""

import math

import numpy as np
import pytest
import torch
from training_runs import EOS, make_teachers
from transformers import AutoModelForCausalLM

from miniplm.config import OptimizerConfig
from miniplm.data.order import global_batch
from miniplm.models.loading import load_model
from miniplm.training.step import Teacher, make_optimizer, num_targets, train_step


@pytest.fixture(scope="module")
def teachers(tiny_model, tmp_path_factory):
    return make_teachers(tiny_model, tmp_path_factory.mktemp("teachers"))


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


@pytest.mark.slow
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
    counts = [num_targets([batch]) for batch in batches]
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
