"""linear_distillation_loss, on the reference and on Triton."""

from functools import partial

import pytest
import torch
from checks import (
    RELATIVE,
    assert_accurate_everywhere,
    assert_close_everywhere,
    assert_equal_everywhere,
    loss_and_gradients,
    strided,
)
from miniplm.kernels import DistillationLoss, linear_distillation_loss, reference_head
from oracles import plain_distillation
from random_inputs import on, random_student_and_teacher

pytestmark = pytest.mark.products
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(implementation, *sizes, dtype=None):
    """(heads, targets) where the implementation runs, in its finest dtype unless another is given."""
    heads, targets = random_student_and_teacher(*sizes)
    *heads, targets = on(implementation.device, *heads, targets, dtype=dtype or implementation.finest)
    return heads, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, student_vocabulary, teacher_vocabulary, alpha, temperature",
    [
        (1, 5, 5, 0.5, 1.0),
        (3, 1000, 1003, 0.3, 1.0),
        (127, 2 * 64 + 1, 100, 0.5, 1.0),
        (150, 129, 129, 0.7, 2.5),
        (33, 255, 255, 0.5, 0.6),
        (33, 255, 255, 0.0, 1.0),
        (33, 255, 255, 1.0, 1.0),
        pytest.param(127, 2 * 1187 + 1, 2000, 0.5, 1.0, marks=pytest.mark.large),
        pytest.param(507, 129, 129, 0.7, 2.5, marks=pytest.mark.large),
    ],
)
def test_accuracy(tokens, student_vocabulary, teacher_vocabulary, alpha, temperature, dtype, implementation):
    """Losses of a quarter of the tokens each: of a single number, plain PyTorch's error is next to nothing by
    chance now and then, and no bound."""
    sizes = tokens, student_vocabulary, teacher_vocabulary
    heads, targets = make(implementation, *sizes, dtype=torch.float64)
    teacher = [x.to(dtype) for x in heads[2:]]
    part = torch.arange(tokens, device=implementation.device) % 4
    parts = [targets.where(part == number, -100) for number in part.unique()]
    parts = [kept for kept in parts if (kept != -100).any()]

    def losses(op):
        def call(hidden, weight):
            student_and_teacher = hidden, weight, *(x.to(hidden.dtype) for x in teacher)
            return torch.stack(
                [op(*student_and_teacher, kept, alpha=alpha, temperature=temperature).loss for kept in parts]
            )

        return call

    # As a loss scale does: else gradients fall below what float16 resolves.
    grads = torch.full([len(parts)], -25.0 * tokens, dtype=torch.float64, device=implementation.device)
    assert_accurate_everywhere(
        losses(linear_distillation_loss),
        losses(plain_distillation),
        heads[:2],
        [grads],
        dtype,
        relative_of(implementation, dtype),
    )


def relative_of(implementation, dtype):
    """The largest relative error of loss and gradients. On Triton the divergence is that of probabilities
    stored in 16 bits: its bound is that of the inputs' dtype, though it is a float32."""
    return RELATIVE[dtype] if implementation.name == "triton" else None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(dtype, implementation, large_tiles):
    heads, targets = make(implementation, 5, 151_936, 152_064, dtype=torch.float64)

    def loss(op):
        def call(*heads):
            teacher = [x.detach() for x in heads[2:]]
            return op(*heads[:2], *teacher, targets).loss + 0 * sum(x.sum() for x in heads[2:])

        return call

    assert_accurate_everywhere(
        loss(linear_distillation_loss),
        loss(plain_distillation),
        heads,
        [torch.tensor(500.0, dtype=torch.float64, device=implementation.device)],
        dtype,
        relative_of(implementation, dtype),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_three_numbers(temperature, implementation):
    heads, targets = make(implementation, 50, 101, 103)
    found = linear_distillation_loss(*heads, targets, 0.3, temperature=temperature)
    assert isinstance(found, DistillationLoss) and found._fields == ("loss", "cross_entropy", "kl_divergence")
    torch.testing.assert_close(found, plain_distillation(*heads, targets, 0.3, temperature=temperature))
    torch.testing.assert_close(found.loss, 0.7 * found.cross_entropy + 0.3 * found.kl_divergence)
    again = loss_and_gradients(linear_distillation_loss, heads, targets, alpha=0.3, temperature=temperature)
    assert all(map(torch.equal, found, again[:3])), "they must not depend on whether gradients are asked for"
    heads[0].requires_grad_()
    found = linear_distillation_loss(*heads, targets)
    assert [x.requires_grad for x in found] == [True, False, False]


def test_a_student_that_is_the_teacher(implementation):
    (hidden, weight, *_), targets = make(implementation, 20, 101, 101, dtype=torch.float32)
    assert linear_distillation_loss(hidden, weight, hidden, weight, targets).kl_divergence == 0


@pytest.mark.parametrize("tokens", [0, 5])
def test_all_ignored(tokens, implementation):
    heads, targets = make(implementation, tokens, 11, 13, dtype=torch.float32)
    heads[0].fill_(torch.nan)
    targets[:] = -100
    result = linear_distillation_loss(*(x.requires_grad_() for x in heads), targets)
    assert [x.item() for x in result] == [0, 0, 0]
    result.loss.backward()
    assert not heads[0].grad.any() and not heads[1].grad.any() and heads[2].grad is None


def test_ignored_tokens(implementation):
    """What is not a number there does not reach the others."""
    heads, targets = make(implementation, 20, 101, 103)
    expected = loss_and_gradients(linear_distillation_loss, heads, targets)
    heads[0][targets == -100], heads[2][targets == -100] = torch.nan, torch.nan
    assert_equal_everywhere(loss_and_gradients(linear_distillation_loss, heads, targets), expected)


def test_large_logits(implementation):
    heads, targets = make(implementation, 20, 101, 101, dtype=torch.float32)
    result = linear_distillation_loss(*(1e2 * x for x in heads), targets)
    truth = plain_distillation(*(1e2 * x.double() for x in heads), targets)
    torch.testing.assert_close(result, truth, check_dtype=False, rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_logits_bytes", [1, 7 * 8 * 2 * 101, 1 << 30])
def test_any_budget(max_logits_bytes, implementation, monkeypatch):
    monkeypatch.setattr(reference_head, "TILE_BYTES", 1000)
    monkeypatch.setattr(reference_head, "BLOCK_BYTES", 3000)
    heads, targets = make(implementation, 50, 103, 101, dtype=torch.float64)
    dtypes = {torch.float64: 1e-10, torch.bfloat16: 2e-2}
    if implementation.name == "triton":
        dtypes = {torch.float32: 1e-4, torch.float16: 1e-2}
    for dtype, tolerance in dtypes.items():
        rounded = [x.to(dtype) for x in heads]
        found = loss_and_gradients(
            linear_distillation_loss, rounded, targets, max_logits_bytes=max_logits_bytes
        )
        expected = loss_and_gradients(plain_distillation, [x.double() for x in rounded], targets)
        assert_close_everywhere(found, expected, rtol=tolerance, atol=tolerance / 100, check_dtype=False)


# --- gradients ---


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_gradcheck(temperature):
    (hidden, weight, *teacher), targets = random_student_and_teacher(7, 11, 13)
    call = lambda hidden, weight: (
        linear_distillation_loss(hidden, weight, *teacher, targets, 0.3, temperature=temperature).loss
    )
    assert torch.autograd.gradcheck(call, (hidden.requires_grad_(), weight.requires_grad_()))


def test_the_teacher_gets_no_gradient(implementation):
    heads, targets = make(implementation, 20, 101, 101)
    loss = linear_distillation_loss(*(x.requires_grad_() for x in heads), targets).loss
    gradients = torch.autograd.grad(loss, heads, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True, True]
    student = [x.detach() for x in heads[:2]]
    assert not linear_distillation_loss(*student, *heads[2:], targets).loss.requires_grad


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs(frozen, implementation):
    heads, targets = make(implementation, 20, 103, 101)
    free = heads[1 - frozen].requires_grad_()
    found, expected = (
        torch.autograd.grad(op(*heads, targets).loss, free)
        for op in (linear_distillation_loss, plain_distillation)
    )
    torch.testing.assert_close(found, expected)


def test_backward_twice(implementation):
    heads, targets = make(implementation, 20, 101, 103)
    inputs = [x.requires_grad_() for x in heads[:2]]
    ours = partial(linear_distillation_loss, max_logits_bytes=1 << 20)
    loss, plain = (op(*heads, targets).loss for op in (ours, plain_distillation))
    for scale in (0.5, -3.0):
        found, expected = (torch.autograd.grad(scale * x, inputs, retain_graph=True) for x in (loss, plain))
        torch.testing.assert_close(found, expected)


def test_strided(implementation):
    heads, targets = make(implementation, 20, 103, 101)
    expected = loss_and_gradients(linear_distillation_loss, heads, targets)
    for change in (strided, lambda x: x.T.contiguous().T):
        changed = [change(x) for x in heads]
        torch.testing.assert_close(
            loss_and_gradients(linear_distillation_loss, changed, strided(targets)), expected
        )


@pytest.mark.slow
def test_compiled_and_opcheck(implementation):
    heads, targets = make(implementation, 20, 70, 70, dtype=torch.float32)
    call = lambda *heads: linear_distillation_loss(*heads, targets)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        loss_and_gradients(lambda *x: compiled(*x[:4]), heads, targets),
        loss_and_gradients(linear_distillation_loss, heads, targets),
    )
    student = [x.requires_grad_() for x in heads[:2]]
    example = *student, *heads[2:], targets, 0.5, 2.0, -100, True, True, 1 << 20
    torch.library.opcheck(torch.ops.miniplm.linear_distillation_loss.default, example)


def test_wrong_arguments():
    heads, targets = random_student_and_teacher(3, 7, 5)
    heads = [x.float() for x in heads]
    names = ["student_hidden", "student_weight", "teacher_hidden", "teacher_weight"]
    right = {**dict(zip(names, heads, strict=True)), "targets": targets}
    linear_distillation_loss(**right)
    for argument, wrong in [
        ("student_hidden", torch.randn(2, 24)),
        ("student_weight", torch.randn(7, 40)),
        ("teacher_hidden", torch.randn(3, 40).int()),
        ("teacher_weight", torch.randn(5, 40).half()),
        ("targets", targets[:, None]),
        ("targets", torch.tensor([0, 5, 1])),
    ]:
        with pytest.raises(ValueError, match=f"^{argument} (has|is|must)"):
            linear_distillation_loss(**{**right, argument: wrong})
