import pytest
import torch
from checks import RELATIVE, assert_accurate, assert_accurate_everywhere, run, strided
from miniplm.kernels import add_rms_norm, rms_norm

NARROW = [torch.float16, torch.bfloat16]

EPS = 1e-6
SHAPES = [(1, 5), (3, 127), (129, 64), (2, 3, 255), (507, 576)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain_rms_norm(x, weight):  # as in transformers: the statistics in float32 at least
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(weight.dtype)


def plain_add_rms_norm(x, residual, weight):
    return plain_rms_norm(x + residual, weight), x + residual


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    assert_accurate_everywhere(
        rms_norm, plain_rms_norm, [3 * random(*shape), random(shape[-1])], [random(*shape)], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype):
    inputs, grads = [random(*shape), 3 * random(*shape), random(shape[-1])], [random(*shape), random(*shape)]
    if dtype is torch.float32:
        return assert_accurate_everywhere(add_rms_norm, plain_add_rms_norm, inputs, grads, dtype)
    # In 16 bits the sum is rounded before the norm, so the exact sum is not the truth: give sums that are
    # exact.
    inputs[:2] = (x.mul(8).round() / 8 for x in inputs[:2])
    assert_accurate_everywhere(add_rms_norm, plain_add_rms_norm, inputs, grads, dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_is_wide", [False, True])
def test_float32_residual_stream(shape, dtype, x_is_wide):
    """Beside a 16-bit weight, x and residual may be float32: the sum is float32, and normed without being
    rounded first."""
    inputs = [
        torch.randn(shape).to(dtype if not x_is_wide else torch.float32),
        3 * torch.randn(shape),
        torch.randn(shape[-1]).to(dtype),
    ]
    grads = [torch.randn(shape).to(dtype), torch.randn(shape)]
    results, plain = run(add_rms_norm, inputs, grads), run(plain_add_rms_norm, inputs, grads)
    exact = run(plain_add_rms_norm, [x.double() for x in inputs], grads)
    assert [y.dtype for y in results[0]] == [dtype, torch.float32] and [g.dtype for g in results[1]] == [
        x.dtype for x in inputs
    ]
    assert torch.equal(results[0][1], inputs[0] + inputs[1])
    for found, plainly, truth in zip(
        *((*part[0], *part[1]) for part in (results, plain, exact)), strict=True
    ):
        assert_accurate(found, plainly, truth)
    alone = run(lambda x, weight: rms_norm(x, weight, EPS), [inputs[1], inputs[2]], grads[:1])
    assert alone[0][0].dtype == dtype and [g.dtype for g in alone[1]] == [torch.float32, dtype]
    for found, plainly, truth in zip(
        *(
            (*part[0], *part[1])
            for part in (
                alone,
                run(plain_rms_norm, inputs[1:], grads[:1]),
                run(plain_rms_norm, [x.double() for x in inputs[1:]], grads[:1]),
            )
        ),
        strict=True,
    ):
        assert_accurate(found, plainly, truth)


def test_autocast_keeps_a_float32_stream():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x_ in (x, x.bfloat16()):
            normed, total = add_rms_norm(x_, residual, weight)
            assert normed.dtype == torch.bfloat16 and total.dtype == torch.float32
            assert torch.equal(total, x_ + residual)
        assert rms_norm(x, weight).dtype == torch.bfloat16
        inside = rms_norm(x, weight)
        assert add_rms_norm(x.bfloat16(), residual.bfloat16(), weight)[1].dtype == torch.bfloat16
    assert torch.equal(inside, rms_norm(x, weight).bfloat16()), (
        "neither the weight nor the norm may be rounded before the result is"
    )


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float16),
    ],
)
def test_mixed_dtypes(dtypes):
    check_mixed_dtypes(dtypes, "cpu")


def check_mixed_dtypes(dtypes, device):
    """Float32 beside 16 bits: everything is computed from what the arguments hold, each gradient comes in its
    argument's dtype."""
    shapes = (5, 33), (5, 33), (33,)  # eighths: a sum of 16 bits is exact, too
    inputs = [
        (8 * torch.randn(shape)).round().div(8).to(device, dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    narrow = next(dtype for dtype in dtypes if dtype.itemsize == 2)
    grads = [
        torch.randn(5, 33).to(device, narrow),
        torch.randn(5, 33).to(device, torch.promote_types(*dtypes[:2])),
    ]
    for op, plain, arguments, upstream in [
        (add_rms_norm, plain_add_rms_norm, inputs, grads),
        (rms_norm, plain_rms_norm, inputs[::2], grads[:1]),
    ]:
        results, gradients = run(op, arguments, upstream)
        exact, exact_gradients = run(plain, [x.double() for x in arguments], [g.double() for g in upstream])
        if (
            op is rms_norm
            and torch.float32 in (arguments[0].dtype, arguments[1].dtype)
            and narrow not in (arguments[0].dtype, arguments[1].dtype)
        ):
            continue  # nothing of 16 bits among them
        assert results[0].dtype == narrow and [g.dtype for g in gradients] == [x.dtype for x in arguments]
        for one, two in zip((*results, *gradients), (*exact, *exact_gradients), strict=True):
            assert (one.double() - two).norm() <= RELATIVE[one.dtype] * two.norm()


def test_gradcheck():
    x, residual, weight = (random(*shape).requires_grad_() for shape in ((4, 7), (4, 7), (7,)))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))


@pytest.mark.parametrize(
    "op, inputs", [(rms_norm, ((6, 33), (33,))), (add_rms_norm, ((6, 33), (6, 33), (33,)))]
)
def test_strided(op, inputs):
    inputs = [torch.randn(shape) for shape in inputs]
    grads = [torch.randn(6, 33) for _ in range(len(inputs) - 1)]
    expected = run(op, inputs, grads)
    for change in (strided, lambda x: x.T.contiguous().T if x.dim() == 2 else x):
        found = run(op, [change(x) for x in inputs], [change(g) for g in grads])
        assert all(y.is_contiguous() for y in found[0])
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
    torch.testing.assert_close(
        rms_norm(torch.full((2, 8), 6e4, dtype=torch.float16), weight.half()), torch.ones(2, 8).half()
    )
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    assert rms_norm(x, weight).isnan().any(1).tolist() == [False, True, False]


def test_no_tokens():
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    normed, total = add_rms_norm(x, x, weight)
    assert normed.shape == total.shape == (0, 8)
    (normed.sum() + rms_norm(x, weight).sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize(
    "argument, call",
    [
        ("weight", lambda x: rms_norm(x, torch.ones(5))),
        ("weight", lambda x: rms_norm(x, torch.ones(4, dtype=torch.float64))),
        ("weight", lambda x: rms_norm(x.half(), torch.ones(4, dtype=torch.bfloat16))),
        ("weight", lambda x: rms_norm(x, torch.ones(4, device="meta"))),
        ("x", lambda x: rms_norm(x.int(), torch.ones(4))),
        ("x", lambda x: rms_norm(x[0, 0], torch.ones(1))),
        ("residual", lambda x: add_rms_norm(x, x[:2], torch.ones(4))),
        ("residual", lambda x: add_rms_norm(x, x.double(), torch.ones(4))),
        ("residual", lambda x: add_rms_norm(x.double(), x, torch.ones(4).double())),
        ("residual", lambda x: add_rms_norm(x.half(), x.bfloat16(), torch.ones(4).half())),
        ("weight", lambda x: add_rms_norm(x, x, torch.ones(3))),
    ],
)
def test_wrong_arguments(argument, call):
    with pytest.raises(ValueError, match=f"^{argument} (has shape|is)"):
        call(torch.randn(3, 4))
