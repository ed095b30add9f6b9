"""Every public op on tensors without values: on the meta device, and fake."""

import pytest
import torch
from checks import tensors_of
from random_inputs import parameter
from torch._subclasses.fake_tensor import FakeTensorMode

from miniplm import kernels


def arguments(device, dtype):
    """(public op, arguments) of every op, with gradients asked for where it gives them."""
    T, V, d = 9, 13, 8

    def tensor(*shape, of=dtype):
        return parameter(*shape, dtype=of, device=device)

    positions = torch.arange(T).to(device)
    targets, cu_seqlens = positions % V, torch.tensor([0, 4, T], dtype=torch.int32).to(device)
    q, k, v = tensor(T, 4, d), tensor(T, 2, d), tensor(T, 2, d)
    heads = tensor(T, d), tensor(V, d), tensor(T, 5), tensor(V + 2, 5)
    return [
        (kernels.rms_norm, (tensor(2, T, d), tensor(d, of=torch.float32)), {}),
        (kernels.add_rms_norm, (tensor(T, d, of=torch.float32), tensor(T, d), tensor(d)), {}),
        (kernels.apply_rotary, (q, k, positions, torch.ones(d // 2, device=device)), {}),
        (kernels.swiglu, (tensor(T, d), tensor(T, d)), {}),
        (kernels.swiglu, (tensor(2, T, d),), {}),
        (kernels.flash_attention, (q, k, v, cu_seqlens, None), {}),
        (kernels.linear_log_prob, (*heads[:2], targets), {}),
        (kernels.linear_cross_entropy, (*heads[:2], targets), {}),
        (kernels.linear_cross_entropy, (*heads[:2], targets), {"reduction": "none"}),
        (kernels.linear_distillation_loss, (*heads, targets), {}),
        (kernels.quantize_rows, (tensor(T, d),), {}),
        (kernels.difference_score, (*heads, targets, cu_seqlens), {}),
    ]


WITHOUT_DERIVATIVE = (kernels.quantize_rows, kernels.difference_score)
CASES = range(len(arguments("cpu", torch.float32)))


def described(op, tensors, options):
    """Shape, dtype, strides and device type of each result, and of each gradient."""
    outputs = tensors_of(op(*tensors, **options))
    found = list(outputs)
    if op not in WITHOUT_DERIVATIVE:
        inputs = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
        differentiable = [y for y in outputs if y.requires_grad]
        assert differentiable
        # The teacher of a distillation gets no gradient.
        gradients = torch.autograd.grad(
            differentiable, inputs, [torch.ones_like(y) for y in differentiable], allow_unused=True
        )
        found += gradients
    return [None if x is None else (x.shape, x.dtype, x.stride(), x.device.type) for x in found]


def test_every_public_op_is_here():
    ops = {op for op, _, _ in arguments("cpu", torch.float32)}
    public = (getattr(kernels, name) for name in kernels.__all__)
    assert ops == {op for op in public if not isinstance(op, type)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_meta(case, dtype):
    """Shapes, dtypes and strides of results and gradients are those of real tensors; nothing is computed."""
    expected = described(*arguments("cpu", dtype)[case])
    found = described(*arguments("meta", dtype)[case])
    assert found == [x and (*x[:3], "meta") for x in expected]


@pytest.mark.parametrize("case", CASES)
def test_fake(case):
    expected = described(*arguments("cpu", torch.float16)[case])
    with FakeTensorMode():
        assert described(*arguments("cpu", torch.float16)[case]) == expected


def test_autocast_does_not_reach_meta():
    """As in torch's own ops: the dtype stays."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.ones(3, 4, device="meta")
        assert (x @ x.T).dtype == kernels.rms_norm(x, x[0]).dtype == kernels.swiglu(x).dtype == torch.float32
