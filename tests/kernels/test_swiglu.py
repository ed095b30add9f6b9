"""swiglu, on the reference and on Triton."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate_everywhere, assert_close_everywhere, assert_equal_everywhere, run, strided
from miniplm.kernels import swiglu
from oracles import plain_swiglu
from random_inputs import on, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1),
    (3, 127),
    (129, 64),
    (2, 3, 255),
    (5, 507),
    (65,),
    *(pytest.param(shape, marks=pytest.mark.large) for shape in ((129, 255), (2, 3, 507))),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype, implementation):
    gate, up, grad = on(implementation.device, *(3 * random(*shape) for _ in range(3)))
    assert_accurate_everywhere(swiglu, plain_swiglu, [gate, up], [grad], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_side_by_side(shape, dtype, implementation):
    """gate and up in one tensor: the gradient in one tensor, and nothing saved but the tensor itself. On
    Triton the same bits as apart."""
    both = 3 * random(*shape[:-1], 2 * shape[-1]).to(implementation.device)
    grad = 3 * random(*shape).to(implementation.device)
    plain = lambda x: plain_swiglu(*x.chunk(2, -1))
    assert_accurate_everywhere(swiglu, plain, [both], [grad], dtype)
    both, grad = both.to(dtype), grad.to(dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found, (gradient,) = run(swiglu, [both], [grad])
    assert gradient.is_contiguous()
    assert [x.data_ptr() for x in saved] == [both.data_ptr()]
    if implementation.name == "triton":
        apart, gradients = run(swiglu, [half.contiguous() for half in both.chunk(2, -1)], [grad])
        assert_equal_everywhere((found, gradient), (apart, torch.cat(gradients, -1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_side_by_side_is_as_apart(dtype, implementation):
    both, grad = (torch.randn(2, 9, width, dtype=dtype).to(implementation.device) for width in (62, 31))
    (apart,), gradients = run(swiglu, [half.contiguous() for half in both.chunk(2, -1)], [grad])
    # PyTorch's exp differs in the last bit by layout.
    tolerances = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    for change in (lambda x: x, strided):
        (found,), (gradient,) = run(swiglu, [change(both)], [change(grad)])
        assert_close_everywhere((found, gradient), (apart, torch.cat(gradients, -1)), **tolerances)
        assert found.is_contiguous() and gradient.is_contiguous()


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, tuple(random(3, 5).requires_grad_() for _ in range(2)))


def test_backward_is_that_of_silu(implementation):
    """Against PyTorch's own derivative, around the points where it changes its sign."""
    gate = torch.linspace(-8, 8, 401, device=implementation.device).requires_grad_()
    (found,) = torch.autograd.grad(swiglu(gate, torch.full_like(gate, 2)).sum(), gate)
    (expected,) = torch.autograd.grad(2 * F.silu(gate).sum(), gate)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_extremes(implementation):
    device = implementation.device
    gate = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30], device=device, requires_grad=True)
    out = swiglu(gate, torch.ones_like(gate))
    expected = torch.tensor([0.0, 0.0, 0.0, 100.0, 1e30], device=device)
    tolerances = {"rtol": 1e-6, "atol": 1e-30} if implementation.name == "triton" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(out, expected, **tolerances)
    out.sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([0, 0, 0.5, 1, 1], device=device))
    assert swiglu(torch.tensor([torch.nan], device=device), torch.ones(1, device=device)).isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        strided,
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat((x, x), 1)[:, :31],
        lambda x: x[:1].expand(9, -1),
        lambda x: torch.cat((x, x), 1).chunk(2, -1)[1],
    ],
    ids=["strided", "transposed", "columns", "expanded", "half"],
)
def test_layouts(change, implementation):
    """Any strides give what contiguous copies give (on Triton to the bit), and the results are
    contiguous."""
    gate, up, grad = (change(torch.randn(9, 31, device=implementation.device)) for _ in range(3))
    tolerance = 0 if implementation.name == "triton" else 1e-6
    found = run(swiglu, [gate, up], [grad])
    expected = run(swiglu, [gate.contiguous(), up.contiguous()], [grad.contiguous()])
    assert_close_everywhere(found, expected, rtol=tolerance, atol=tolerance)
    assert all(x.is_contiguous() for x in (*found[0], *found[1]))


def test_repeatable_to_the_bit(implementation):
    both, grad = (torch.randn(30, width, device=implementation.device) for width in (130, 65))
    assert_equal_everywhere(run(swiglu, [both], [grad]), run(swiglu, [both], [grad]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_nothing(shape, implementation):
    x = torch.randn(shape, device=implementation.device, requires_grad=True)
    assert swiglu(x, x).shape == shape and swiglu(x).shape == (*shape[:-1], shape[-1] // 2)
    swiglu(x, x).sum().backward()
    assert x.grad.shape == shape


@pytest.mark.slow
def test_opcheck(implementation):
    gate, up = (torch.randn(7, 8, device=implementation.device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.miniplm.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.miniplm.swiglu.default, (gate, None))
    gate, up = gate.detach(), up.detach()
    torch.library.opcheck(torch.ops.miniplm.swiglu_backward.default, (up, gate, up))
    torch.library.opcheck(torch.ops.miniplm.swiglu_backward.default, (up[:, :4], gate, None))


@pytest.mark.parametrize(
    "argument, gate, up",
    [
        ("gate", torch.zeros(2, 3).long(), torch.randn(2, 3)),
        ("up", torch.randn(2, 3), torch.randn(3, 2)),
        ("up", torch.randn(2, 3), torch.randn(3)),
        ("up", torch.randn(2, 3), torch.randn(2, 3).half()),
        ("up", torch.randn(2, 3), torch.randn(2, 3, device="meta")),
    ],
)
def test_wrong_arguments(argument, gate, up):
    with pytest.raises(ValueError, match=f"^{argument} (has shape|is)"):
        swiglu(gate, up)


def test_half_of_an_odd_width():
    with pytest.raises(ValueError, match=r"^gate has shape \[2, 3\]; without up its last size must be even"):
        swiglu(torch.randn(2, 3))
