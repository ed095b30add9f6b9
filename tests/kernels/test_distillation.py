from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate_everywhere
from miniplm.kernels import DistillationLoss, linear_distillation_loss, reference_head

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain_distillation(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    targets,
    alpha=0.5,
    ignore_index=-100,
    temperature=1.0,
):
    vocabulary, wide = (
        min(len(student_weight), len(teacher_weight)),
        torch.promote_types(student_hidden.dtype, torch.float32),
    )
    student = (student_hidden @ student_weight[:vocabulary].T).to(wide)
    teacher = (teacher_hidden @ teacher_weight[:vocabulary].T).to(wide).detach()
    cross_entropy = F.cross_entropy(student, targets, ignore_index=ignore_index)
    counted = targets != ignore_index
    divergence = F.kl_div(
        (student / temperature).log_softmax(-1)[counted],
        (teacher / temperature).log_softmax(-1)[counted],
        reduction="batchmean",
        log_target=True,
    )
    return DistillationLoss((1 - alpha) * cross_entropy + alpha * divergence, cross_entropy, divergence)


def random_heads(tokens, student_vocabulary, teacher_vocabulary, dtype=torch.float64):
    """A student of width 24 and a teacher of width 40."""
    shapes = (tokens, 24), (student_vocabulary, 24), (tokens, 40), (teacher_vocabulary, 40)
    heads = [torch.randn(shape, dtype=dtype) / 1.5 for shape in shapes]
    targets = torch.randint(0, min(student_vocabulary, teacher_vocabulary), (tokens,))
    targets[1::5] = -100
    return heads, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, student_vocabulary, teacher_vocabulary, alpha, temperature",
    [
        (1, 5, 5, 0.5, 1.0),
        (3, 1000, 1003, 0.3, 1.0),
        (127, 2 * 1187 + 1, 2000, 0.5, 1.0),
        (507, 129, 129, 0.7, 2.5),
        (9, 151_936, 152_064, 0.5, 1.0),
        (33, 255, 255, 0.0, 1.0),
        (33, 255, 255, 1.0, 1.0),
    ],
)
def test_accuracy(tokens, student_vocabulary, teacher_vocabulary, alpha, temperature, dtype):
    (student_hidden, student_weight, *teacher), targets = random_heads(
        tokens, student_vocabulary, teacher_vocabulary
    )
    teacher = [x.to(dtype) for x in teacher]

    def loss(op):
        return lambda hidden, weight: (
            op(
                hidden,
                weight,
                *(x.to(hidden.dtype) for x in teacher),
                targets,
                alpha=alpha,
                temperature=temperature,
            ).loss
        )

    grad = torch.tensor(
        -100.0 * tokens, dtype=torch.float64
    )  # as a loss scale does: else gradients fall below what float16 resolves
    assert_accurate_everywhere(
        loss(linear_distillation_loss),
        loss(plain_distillation),
        [student_hidden, student_weight],
        [grad],
        dtype,
    )


def test_the_three_numbers():
    heads, targets = random_heads(50, 101, 103)
    found = linear_distillation_loss(*heads, targets, 0.3, temperature=2.0)
    assert isinstance(found, DistillationLoss) and found._fields == ("loss", "cross_entropy", "kl_divergence")
    torch.testing.assert_close(found, plain_distillation(*heads, targets, 0.3, temperature=2.0))
    torch.testing.assert_close(found.loss, 0.7 * found.cross_entropy + 0.3 * found.kl_divergence)
    heads[0].requires_grad_()
    found = linear_distillation_loss(*heads, targets)
    assert [x.requires_grad for x in found] == [True, False, False]


def test_a_student_that_is_the_teacher():
    (hidden, weight, *_), targets = random_heads(20, 101, 101, torch.float32)
    assert linear_distillation_loss(hidden, weight, hidden, weight, targets).kl_divergence == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_gradcheck(temperature):
    (hidden, weight, *teacher), targets = random_heads(7, 11, 13)
    call = lambda hidden, weight: (
        linear_distillation_loss(hidden, weight, *teacher, targets, 0.3, temperature=temperature).loss
    )
    assert torch.autograd.gradcheck(call, (hidden.requires_grad_(), weight.requires_grad_()))


def test_the_teacher_gets_no_gradient():
    heads, targets = random_heads(20, 101, 101)
    loss = linear_distillation_loss(*(x.requires_grad_() for x in heads), targets).loss
    gradients = torch.autograd.grad(loss, heads, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True, True]
    assert not linear_distillation_loss(
        heads[0].detach(), heads[1].detach(), *heads[2:], targets
    ).loss.requires_grad


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs(frozen):
    heads, targets = random_heads(20, 103, 101)
    free = heads[1 - frozen].requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(linear_distillation_loss(*heads, targets).loss, free),
        torch.autograd.grad(plain_distillation(*heads, targets).loss, free),
    )


@pytest.mark.parametrize("max_logits_bytes", [1, 7 * 8 * 2 * 101, 1 << 30])
def test_any_budget(max_logits_bytes, monkeypatch):
    monkeypatch.setattr(reference_head, "TILE_BYTES", 1000)
    monkeypatch.setattr(reference_head, "BLOCK_BYTES", 3000)
    heads, targets = random_heads(50, 103, 101)

    def loss_and_gradients(op, heads):
        heads[:2] = (x.requires_grad_() for x in heads[:2])
        loss = op(*heads, targets).loss
        return [x.double() for x in (loss, *torch.autograd.grad(loss, heads[:2]))]

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.bfloat16, 2e-2)):
        found = loss_and_gradients(
            partial(linear_distillation_loss, max_logits_bytes=max_logits_bytes),
            [x.detach().to(dtype) for x in heads],
        )
        expected = loss_and_gradients(plain_distillation, [x.detach().to(dtype).double() for x in heads])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("tokens", [0, 5])
def test_all_ignored(tokens):
    heads, targets = random_heads(tokens, 11, 13, torch.float32)
    heads[0].fill_(torch.nan)
    targets[:] = -100
    result = linear_distillation_loss(*(x.requires_grad_() for x in heads), targets)
    assert [x.item() for x in result] == [0, 0, 0]
    result.loss.backward()
    assert not heads[0].grad.any() and not heads[1].grad.any()


def test_backward_twice():
    heads, targets = random_heads(20, 101, 103)
    inputs = [x.requires_grad_() for x in heads[:2]]
    loss, plain = (op(*heads, targets).loss for op in (linear_distillation_loss, plain_distillation))
    for scale in (0.5, -3.0):
        found, expected = (torch.autograd.grad(scale * x, inputs, retain_graph=True) for x in (loss, plain))
        torch.testing.assert_close(found, expected)


def test_large_logits():
    heads, targets = random_heads(20, 101, 101, torch.float32)
    result = linear_distillation_loss(*(1e2 * x for x in heads), targets)
    torch.testing.assert_close(
        result,
        plain_distillation(*(1e2 * x.double() for x in heads), targets),
        check_dtype=False,
        rtol=1e-5,
        atol=0,
    )


def test_wrong_arguments():
    heads, targets = random_heads(3, 7, 5, torch.float32)
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
