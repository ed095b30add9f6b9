"""What torch's FlopCounterMode counts for the ops, against plain PyTorch and by hand."""

import pytest
import torch
import torch.nn.functional as F
from random_inputs import op_arguments, parameter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from miniplm import kernels

T, V, D = 12, 17, 8
LENGTHS = [5, 0, 7]
PAIRS = 5 * 6 // 2 + 7 * 8 // 2


def counted(function, backward=True):
    """FLOPs of the forward pass, and of the backward pass of the sum of its results."""
    with FlopCounterMode(display=False) as forward:
        result = function()
    if not backward:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def head(trained=(True, True), device="cpu"):
    hidden, weight = (
        parameter(*shape, device=device).detach().requires_grad_(needed)
        for shape, needed in zip(((T, D), (V, D)), trained, strict=True)
    )
    targets = torch.arange(T) % V
    targets[3] = -100
    return hidden, weight, targets.to(device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy(reduction, trained, device):
    """As plain PyTorch, but that "none" computes its logits again in the backward pass."""
    hidden, weight, targets = head(trained, device)
    plain = counted(lambda: F.cross_entropy(hidden @ weight.T, targets, reduction=reduction), any(trained))
    ours = counted(
        lambda: kernels.linear_cross_entropy(hidden, weight, targets, reduction=reduction), any(trained)
    )
    again = 2 * T * V * D if reduction == "none" and any(trained) else 0
    assert sum(plain) == 2 * T * V * D * (1 + sum(trained))
    assert sum(ours) == sum(plain) + again


def test_log_prob():
    hidden, weight, targets = head()
    ours = counted(lambda: kernels.linear_log_prob(hidden, weight, targets))
    assert ours == (2 * T * V * D, 3 * 2 * T * V * D)


def test_a_second_backward_pass_counts_again():
    hidden, weight, targets = head()
    with FlopCounterMode(display=False) as counter:
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
        loss.backward(retain_graph=True)
        loss.backward()
    assert counter.get_total_flops() == 6 * 2 * T * V * D


@pytest.mark.parametrize("teacher_vocabulary", [V - 4, V, V + 4])
def test_distillation_and_difference(teacher_vocabulary):
    hidden, weight, targets = head()
    targets = targets.clamp(max=teacher_vocabulary - 1)
    teacher = torch.randn(T, 5), torch.randn(teacher_vocabulary, 5)
    both = min(V, teacher_vocabulary)

    def plain():
        student_logits, logits = hidden @ weight[:both].T, teacher[0] @ teacher[1][:both].T
        divergence = F.kl_div(student_logits, logits, log_target=True, reduction="batchmean")
        return F.cross_entropy(student_logits, targets) + divergence

    ours = counted(lambda: kernels.linear_distillation_loss(hidden, weight, *teacher, targets).loss)
    assert sum(ours) == sum(counted(plain)) == 2 * T * both * (3 * D + 5)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32)
    scored = counted(
        lambda: kernels.difference_score(hidden, weight, *teacher, targets, cu_seqlens).score, backward=False
    )
    assert scored == (2 * T * both * (D + 5), 0)


def attention(cu_seqlens, device="cpu"):
    q, k, v = parameter(T, 4, D, device=device), *(parameter(T, 2, D, device=device) for _ in range(2))
    return counted(lambda: kernels.flash_attention(q, k, v, cu_seqlens.to(device), None))


def test_attention_counts_what_each_query_sees():
    """Two products forward and five backward over the pairs of each document; PyTorch's own flash attention
    counts the same products over whole squares."""
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    assert attention(cu_seqlens) == (2 * 2 * 4 * D * PAIRS, 5 * 2 * 4 * D * PAIRS)
    q = torch.empty(1, 4, T, D, device="meta")
    with FlopCounterMode(display=False) as plain:
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
    one_document = torch.tensor([0, T], dtype=torch.int32)
    forward, backward = attention(one_document)
    assert forward * 2 * T == plain.get_total_flops() * (T + 1)
    assert backward * 2 == forward * 5


@pytest.mark.parametrize("rows", [1, 3])
def test_attention_without_values(rows):
    """The rows of a batch, on meta and fake tensors: as with values."""
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * (T // rows)
    expected = attention(cu_seqlens)
    assert attention(cu_seqlens, "meta") == expected
    with FakeTensorMode():
        assert attention(torch.arange(rows + 1, dtype=torch.int32) * (T // rows)) == expected


COUNTED = ("linear_log_prob", "linear_cross_entropy", "linear_distillation_loss", "difference_score")
COUNTED += ("flash_attention", "flash_attention_backward")


@pytest.mark.parametrize("name", op_arguments())
def test_only_products_count(name):
    """No formula is that of another op: each op, called as it is registered, counts something or nothing."""
    op, inputs = getattr(torch.ops.miniplm, name), op_arguments()[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        op(*inputs)
    assert (counter.get_total_flops() > 0) == (name in COUNTED)
