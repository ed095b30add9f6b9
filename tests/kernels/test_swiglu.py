import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate_everywhere, run, strided
from miniplm.kernels import swiglu


def plain_swiglu(gate, up):
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (129, 255), (2, 3, 507)])
def test_swiglu(shape, dtype):
    gate, up, grad = (3 * torch.randn(shape, dtype=torch.float64) for _ in range(3))
    assert_accurate_everywhere(swiglu, plain_swiglu, [gate, up], [grad], dtype)


def test_gradcheck():
    assert torch.autograd.gradcheck(
        swiglu, tuple(torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    )


def test_extremes():
    gate = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30], requires_grad=True)
    out = swiglu(gate, torch.ones(5))
    assert torch.equal(out, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e30]))
    out.sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([0, 0, 0.5, 1, 1]))


def test_strided():
    gate, up = torch.randn(9, 62).chunk(2, -1)  # as a fused projection gives them
    grad = torch.randn(9, 31)
    expected = run(swiglu, [gate.contiguous(), up.contiguous()], [grad])
    for change in (lambda x: x, strided, lambda x: x.T.contiguous().T):
        for found, wanted in zip(
            run(swiglu, [change(gate), change(up)], [change(grad)]), expected, strict=True
        ):
            for one, two in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_side_by_side(dtype):
    """One tensor that holds gate and up gives the same, and its gradient is one tensor."""
    both, grad = torch.randn(2, 9, 62, dtype=dtype), torch.randn(2, 9, 31, dtype=dtype)
    (expected,), gradients = run(swiglu, [half.contiguous() for half in both.chunk(2, -1)], [grad])
    for change in (lambda x: x, strided):
        (found,), (gradient,) = run(swiglu, [change(both)], [change(grad)])
        for one, two in (
            (found, expected),
            (gradient, torch.cat(gradients, -1)),
        ):  # PyTorch's exp differs in the last bit by layout
            torch.testing.assert_close(one, two, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert found.is_contiguous() and gradient.is_contiguous()
    both.requires_grad_()
    torch.library.opcheck(torch.ops.miniplm.swiglu.default, (both, None))
    torch.library.opcheck(torch.ops.miniplm.swiglu_backward.default, (grad, both.detach(), None))


def test_no_tokens():
    assert swiglu(torch.randn(0, 4)).shape == (0, 2)
    assert swiglu(torch.randn(0, 4), torch.randn(0, 4)).shape == (0, 4)


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
