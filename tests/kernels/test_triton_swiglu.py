"""swiglu on Triton."""

import sys

import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate_everywhere, run, strided
from miniplm.kernels import swiglu
from test_swiglu import plain_swiglu

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 127), (129, 64), (2, 3, 255), (5, 507), (65,)]


def make(device, *shape):
    return 3 * torch.randn(shape, dtype=torch.float64).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype, device):
    assert_accurate_everywhere(
        swiglu, plain_swiglu, [make(device, *shape), make(device, *shape)], [make(device, *shape)], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_side_by_side(shape, dtype, device):
    """gate and up in one tensor: the same bits as apart, its gradient in one tensor, nothing saved but the
    tensor itself."""
    both, grad = make(device, *shape[:-1], 2 * shape[-1]), make(device, *shape)
    assert_accurate_everywhere(swiglu, lambda x: plain_swiglu(*x.chunk(2, -1)), [both], [grad], dtype)
    both, grad = both.to(dtype), grad.to(dtype)
    (apart,), gradients = run(swiglu, [half.contiguous() for half in both.chunk(2, -1)], [grad])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        (out,), (gradient,) = run(swiglu, [both], [grad])
    assert (
        torch.equal(out, apart)
        and torch.equal(gradient, torch.cat(gradients, -1))
        and gradient.is_contiguous()
    )
    assert [x.data_ptr() for x in saved] == [both.data_ptr()]


def test_halves_are_read_where_they_lie(device, monkeypatch):
    """As views of one tensor, neither half is copied."""
    module = sys.modules[
        "miniplm.kernels.swiglu"
    ]  # the package's attribute of that name is the public function
    seen, launch = [], module._launch
    monkeypatch.setattr(
        module,
        "_launch",
        lambda kernel, name, tensors, strides: seen.append(tensors) or launch(kernel, name, tensors, strides),
    )
    both = torch.randn(2, 9, 62, device=device)
    swiglu(*both.chunk(2, -1)), swiglu(both)
    for gate, up, _ in seen:
        assert gate.data_ptr() == both.data_ptr() and up.data_ptr() == both.data_ptr() + 31 * 4
    assert len(seen) == 2


def test_extremes(device):
    gate = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30]], device=device, requires_grad=True)
    out = swiglu(gate, torch.ones_like(gate))
    torch.testing.assert_close(
        out, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e30]], device=device), rtol=1e-6, atol=1e-30
    )
    out.sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([[0, 0, 0.5, 1, 1]], device=device))
    assert swiglu(torch.tensor([torch.nan], device=device), torch.ones(1, device=device)).isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        strided,
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat((x, x), 1)[:, :31],
        lambda x: x[:1].expand(9, -1),
    ],
)
def test_layouts(change, device):
    gate, up, grad = (change(torch.randn(9, 31, device=device)) for _ in range(3))
    found, expected = (
        run(swiglu, [gate, up], [grad]),
        run(swiglu, [gate.contiguous(), up.contiguous()], [grad.contiguous()]),
    )
    for one, two in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(one, two) and one.is_contiguous()


def test_offsets_beyond_int32(far_apart, device):
    both, grad = far_apart(3, 32), far_apart(3, 16)
    found, expected = run(swiglu, [both], [grad]), run(swiglu, [both.contiguous()], [grad.contiguous()])
    assert torch.equal(found[0][0], expected[0][0]) and torch.equal(found[1][0], expected[1][0])


def test_repeatable_to_the_bit(device):
    both, grad = torch.randn(30, 130, device=device), torch.randn(30, 65, device=device)
    first, second = run(swiglu, [both], [grad]), run(swiglu, [both], [grad])
    assert torch.equal(first[0][0], second[0][0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_nothing(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    assert swiglu(x, x).shape == shape and swiglu(x).shape == (*shape[:-1], shape[-1] // 2)
    swiglu(x, x).sum().backward()
    assert x.grad.shape == shape


def test_opcheck(device):
    gate, up = (torch.randn(7, 8, device=device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.miniplm.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.miniplm.swiglu.default, (gate, None))
    torch.library.opcheck(
        torch.ops.miniplm.swiglu_backward.default, (up.detach(), gate.detach(), up.detach())
    )
    torch.library.opcheck(
        torch.ops.miniplm.swiglu_backward.default, (up.detach()[:, :4], gate.detach(), None)
    )


def test_backward_is_that_of_silu(device):
    """Against PyTorch's own derivative, around the points where it changes its sign."""
    gate = torch.linspace(-8, 8, 401, device=device, dtype=torch.float32).requires_grad_()
    (found,) = torch.autograd.grad(swiglu(gate, torch.full_like(gate, 2)).sum(), gate)
    (expected,) = torch.autograd.grad(2 * F.silu(gate).sum(), gate)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
