"""apply_rotary, on the reference and on Triton."""

import pytest
import torch
from checks import assert_accurate_everywhere, assert_equal_everywhere, run, strided
from miniplm.kernels import apply_rotary
from oracles import plain_rotary
from random_inputs import heads_first, on, random, rotary_frequencies

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_queries_and_keys(implementation, tokens, heads, key_heads, dim):
    return on(implementation.device, random(tokens, heads, dim), random(tokens, key_heads, dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, heads, key_heads, dim",
    [
        (1, 1, 1, 2),
        (1, 1, 1, 16),
        (3, 4, 2, 32),
        (127, 3, 1, 64),
        (129, 2, 2, 96),
        (33, 8, 4, 128),
        (33, 3, 1, 128),
        (17, 1, 7, 16),
        (5, 2, 1, 6),
        (31, 13, 1, 8),
        pytest.param(127, 6, 2, 64, marks=pytest.mark.large),
    ],
)
def test_rotary(tokens, heads, key_heads, dim, dtype, implementation):
    q, k = random_queries_and_keys(implementation, tokens, heads, key_heads, dim)
    positions = torch.randint(0, 1024, (tokens,), device=implementation.device)
    if dtype is torch.float32:
        positions %= 16  # small angles, because the angle itself is rounded to float32 in both
    # One table in float64, so that the truth and the op differ by arithmetic alone.
    inv_freq = rotary_frequencies(dim).to(implementation.device)
    grads = [torch.randn_like(q), torch.randn_like(k)]
    assert_accurate_everywhere(
        lambda q, k: apply_rotary(q, k, positions, inv_freq),
        lambda q, k: plain_rotary(q, k, positions, inv_freq),
        [q, k],
        grads,
        dtype,
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_any_position(inverse, implementation):
    """Sine and cosine are right at angles of any size, including those where fast approximations are not."""
    positions = [0, 1, 1000, 100_000, 131_071, 1_000_000, 16_000_001, 2_000_000_011, 2**40 + 12345, -7]
    positions = torch.tensor(positions, device=implementation.device)
    inv_freq = rotary_frequencies(64).to(implementation.device, torch.float32)
    q, k = (x.float() for x in random_queries_and_keys(implementation, 10, 2, 1, 64))
    # The angle is one float32 product; its sine is taken exactly.
    angles = (positions.float()[:, None] * inv_freq).double()[:, None]
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1) * (-1 if inverse else 1)
    for x, found in zip((q, k), torch.ops.miniplm.rotary(q, k, positions, inv_freq, inverse), strict=True):
        truth = x.double() * cos + x.double().roll(32, -1) * sin
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6)
        assert torch.equal(found[0], x[0])  # position 0 is not rotated


def test_long_positions_are_those_of_float32_angles(implementation):
    q, k = (x.float() for x in random_queries_and_keys(implementation, 5, 2, 2, 64))
    positions = torch.tensor([0, 1, 1000, 100_000, 1_000_000], device=implementation.device)
    inv_freq = rotary_frequencies(64).to(implementation.device, torch.float32)
    found, expected = (op(q, k, positions, inv_freq) for op in (apply_rotary, plain_rotary))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_int32_positions_and_float64_frequencies(implementation):
    q, k = (x.float() for x in random_queries_and_keys(implementation, 9, 2, 1, 8))
    positions, inv_freq = on(implementation.device, torch.arange(9), rotary_frequencies(8))
    expected = apply_rotary(q, k, positions, inv_freq.float())
    for arguments in (
        (positions.int(), inv_freq.float()),
        (positions, inv_freq),
        (strided(positions), strided(inv_freq.float())),
    ):
        assert_equal_everywhere(apply_rotary(q, k, *arguments), expected)


@pytest.mark.slow
def test_gradcheck():
    q, k = (random(3, heads, 8).requires_grad_() for heads in (4, 2))
    call = lambda q, k: apply_rotary(q, k, torch.tensor([5, 0, 7]), rotary_frequencies(8))
    assert torch.autograd.gradcheck(call, (q, k))
    assert torch.autograd.gradgradcheck(call, (q, k))


def test_layouts(implementation):
    """Views of a fused projection and any other strides give the bits of contiguous copies, and the results
    are contiguous."""
    device = implementation.device
    positions, inv_freq = on(device, torch.arange(6), rotary_frequencies(16).float())
    qkv = torch.randn(6, 8 * 16, device=device)
    q, k = qkv[:, : 4 * 16].view(6, 4, 16), qkv[:, 4 * 16 : 6 * 16].view(6, 2, 16)
    grads = [torch.randn(6, 4, 16, device=device), torch.randn(6, 2, 16, device=device)]
    call = lambda q, k: apply_rotary(q, k, positions, inv_freq)
    expected = run(call, [q.contiguous(), k.contiguous()], grads)
    for change in (lambda x: x, strided, heads_first, lambda x: torch.cat((x, x), 2)[..., :16]):
        found = run(call, [change(q), change(k)], [change(g) for g in grads])
        assert_equal_everywhere(found, expected)
        assert all(y.is_contiguous() for y in found[0])
    same = q[:1].expand(6, 4, 16)
    assert torch.equal(call(same, k)[0], call(same.contiguous(), k)[0])


def test_repeatable_and_undone_by_its_inverse(implementation):
    q, k = (x.float() for x in random_queries_and_keys(implementation, 40, 3, 2, 32))
    arguments = on(implementation.device, torch.arange(40), rotary_frequencies(32).float())
    turned = torch.ops.miniplm.rotary(q, k, *arguments, False)
    assert_equal_everywhere(torch.ops.miniplm.rotary(q, k, *arguments, False), turned)
    back = torch.ops.miniplm.rotary(*turned, *arguments, True)
    torch.testing.assert_close(back, (q, k), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("tokens, heads, key_heads", [(0, 4, 2), (3, 0, 2), (3, 2, 0)])
def test_nothing_to_turn(tokens, heads, key_heads, implementation):
    q, k = random_queries_and_keys(implementation, tokens, heads, key_heads, 16)
    positions, inv_freq = on(implementation.device, torch.zeros(tokens).long(), torch.ones(8))
    assert_equal_everywhere(apply_rotary(q.float(), k.float(), positions, inv_freq), (q.float(), k.float()))


@pytest.mark.slow
def test_opcheck(implementation):
    q, k = (x.float().requires_grad_() for x in random_queries_and_keys(implementation, 7, 4, 2, 8))
    positions, inv_freq = on(implementation.device, torch.arange(7), torch.rand(4))
    torch.library.opcheck(torch.ops.miniplm.rotary.default, (q, k, positions, inv_freq, False))


@pytest.mark.parametrize(
    "argument, change",
    [
        ("q", {"q": torch.randn(3, 16)}),
        ("q", {"q": torch.randn(3, 2, 15)}),
        ("q", {"q": torch.zeros(3, 2, 16).long()}),
        ("k", {"k": torch.randn(2, 2, 16)}),
        ("k", {"k": torch.randn(3, 2, 8)}),
        ("k", {"k": torch.randn(3, 2, 16).half()}),
        ("positions", {"positions": torch.arange(4)}),
        ("positions", {"positions": torch.rand(3)}),
        ("positions", {"positions": torch.arange(3).to("meta")}),
        ("inv_freq", {"inv_freq": torch.ones(16)}),
        ("inv_freq", {"inv_freq": torch.ones(8).half()}),
    ],
)
def test_wrong_arguments(argument, change):
    right = {
        "q": torch.randn(3, 2, 16),
        "k": torch.randn(3, 2, 16),
        "positions": torch.arange(3),
        "inv_freq": torch.ones(8),
    }
    apply_rotary(**right)
    with pytest.raises(ValueError, match=f"^{argument} (has shape|is)"):
        apply_rotary(**{**right, **change})
