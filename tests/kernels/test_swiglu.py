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
    assert torch.autograd.gradcheck(swiglu, tuple(torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)))


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
        for found, wanted in zip(run(swiglu, [change(gate), change(up)], [change(grad)]), expected, strict=True):
            for one, two in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_no_tokens():
    assert swiglu(torch.randn(0, 4), torch.randn(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("argument, gate, up", [
    ("gate", torch.zeros(2, 3).long(), torch.randn(2, 3)),
    ("up", torch.randn(2, 3), torch.randn(3, 2)),
    ("up", torch.randn(2, 3), torch.randn(3)),
    ("up", torch.randn(2, 3), torch.randn(2, 3).half()),
    ("up", torch.randn(2, 3), torch.randn(2, 3, device="meta")),
])
def test_wrong_arguments(argument, gate, up):
    with pytest.raises(ValueError, match=f"^{argument} (has shape|is)"):
        swiglu(gate, up)
