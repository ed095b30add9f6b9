"""rms_norm and add_rms_norm, on the reference and on Triton."""

import pytest
import torch
from checks import (
    RELATIVE,
    assert_accurate,
    assert_accurate_everywhere,
    assert_close_everywhere,
    assert_equal_everywhere,
    run,
    strided,
    tensors_of,
)
from miniplm.kernels import add_rms_norm, rms_norm
from oracles import plain_add_rms_norm, plain_rms_norm
from random_inputs import on, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 5),
    (3, 127),
    (129, 64),
    (2, 3, 255),
    (5, 507),
    (1, 1024),
    (2, 5, 2, 96),
    pytest.param((507, 576), marks=pytest.mark.large),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, implementation):
    x, weight, grad = on(implementation.device, 3 * random(*shape), random(shape[-1]), random(*shape))
    assert_accurate_everywhere(rms_norm, plain_rms_norm, [x, weight], [grad], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype, implementation):
    x, residual, weight = random(*shape), 3 * random(*shape), random(shape[-1])
    if dtype is not torch.float32:
        # In 16 bits the sum is rounded before the norm, so the exact sum is not the truth: give sums that are
        # exact.
        x, residual = (value.mul(8).round() / 8 for value in (x, residual))
    inputs = on(implementation.device, x, residual, weight)
    grads = on(implementation.device, random(*shape), random(*shape))
    assert_accurate_everywhere(add_rms_norm, plain_add_rms_norm, inputs, grads, dtype)


# --- float32 beside 16 bits ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_is_wide", [False, True])
def test_float32_residual_stream(shape, dtype, x_is_wide, implementation):
    """Beside a 16-bit weight, x and residual may be float32: the sum is float32, and normed without being
    rounded first."""
    device = implementation.device
    x = random(*shape).to(device, torch.float32 if x_is_wide else dtype)
    residual = (3 * random(*shape)).to(device, torch.float32)
    weight = random(shape[-1]).to(device, dtype)
    grads = [random(*shape).to(device, dtype), random(*shape).to(device, torch.float32)]
    for op, plain, inputs, upstream in (
        (add_rms_norm, plain_add_rms_norm, [x, residual, weight], grads),
        (rms_norm, plain_rms_norm, [residual, weight], grads[:1]),
    ):
        results, gradients = run(op, inputs, upstream)
        assert [y.dtype for y in results] == [dtype, torch.float32][: len(results)]
        assert [g.dtype for g in gradients] == [y.dtype for y in inputs]
        if op is add_rms_norm:
            assert torch.equal(results[1], x + residual)
        plainly = run(plain, inputs, upstream)
        exact = run(plain, [y.double() for y in inputs], upstream)
        for found, one, truth in zip(
            (*results, *gradients), tensors_of(plainly), tensors_of(exact), strict=True
        ):
            assert_accurate(found, one, truth)


def test_autocast_keeps_a_float32_stream(implementation):
    device, dtype = implementation.device, torch.bfloat16
    if implementation.name == "triton" and device == "cpu":
        dtype = torch.float16  # the interpreter cuts bfloat16 off instead of rounding it
    x, residual, weight = (torch.randn(*shape, device=device) for shape in ((3, 8), (3, 8), (8,)))
    with torch.autocast(device, dtype=dtype):
        for x_ in (x, x.to(dtype)):
            normed, total = add_rms_norm(x_, residual, weight)
            assert normed.dtype == dtype and total.dtype == torch.float32
            assert torch.equal(total, x_ + residual)
        inside = rms_norm(x, weight)
        assert inside.dtype == dtype
        assert add_rms_norm(x.to(dtype), residual.to(dtype), weight)[1].dtype == dtype
    rounded_last = rms_norm(x, weight).to(dtype)
    assert torch.equal(inside, rounded_last), "neither the weight nor the norm is rounded before the result"


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_mixed_dtypes(dtypes, implementation):
    """Float32 beside 16 bits: everything is computed from what the arguments hold, each gradient comes in its
    argument's dtype."""
    device = implementation.device
    inputs = [
        random(*shape).mul(8).round().div(8).to(device, dtype)  # eighths: a sum of 16 bits is exact, too
        for shape, dtype in zip(((5, 33), (5, 33), (33,)), dtypes, strict=True)
    ]
    low_precision = next(dtype for dtype in dtypes if dtype.itemsize == 2)
    grads = [
        random(5, 33).to(device, low_precision),
        random(5, 33).to(device, torch.promote_types(*dtypes[:2])),
    ]
    calls = [(add_rms_norm, plain_add_rms_norm, inputs, grads)]
    if low_precision in (dtypes[0], dtypes[2]):
        calls.append((rms_norm, plain_rms_norm, inputs[::2], grads[:1]))
    for op, plain, arguments, upstream in calls:
        results, gradients = run(op, arguments, upstream)
        exact = run(plain, [x.double() for x in arguments], [g.double() for g in upstream])
        assert results[0].dtype == low_precision
        assert [g.dtype for g in gradients] == [x.dtype for x in arguments]
        for one, two in zip((*results, *gradients), tensors_of(exact), strict=True):
            assert (one.double() - two).norm() <= RELATIVE[one.dtype] * two.norm()


# --- gradients ---


def test_gradcheck():
    x, residual, weight = (random(*shape).requires_grad_() for shape in ((4, 7), (4, 7), (7,)))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))


def test_one_output_used(implementation):
    """The gradient through each of add_rms_norm's outputs alone."""
    inputs = on(implementation.device, random(5, 9), random(5, 9), random(9), dtype=implementation.finest)
    inputs = [x.requires_grad_() for x in inputs]
    for output in (0, 1):
        found, expected = (
            torch.autograd.grad(op(*inputs)[output].square().sum(), inputs[:2])
            for op in (add_rms_norm, plain_add_rms_norm)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True])
def test_opcheck(wide, implementation):
    device, dtype = implementation.device, torch.float16
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((7, 12), (12,)))
    residual = torch.randn(7, 12, device=device, dtype=torch.float32 if wide else dtype)
    rstd = torch.rand(7, 1, device=device)
    example = x, residual, weight, rstd, residual, dtype if wide else None
    torch.library.opcheck(torch.ops.miniplm.rms_norm_backward.default, example, rtol=1e-2, atol=1e-2)
    for tensor in (x, residual, weight):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.miniplm.rms_norm.default, (residual, weight, 1e-6, dtype))
    torch.library.opcheck(torch.ops.miniplm.add_rms_norm.default, (x, residual, weight, 1e-6, dtype))


# --- layouts and extremes ---


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((6, 33), strided),
        ((6, 33), lambda x: x.T.contiguous().T),
        ((5, 4, 32), lambda x: torch.cat((x, x, x), 1)[:, 4:8]),
        ((4, 5, 32), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        ((3, 2, 5, 8), lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)),
        ((7, 16), lambda x: torch.cat((x, x), 1)[:, :16]),
        ((7, 16), lambda x: x[:1].expand(7, -1)),
    ],
)
def test_layouts(shape, layout, implementation):
    """Views of any strides, heads of a fused projection among them, give what contiguous copies give (on
    Triton to the bit), and their results are contiguous."""
    x, residual, weight = on(
        implementation.device, random(*shape), random(*shape), random(shape[-1]), dtype=torch.float32
    )
    tolerance = 0 if implementation.name == "triton" else 1e-6
    inputs, grads = [layout(x), layout(residual), weight], [layout(residual), layout(x)]
    for op, used, upstream in ((add_rms_norm, inputs, grads), (rms_norm, inputs[1:], grads[:1])):
        found = run(op, used, upstream)
        expected = run(op, [y.contiguous() for y in used], [g.contiguous() for g in upstream])
        assert_close_everywhere(found, expected, rtol=tolerance, atol=tolerance)
        assert all(y.is_contiguous() for y in found[0])


def test_strided_weight(implementation):
    x, weight = on(implementation.device, random(3, 8), random(16), dtype=torch.float32)
    assert torch.equal(rms_norm(x, weight[::2]), rms_norm(x, weight[::2].contiguous()))


def test_repeatable_to_the_bit(implementation):
    device = implementation.device
    x, residual, weight = random(515, 40).half(), random(515, 40).float(), random(40).half()
    inputs, grads = on(device, x, residual, weight), on(device, random(515, 40).half(), random(515, 40))
    assert_equal_everywhere(run(add_rms_norm, inputs, grads), run(add_rms_norm, inputs, grads))


def test_extremes(implementation):
    device = implementation.device
    weight = torch.ones(8, device=device)
    zeros, ones = torch.zeros(2, 8, device=device), torch.ones(2, 8, device=device)
    assert torch.equal(rms_norm(zeros, weight), zeros)
    torch.testing.assert_close(rms_norm(1e15 * ones, weight), ones)
    torch.testing.assert_close(rms_norm((6e4 * ones).half(), weight.half()), ones.half())
    x = torch.randn(3, 8, device=device)
    x[1, 2] = torch.nan
    assert rms_norm(x, weight).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 4, 8)])
def test_no_rows(shape, implementation):
    x = torch.randn(shape, device=implementation.device, requires_grad=True)
    weight = torch.randn(8, device=implementation.device, requires_grad=True)
    normed, total = add_rms_norm(x, x, weight)
    assert normed.shape == total.shape == rms_norm(x, weight).shape == shape
    (normed.sum() + rms_norm(x, weight).sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


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
