"""apply_rotary on Triton."""

import pytest
import torch
from checks import assert_accurate_everywhere, run, strided
from miniplm.kernels import apply_rotary
from test_rotary import frequencies, plain_rotary

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(device, *shape):
    return torch.randn(shape, dtype=torch.float64).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, heads, key_heads, dim",
    [
        (1, 1, 1, 2),
        (3, 4, 2, 32),
        (127, 3, 1, 64),
        (129, 2, 2, 96),
        (33, 8, 4, 128),
        (17, 1, 7, 16),
        (5, 2, 1, 6),
        (31, 13, 1, 8),
    ],
)
def test_rotary(tokens, heads, key_heads, dim, dtype, device):
    q, k = make(device, tokens, heads, dim), make(device, tokens, key_heads, dim)
    positions, inv_freq = torch.randint(0, 1024, (tokens,), device=device), frequencies(dim).to(device)

    def with_positions(op):  # float32: small angles, because the angle itself is rounded to float32 in both
        return lambda q, k: op(q, k, positions % 16 if dtype is torch.float32 else positions, inv_freq)

    grads = [make(device, *q.shape), make(device, *k.shape)]
    assert_accurate_everywhere(
        with_positions(apply_rotary), with_positions(plain_rotary), [q, k], grads, dtype
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_any_position(inverse, device):
    """Sine and cosine are right at angles of any size, including those where fast approximations are not."""
    positions = torch.tensor(
        [0, 1, 1000, 100_000, 131_071, 1_000_000, 16_000_001, 2_000_000_011, 2**40 + 12345, -7], device=device
    )
    q, k, inv_freq = (
        torch.randn(10, 2, 64, device=device),
        torch.randn(10, 1, 64, device=device),
        frequencies(64).float().to(device),
    )
    angles = (positions.float()[:, None] * inv_freq).double()[
        :, None
    ]  # the angle is one float32 product; its sine is taken exactly
    cos, sin = (
        torch.cat((angles.cos(), angles.cos()), -1),
        torch.cat((-angles.sin(), angles.sin()), -1) * (-1 if inverse else 1),
    )
    for x, found in zip((q, k), torch.ops.miniplm.rotary(q, k, positions, inv_freq, inverse), strict=True):
        torch.testing.assert_close(
            found.double(), x.double() * cos + x.double().roll(32, -1) * sin, rtol=0, atol=2e-6
        )
        assert torch.equal(found[0], x[0])


def test_int32_positions_and_float64_frequencies(device):
    q, k = torch.randn(9, 2, 8, device=device), torch.randn(9, 1, 8, device=device)
    positions, inv_freq = torch.arange(9, device=device), frequencies(8).to(device)
    expected = apply_rotary(q, k, positions, inv_freq.float())
    for arguments in (
        (positions.int(), inv_freq.float()),
        (positions, inv_freq),
        (strided(positions), strided(inv_freq.float())),
    ):
        for one, two in zip(apply_rotary(q, k, *arguments), expected, strict=True):
            assert torch.equal(one, two)


def test_layouts(device):
    """Views of a fused projection and any other strides give the bits of contiguous copies, and the results
    are contiguous."""
    positions, inv_freq = torch.arange(6, device=device), frequencies(16).float().to(device)
    qkv = torch.randn(6, 8 * 16, device=device)
    q, k = qkv[:, : 4 * 16].view(6, 4, 16), qkv[:, 4 * 16 : 6 * 16].view(6, 2, 16)
    grads = [torch.randn(6, 4, 16, device=device), torch.randn(6, 2, 16, device=device)]
    call = lambda q, k: apply_rotary(q, k, positions, inv_freq)
    expected = run(call, [q.contiguous(), k.contiguous()], grads)
    for change in (
        lambda x: x,
        strided,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), 2)[..., :16],
    ):
        found = run(call, [change(q), change(k)], [change(g) for g in grads])
        for one, two in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(one, two)
        assert all(y.is_contiguous() for y in found[0])
    same = q[:1].expand(6, 4, 16)
    assert torch.equal(call(same, k)[0], call(same.contiguous(), k)[0])


@pytest.mark.parametrize("heads_first", [False, True])
def test_offsets_beyond_int32(heads_first, far_apart, device):
    q, k = far_apart(3, 32).unflatten(1, (2, 16)), far_apart(3, 16)[:, None]
    if heads_first:  # the heads are far apart instead of the tokens
        q, k = (
            far_apart(3, 3 * 16).unflatten(1, (3, 16)).transpose(0, 1),
            far_apart(3, 3 * 16).unflatten(1, (3, 16)).transpose(0, 1),
        )
    positions, inv_freq = torch.arange(3, device=device), torch.rand(8, device=device)
    for one, two in zip(
        apply_rotary(q, k, positions, inv_freq),
        apply_rotary(q.contiguous(), k.contiguous(), positions, inv_freq),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_repeatable_and_undone_by_its_inverse(device):
    q, k = torch.randn(40, 3, 32, device=device), torch.randn(40, 2, 32, device=device)
    arguments = torch.arange(40, device=device), frequencies(32).float().to(device)
    turned = torch.ops.miniplm.rotary(q, k, *arguments, False)
    for one, two, back, x in zip(
        turned,
        torch.ops.miniplm.rotary(q, k, *arguments, False),
        torch.ops.miniplm.rotary(*turned, *arguments, True),
        (q, k),
        strict=True,
    ):
        assert torch.equal(one, two)
        torch.testing.assert_close(back, x, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("tokens, heads, key_heads", [(0, 4, 2), (3, 0, 2), (3, 2, 0)])
def test_nothing_to_turn(tokens, heads, key_heads, device):
    q, k = torch.randn(tokens, heads, 16, device=device), torch.randn(tokens, key_heads, 16, device=device)
    for one, x in zip(
        apply_rotary(q, k, torch.zeros(tokens, device=device).long(), torch.ones(8, device=device)),
        (q, k),
        strict=True,
    ):
        assert torch.equal(one, x)


def test_opcheck(device):
    q, k = (
        torch.randn(7, 4, 8, device=device, requires_grad=True),
        torch.randn(7, 2, 8, device=device, requires_grad=True),
    )
    torch.library.opcheck(
        torch.ops.miniplm.rotary.default,
        (q, k, torch.arange(7, device=device), torch.rand(4, device=device), False),
    )
