import pytest
import torch
from checks import assert_accurate_everywhere, run, strided
from miniplm.kernels import add_rms_norm, rms_norm

EPS = 1e-6
SHAPES = [(1, 5), (3, 127), (129, 64), (2, 3, 255), (507, 576)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain_rms_norm(x, weight):  # as in transformers: the statistics in float32 at least
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_add_rms_norm(x, residual, weight):
    return plain_rms_norm(x + residual, weight), x + residual


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    assert_accurate_everywhere(rms_norm, plain_rms_norm, [3 * random(*shape), random(shape[-1])], [random(*shape)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype):
    inputs, grads = [random(*shape), 3 * random(*shape), random(shape[-1])], [random(*shape), random(*shape)]
    if dtype is torch.float32:
        return assert_accurate_everywhere(add_rms_norm, plain_add_rms_norm, inputs, grads, dtype)
    # In 16 bits the sum is rounded before the norm, so the exact sum is not the truth: give sums that are exact.
    inputs[:2] = (x.mul(8).round() / 8 for x in inputs[:2])
    assert_accurate_everywhere(add_rms_norm, plain_add_rms_norm, inputs, grads, dtype)


def test_gradcheck():
    x, residual, weight = (random(*shape).requires_grad_() for shape in ((4, 7), (4, 7), (7,)))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))


@pytest.mark.parametrize("op, inputs", [(rms_norm, ((6, 33), (33,))), (add_rms_norm, ((6, 33), (6, 33), (33,)))])
def test_strided(op, inputs):
    inputs = [torch.randn(shape) for shape in inputs]
    grads = [torch.randn(6, 33) for _ in range(len(inputs) - 1)]
    expected = run(op, inputs, grads)
    for change in (strided, lambda x: x.T.contiguous().T if x.dim() == 2 else x):
        found = run(op, [change(x) for x in inputs], [change(g) for g in grads])
        for one, two in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_one_output_used():
    """The gradient through each of add_rms_norm's outputs alone."""
    inputs = [random(5, 9).requires_grad_(), random(5, 9).requires_grad_(), random(9).requires_grad_()]
    for output in (0, 1):
        found = torch.autograd.grad(add_rms_norm(*inputs)[output].square().sum(), inputs[:2])
        expected = torch.autograd.grad(plain_add_rms_norm(*inputs)[output].square().sum(), inputs[:2])
        torch.testing.assert_close(found, expected)


def test_extremes():
    weight = torch.ones(8)
    assert torch.equal(rms_norm(torch.zeros(2, 8), weight), torch.zeros(2, 8))
    torch.testing.assert_close(rms_norm(torch.full((2, 8), 1e15), weight), torch.ones(2, 8))
    torch.testing.assert_close(rms_norm(torch.full((2, 8), 6e4, dtype=torch.float16), weight.half()), torch.ones(2, 8).half())
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    assert rms_norm(x, weight).isnan().any(1).tolist() == [False, True, False]


def test_no_tokens():
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    normed, total = add_rms_norm(x, x, weight)
    assert normed.shape == total.shape == (0, 8)
    (normed.sum() + rms_norm(x, weight).sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize("argument, call", [
    ("weight", lambda x: rms_norm(x, torch.ones(5))),
    ("weight", lambda x: rms_norm(x, torch.ones(4, dtype=torch.float16))),
    ("weight", lambda x: rms_norm(x, torch.ones(4, device="meta"))),
    ("x", lambda x: rms_norm(x.int(), torch.ones(4))),
    ("x", lambda x: rms_norm(x[0, 0], torch.ones(1))),
    ("residual", lambda x: add_rms_norm(x, x[:2], torch.ones(4))),
    ("residual", lambda x: add_rms_norm(x, x.double(), torch.ones(4))),
    ("weight", lambda x: add_rms_norm(x, x, torch.ones(3))),
])
def test_wrong_arguments(argument, call):
    with pytest.raises(ValueError, match=f"^{argument} (has shape|is)"):
        call(torch.randn(3, 4))
