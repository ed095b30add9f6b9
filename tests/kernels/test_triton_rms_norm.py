"""rms_norm and add_rms_norm on Triton."""

import pytest
import torch
from checks import assert_accurate, assert_accurate_everywhere, run, strided
from miniplm.kernels import add_rms_norm, rms_norm, tuning
from test_rms_norm import check_mixed_dtypes, plain_add_rms_norm, plain_rms_norm

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 5), (3, 127), (129, 64), (2, 3, 255), (5, 507), (1, 1024), (2, 5, 2, 96)]


def make(device, *shape):
    return torch.randn(shape, dtype=torch.float64).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, device):
    assert_accurate_everywhere(
        rms_norm,
        plain_rms_norm,
        [3 * make(device, *shape), make(device, shape[-1])],
        [make(device, *shape)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype, device):
    # In 16 bits the sum is rounded before the norm, so the exact sum is not the truth: give sums that are
    # exact.
    x, residual = (make(device, *shape).mul(8).round() / 8 for _ in range(2))
    grads = [make(device, *shape), make(device, *shape)]
    assert_accurate_everywhere(
        add_rms_norm, plain_add_rms_norm, [x, 3 * residual, make(device, shape[-1])], grads, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_is_wide", [False, True])
def test_float32_residual_stream(shape, dtype, x_is_wide, device):
    inputs = [
        make(device, *shape).to(torch.float32 if x_is_wide else dtype),
        make(device, *shape).float(),
        make(device, shape[-1]).to(dtype),
    ]
    grads = [make(device, *shape).to(dtype), make(device, *shape).float()]
    for op, plain, used, upstream in (
        (add_rms_norm, plain_add_rms_norm, inputs, grads),
        (rms_norm, plain_rms_norm, inputs[1:], grads[:1]),
    ):
        results, plainly, exact = (
            run(op, used, upstream),
            run(plain, used, upstream),
            run(plain, [x.double() for x in used], upstream),
        )
        assert [g.dtype for g in results[1]] == [x.dtype for x in used]
        for one, two, three in zip(
            *((*part[0], *part[1]) for part in (results, plainly, exact)), strict=True
        ):
            assert_accurate(one, two, three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows(dtype, device):
    """Every program takes several tiles of rows, and the sum for the weight spans them all."""
    inputs, grads = [make(device, 1027, 33), make(device, 33)], [1 + make(device, 1027, 33)]
    assert_accurate_everywhere(rms_norm, plain_rms_norm, inputs, grads, dtype)


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
def test_layouts(shape, layout, device):
    """Views of any strides, heads of a fused projection among them, give the bits of contiguous copies, and
    their results are contiguous."""
    x, residual, weight = (make(device, *size).float() for size in (shape, shape, shape[-1:]))
    inputs, grads = [layout(x), layout(residual), weight], [layout(residual), layout(x)]
    for op, used, upstream in ((add_rms_norm, inputs, grads), (rms_norm, inputs[1:], grads[:1])):
        found, expected = (
            run(op, used, upstream),
            run(op, [y.contiguous() for y in used], [g.contiguous() for g in upstream]),
        )
        for one, two in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(one, two)
        assert all(y.is_contiguous() for y in found[0])


def test_strided_weight(device):
    x, weight = make(device, 3, 8).float(), make(device, 16).float()
    assert torch.equal(rms_norm(x, weight[::2]), rms_norm(x, weight[::2].contiguous()))


def test_repeatable_to_the_bit(device):
    inputs = [make(device, 515, 40).half(), make(device, 515, 40).float(), make(device, 40).half()]
    grads = [make(device, 515, 40).half(), make(device, 515, 40)]
    first, second = run(add_rms_norm, inputs, grads), run(add_rms_norm, inputs, grads)
    for one, two in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, two)


def test_one_output_used(device):
    inputs = [make(device, *shape).float().requires_grad_() for shape in ((5, 9), (5, 9), (9,))]
    for output in (0, 1):
        found = torch.autograd.grad(add_rms_norm(*inputs)[output].square().sum(), inputs[:2])
        expected = torch.autograd.grad(plain_add_rms_norm(*inputs)[output].square().sum(), inputs[:2])
        torch.testing.assert_close(found, expected)


def test_extremes(device):
    weight = torch.ones(8, device=device)
    assert torch.equal(rms_norm(torch.zeros(2, 8, device=device), weight), torch.zeros(2, 8, device=device))
    torch.testing.assert_close(
        rms_norm(torch.full((2, 8), 1e15, device=device), weight), torch.ones(2, 8, device=device)
    )
    half = torch.full((2, 8), 6e4, dtype=torch.float16, device=device)
    torch.testing.assert_close(rms_norm(half, weight.half()), torch.ones_like(half))
    x = torch.randn(3, 8, device=device)
    x[1, 2] = torch.nan
    assert rms_norm(x, weight).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 4, 8)])
def test_no_rows(shape, device):
    x, weight = (
        torch.randn(shape, device=device, requires_grad=True),
        torch.randn(8, device=device, requires_grad=True),
    )
    normed, total = add_rms_norm(x, x, weight)
    assert normed.shape == total.shape == rms_norm(x, weight).shape == shape
    (normed.sum() + rms_norm(x, weight).sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("wide", [False, True])
def test_opcheck(wide, device):
    x, residual, weight = (
        torch.randn(7, 12, device=device).half(),
        torch.randn(7, 12, device=device),
        torch.randn(12, device=device).half(),
    )
    if not wide:
        residual = residual.half()
    rstd = torch.rand(7, 1, device=device)
    example = x, residual, weight, rstd, residual, torch.float16 if wide else None
    torch.library.opcheck(torch.ops.miniplm.rms_norm_backward.default, example, rtol=1e-2, atol=1e-2)
    for tensor in (x, residual, weight):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.miniplm.rms_norm.default, (residual, weight, 1e-6, torch.float16))
    torch.library.opcheck(torch.ops.miniplm.add_rms_norm.default, (x, residual, weight, 1e-6, torch.float16))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_mixed_dtypes(dtypes, device):
    check_mixed_dtypes(dtypes, device)


def test_offsets_beyond_int32(far_apart, device):
    x, residual = far_apart(3, 16), far_apart(3, 16)
    inputs, grads = [x, residual, make(device, 16).half()], [far_apart(3, 16), far_apart(3, 16)]
    found, expected = (
        run(add_rms_norm, inputs, grads),
        run(add_rms_norm, [y.contiguous() for y in inputs], [g.contiguous() for g in grads]),
    )
    for one, two in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 1000, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_on_a_gpu(width, dtype, device):
    inputs, grads = (
        [make(device, 301, width), make(device, 301, width), make(device, width)],
        [make(device, 301, width)] * 2,
    )
    if dtype is not torch.float32:
        inputs[:2] = (x.mul(8).round() / 8 for x in inputs[:2])
    assert_accurate_everywhere(add_rms_norm, plain_add_rms_norm, inputs, grads, dtype)


def test_blocks_hold_a_row():
    """What every launch takes for granted."""
    for width in (1, 5, 64, 96, 768, 1000, 1536, 4096, 8192, 16384, 20000):
        for where in (tuning.INTERPRETER, tuning.Target("cuda", 90, 132)):
            for name in ("rms_norm", "rms_norm_backward"):
                for itemsize in (2, 4):
                    for config in tuning.CANDIDATES[name](where, width=width, itemsize=itemsize):
                        assert (
                            width <= config.blocks["BLOCK_D"] < max(32, 2 * width)
                            and config.blocks["BLOCK_R"] >= 1
                        )
