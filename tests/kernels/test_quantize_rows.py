"""quantize_rows, on the reference and on Triton: every byte is the one that arithmetic says."""

import pytest
import torch
from checks import strided
from miniplm.kernels import quantize_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def magnitudes(rows, width, dtype):
    """Rows that differ by up to 10¹⁰ in magnitude, one of zeros."""
    x = torch.randn(rows, width) * torch.logspace(-6, 4, rows)[:, None]
    x[rows // 2] = 0
    return x.to(dtype)


def nearest(x):
    """The number of e4m3 nearest to each of x, ties to an even mantissa, found among all of them."""
    numbers = (
        torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    )  # 0 … 448, in order; odd bytes have odd mantissas
    above = torch.bucketize(x.abs().double(), numbers).clamp(1, 126)
    down, up = x.abs().double() - numbers[above - 1], numbers[above] - x.abs().double()
    return numbers[torch.where((down < up) | ((down == up) & (above % 2 == 1)), above - 1, above)] * x.sign()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 768), (5, 2049), (2, 5504), (130, 16)])
def test_every_element_is_rounded_to_the_nearest(shape, dtype, implementation):
    x = magnitudes(*shape, dtype)
    rows, scale = (result.cpu() for result in quantize_rows(x.to(implementation.device)))
    assert rows.shape == x.shape and rows.dtype == torch.float8_e4m3fn and rows.is_contiguous()
    assert scale.shape == (shape[0], 1) and scale.dtype == torch.float32
    largest = x.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest.clamp(min=1e-12) / 448, rtol=1e-6, atol=0)
    assert torch.equal(
        rows.double(), nearest(x.float() * (448 / largest.float().clamp(min=1e-12))).to(rows.dtype).double()
    )
    back = rows.double() * scale
    assert (
        (back - x.double()).abs() <= (x.double().abs() * 2**-4).maximum(scale * 2**-10) * (1 + 1e-6)
    ).all()


def test_ties_and_steps_below_the_smallest_normal(implementation):
    """All numbers halfway between two of e4m3, and their neighbours in float32; 448 in the row keeps the
    scale at 1."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(500.0))])
    x = torch.stack([x, -x])
    rows, scale = (result.cpu() for result in quantize_rows(x.to(implementation.device)))
    assert (scale == 1).all() and torch.equal(rows.double(), nearest(x))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite(value, implementation):
    """A row with an infinity or a NaN does not come out as numbers; the others do."""
    x = torch.randn(3, 20, device=implementation.device)
    x[1, 7] = value
    rows, scale = quantize_rows(x)
    product = rows.float() @ torch.ones(20, 1, device=implementation.device) * scale
    assert product.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize(
    "change",
    [
        strided,
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat((x, x), 1)[:, :31],
        lambda x: x[:1].expand(9, -1),
    ],
)
def test_layouts(change, implementation):
    x = change(torch.randn(9, 31, device=implementation.device))
    for found, wanted in zip(quantize_rows(x), quantize_rows(x.contiguous()), strict=True):
        assert torch.equal(found.float(), wanted.float()) and found.is_contiguous()


def test_no_rows(implementation):
    rows, scale = quantize_rows(torch.empty(0, 16, device=implementation.device))
    assert rows.shape == (0, 16) and scale.shape == (0, 1)


def test_autocast_changes_nothing(implementation):
    x = torch.randn(4, 32, device=implementation.device)
    plain = quantize_rows(x)
    with torch.autocast(implementation.device, torch.bfloat16):
        assert all(
            torch.equal(one.float(), two.float()) for one, two in zip(plain, quantize_rows(x), strict=True)
        )


def test_refusals():
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 4\]; it must be \[any, any\]"):
        quantize_rows(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        quantize_rows(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="quantize_rows has no derivative"):
        quantize_rows(torch.randn(2, 3, requires_grad=True))[1].sum().backward()
