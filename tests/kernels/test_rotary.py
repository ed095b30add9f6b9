import pytest
import torch
from checks import assert_accurate_everywhere, run, strided
from miniplm.kernels import apply_rotary


def frequencies(dim):
    return 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def plain_rotary(q, k, positions, inv_freq):
    """As in transformers, the angles in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    angles = positions.to(wide)[:, None] * inv_freq.to(wide)
    cos, sin = (torch.cat((part, part), -1)[:, None].to(q.dtype) for part in (angles.cos(), angles.sin()))

    def half_turn(x):
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "tokens, heads, key_heads, dim",
    [(1, 1, 1, 16), (3, 4, 2, 32), (127, 6, 2, 64), (129, 2, 2, 96), (33, 3, 1, 128)],
)
def test_rotary(tokens, heads, key_heads, dim, dtype):
    q, k = (torch.randn(tokens, h, dim, dtype=torch.float64) for h in (heads, key_heads))
    positions = torch.randint(0, 1024, (tokens,))
    inv_freq = frequencies(
        dim
    )  # one table in float64, so that the truth and the op differ by arithmetic alone

    def with_positions(op):
        return lambda q, k: op(q, k, positions % 16 if dtype is torch.float32 else positions, inv_freq)

    # float32: small angles, because the angle itself is rounded to float32 in both
    grads = [torch.randn_like(q), torch.randn_like(k)]
    assert_accurate_everywhere(
        with_positions(apply_rotary), with_positions(plain_rotary), [q, k], grads, dtype
    )


def test_long_positions_are_those_of_float32_angles():
    q, k = torch.randn(5, 2, 64), torch.randn(5, 2, 64)
    positions, inv_freq = torch.tensor([0, 1, 1000, 100_000, 1_000_000]), frequencies(64).float()
    for found, expected in zip(
        apply_rotary(q, k, positions, inv_freq), plain_rotary(q, k, positions, inv_freq), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(apply_rotary(q, k, positions, inv_freq)[0][0], q[0])  # position 0 is not rotated
    for one, two in zip(
        apply_rotary(q, k, positions.int(), inv_freq), apply_rotary(q, k, positions, inv_freq), strict=True
    ):
        assert torch.equal(one, two)


def test_gradcheck():
    q, k = (torch.randn(3, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2))
    call = lambda q, k: apply_rotary(q, k, torch.tensor([5, 0, 7]), frequencies(8))
    assert torch.autograd.gradcheck(call, (q, k))
    assert torch.autograd.gradgradcheck(call, (q, k))


def test_strided():
    positions, inv_freq = torch.arange(6), frequencies(16).float()
    qkv = torch.randn(6, 8 * 16)
    q, k = (
        qkv[:, : 4 * 16].view(6, 4, 16),
        qkv[:, 4 * 16 : 6 * 16].view(6, 2, 16),
    )  # as a fused projection gives them
    grads = [torch.randn(6, 4, 16), torch.randn(6, 2, 16)]
    call = lambda q, k: apply_rotary(q, k, positions, inv_freq)
    expected = run(call, [q.contiguous(), k.contiguous()], grads)
    for change in (lambda x: x, strided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        for found, wanted in zip(
            run(call, [change(q), change(k)], [change(g) for g in grads]), expected, strict=True
        ):
            assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_no_tokens():
    q, k = apply_rotary(torch.randn(0, 4, 16), torch.randn(0, 2, 16), torch.arange(0), torch.ones(8))
    assert q.shape == (0, 4, 16) and k.shape == (0, 2, 16)


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
