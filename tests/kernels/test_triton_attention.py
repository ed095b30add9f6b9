"""flash_attention on Triton."""

import random

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from checks import assert_accurate_everywhere, run, strided
from miniplm.kernels import attention, dispatch, flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.usefixtures("triton_ops")
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]  # the interpreter cannot multiply bfloat16


def bounds(lengths, device):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def random_inputs(device, tokens, heads, key_heads, dim, dtype=torch.float64):
    return [torch.randn(tokens, h, dim, dtype=dtype).to(device) for h in (heads, key_heads, key_heads)]


def plain_attention(q, k, v, lengths, scale):
    """One document at a time: in float64 by the formula, else PyTorch's own."""
    parts = []
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for queries, keys, values in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        if q.dtype == torch.float64:
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        else:
            queries, keys, values = (x.transpose(0, 1)[None] for x in (queries, keys, values))
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
                parts.append(
                    F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)[
                        0
                    ].transpose(0, 1)
                )
    return torch.cat(parts)


def check(device, lengths, heads, key_heads, dim, dtype, scale=None):
    inputs = random_inputs(device, sum(lengths), heads, key_heads, dim)
    op = lambda q, k, v: flash_attention(q, k, v, bounds(lengths, device), max(lengths), scale)
    plain = lambda q, k, v: plain_attention(q, k, v, lengths, dim**-0.5 if scale is None else scale)
    assert_accurate_everywhere(op, plain, inputs, [torch.randn_like(inputs[0])], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths", [[0, 5, 0, 1, 127, 3, 0], [185], [7, 7, 14, 0, 14, 28, 9, 9], [3, 64, 32]], ids=str
)
def test_accuracy(lengths, dtype, device):
    check(device, lengths, 2, 1, 32, dtype)


@pytest.mark.parametrize("seed", range(3))
def test_random_documents(seed, device):
    rng = random.Random(seed)
    lengths = [
        rng.choice([0, 1, rng.randrange(20), rng.randrange(70)]) for _ in range(rng.randrange(1, 9))
    ] + [1]
    key_heads = rng.choice([1, 2])
    check(
        device,
        lengths,
        key_heads * rng.choice([1, 3]),
        key_heads,
        rng.choice([16, 32, 64]),
        torch.float32,
        rng.choice([None, 0.3, 2.0]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, key_heads, dim",
    [
        (2, 2, 16),
        (3, 1, 32),
        (4, 2, 64),
        (1, 1, 96),
        (2, 1, 128),
        (1, 1, 80),
        (1, 1, 112),
        (2, 1, 20),
        (1, 1, 256),
    ],
)
def test_heads(heads, key_heads, dim, dtype, device):
    check(device, [5, 37, 2], heads, key_heads, dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128])
def test_long_documents(dim, dtype, device):
    check(device, [507, 1, 1000, 129, 0, 1030, 255], 6, 2, dim, dtype)


@pytest.mark.gpu
def test_more_than_64k_tokens(device):
    inputs = random_inputs(device, 70_001, 2, 1, 64, torch.bfloat16)
    out = flash_attention(*inputs, bounds([1, 70_000], device), 70_000)[-64:]
    q, k, v = (x[1:].double() for x in inputs)
    scores = torch.einsum("qhd,kd->hqk", q[-64:], k[:, 0]) / 8
    scores = scores.masked_fill(
        torch.ones(64, 70_000, dtype=torch.bool, device=device).triu(70_000 - 63), -torch.inf
    )
    truth = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0])
    assert (out.double() - truth).norm() <= 1e-2 * truth.norm()


@pytest.mark.parametrize("lengths", [[1], [1, 0, 1, 1], [0, 0], [0]], ids=str)
def test_documents_of_at_most_one_token(lengths, device):
    """One token attends to itself: the output is its value, whatever the scores."""
    q, k, v = (x.requires_grad_() for x in random_inputs(device, sum(lengths), 4, 2, 16, torch.float32))
    out = flash_attention(q, k, v, bounds(lengths, device), 1)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(dv, grad.unflatten(1, (2, 2)).sum(2))
    torch.testing.assert_close((dq, dk), (torch.zeros_like(q), torch.zeros_like(k)))


@triton.jit
def _tiles(tiles_ptr, cu_seqlens_ptr, B, first, BLOCK: tl.constexpr):
    document, start, end, row = attention.find_tile(cu_seqlens_ptr, B, first + tl.program_id(0), BLOCK)
    tiles_ptr += 4 * tl.program_id(0)
    tl.store(tiles_ptr, document)
    tl.store(tiles_ptr + 1, start)
    tl.store(tiles_ptr + 2, end)
    tl.store(tiles_ptr + 3, row)


def find_tiles(cu_seqlens, first, count, block):
    tiles = torch.empty(count, 4, dtype=torch.int32, device=cu_seqlens.device)
    _tiles[(count,)](tiles, cu_seqlens, len(cu_seqlens) - 1, first, BLOCK=block)
    return tiles.tolist()


def test_every_tile_of_every_document_has_one_slot(device):
    rng = random.Random(0)
    for _ in range(20):
        lengths = [rng.choice([0, 0, 1, 15, 16, 17, rng.randrange(100)]) for _ in range(rng.randrange(1, 12))]
        cu_seqlens = bounds(lengths, device)
        found = find_tiles(cu_seqlens, 0, sum(lengths) // 16 + len(lengths), 16)
        assert all(row >= 0 for *_, row in found)
        starts = cu_seqlens.tolist()
        expected = [
            [i, starts[i], starts[i + 1], row]
            for i, length in enumerate(lengths)
            for row in range(0, length, 16)
        ]
        assert [tile for tile in found if tile[1] + tile[3] < tile[2]] == expected


def test_tiles_of_a_document_near_the_largest_number(device):
    cu_seqlens = torch.tensor([0, 5, 2**31 - 129], dtype=torch.int32, device=device)
    assert find_tiles(cu_seqlens, 2**24 - 1, 1, 128) == [[1, 5, 2**31 - 129, (2**24 - 2) * 128]]


def test_gradients_stay_in_the_past_of_the_document(device):
    """The gradient of output i for input j is exactly zero unless j is in i's document and not after i; then
    it is not zero."""
    lengths = [3, 34, 0, 1, 20]
    q, k, v = (x.requires_grad_() for x in random_inputs(device, 58, 2, 1, 16, torch.float32))
    out = flash_attention(q, k, v, bounds(lengths, device), 40)
    for token, start in ((2, 0), (3, 3), (4, 3), (36, 3), (37, 37), (50, 38)):
        dq, dk, dv = (
            x.flatten(1).any(1).cpu()
            for x in torch.autograd.grad(out[token].sum(), (q, k, v), retain_graph=True)
        )
        seen = torch.zeros(58, dtype=torch.bool)
        seen[start : token + 1] = True
        assert torch.equal(dv, seen)
        assert torch.equal(dk, seen) or token == start  # a single key: no choice, no gradient
        assert not dq[:token].any() and not dq[token + 1 :].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("heads_first", [False, True])
def test_a_broken_document_does_not_reach_the_others(heads_first, bad, device):
    lengths = [5, 20, 40]
    inputs = random_inputs(device, 65, 2, 1, 16, torch.float32)
    broken = [x.clone() for x in inputs]
    grad = torch.randn_like(inputs[0])
    broken_grad = grad.clone()
    for x in (*broken, broken_grad):
        x[5:25] = bad
    layout = (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)) if heads_first else (lambda x: x)
    op = lambda q, k, v: flash_attention(layout(q), layout(k), layout(v), bounds(lengths, device), 40)
    (expected,), gradients = run(op, inputs, [grad])
    (out,), broken_gradients = run(op, broken, [broken_grad])
    for one, two in zip((out, *broken_gradients), (expected, *gradients), strict=True):
        assert torch.equal(one[:5], two[:5]) and torch.equal(one[25:], two[25:])
    assert not out[5:25].isfinite().any()


def test_repeatable_and_max_seqlen_is_not_needed(device):
    lengths = [40, 0, 20]
    inputs = random_inputs(device, 60, 2, 1, 16, torch.float32)
    grad = torch.randn_like(inputs[0])
    op = lambda longest: lambda q, k, v: flash_attention(q, k, v, bounds(lengths, device), longest)
    results = [run(op(longest), inputs, [grad]) for longest in (40, None, 7)]
    for outputs, gradients in results[1:]:
        for one, two in zip((*outputs, *gradients), (*results[0][0], *results[0][1]), strict=True):
            assert torch.equal(one, two)


def test_strided(device):
    qkv = torch.randn(25, 8 * 16, device=device)  # a fused projection
    views = [part.view(25, -1, 16) for part in qkv.split([4 * 16, 2 * 16, 2 * 16], 1)]
    call = lambda q, k, v: flash_attention(q, k, v, bounds([5, 20], device), 20)
    grad = torch.randn(25, 4, 16, device=device)
    expected = run(call, [x.contiguous() for x in views], [grad])
    heads_first, every_other = (
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        (lambda x: torch.stack((x, x), 2).flatten(1, 2)[:, ::2]),
    )
    for change in (lambda x: x, strided, heads_first, every_other):
        for found, wanted in zip(
            run(call, [change(x) for x in views], [change(grad)]), expected, strict=True
        ):
            for one, two in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, two)
    one, two = (
        run(call, views, [x])[1]
        for x in (grad[:1, :1, :1].expand(25, 4, 16), grad[:1, :1, :1].expand(25, 4, 16).contiguous())
    )
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_views_of_one_tensor_are_read_where_they_lie(device):
    qkv = torch.randn(45, 8 * 16, device=device)
    views = [part.view(45, -1, 16) for part in qkv.split([4 * 16, 2 * 16, 2 * 16], 1)]
    where = attention.tuning.INTERPRETER
    assert attention.describable(where, *views) and all(attention.padded(x) is x for x in views)
    assert [attention.arguments(16, True, x)[0].base.data_ptr() for x in views] == [
        x.data_ptr() for x in views
    ]
    assert not attention.describable(where, views[0].transpose(0, 1).contiguous().transpose(0, 1))


@pytest.mark.parametrize("heads_first", [False, True])
def test_far_apart(heads_first, far_apart, device):
    """Rows, or heads, 2³⁰ elements apart: offsets beyond int32."""
    if heads_first:
        inputs = [far_apart(3, 4 * 16).view(3, 4, 16).transpose(0, 1) for _ in range(3)]
    else:
        inputs = [far_apart(3, 4 * 16).view(3, 4, 16)[:, ::2] for _ in range(3)]
    call = lambda q, k, v: flash_attention(q, k, v, bounds([1, len(q) - 1], device), None)
    grad = torch.randn_like(inputs[0].contiguous())
    for found, wanted in zip(
        run(call, inputs, [grad]), run(call, [x.contiguous() for x in inputs], [grad]), strict=True
    ):
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two)


@triton.jit
def _store(x_ptr, row, heads, D: tl.constexpr):
    attention.store_head(x_ptr, (tl.full((16, D), 1.0, tl.float32),), row, row + 3, heads - 1, heads, 16, D)


def test_results_beyond_int32(far_apart, device):
    """Rows 2¹⁷ on of [T, 2⁹, 32] lie beyond 2³¹ elements."""
    x = far_apart(3, 2**16).as_strided((2**17 + 4, 2**9, 32), (2**14, 32, 1))
    x[2**17 :] = 0
    _store[(1,)](x, 2**17, 2**9, D=32)
    written = x[2**17 :].float().cpu()
    assert (written[:3, -1] == 1).all() and not written[:3, :-1].any() and not written[3].any()


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1.0])
def test_scales(scale, device):
    inputs = random_inputs(device, 47, 2, 1, 16)
    grad = torch.randn_like(inputs[0])
    results = run(
        lambda q, k, v: flash_attention(q, k, v, bounds([40, 7], device), 40, scale),
        [x.float() for x in inputs],
        [grad],
    )
    truth = run(
        lambda q, k, v: plain_attention(q, k, v, [40, 7], scale),
        [x.float().double() for x in inputs],
        [grad.float()],
    )
    for found, expected in zip(results[0] + results[1], truth[0] + truth[1], strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_large_scores(device, monkeypatch):
    """Scores of ±1e4 neither overflow nor lose the softmax; the gradients are as good as the reference's,
    which keeps the log-sum-exp too."""
    q, k, v = random_inputs(device, 70, 2, 1, 16, torch.float32)
    inputs, grad = [50 * q, 50 * k, v], torch.randn_like(q)
    assert 1e4 < torch.einsum("qhd,kd->hqk", *inputs[:1], inputs[1][:, 0]).abs().max() < 1e5
    op = lambda q, k, v: flash_attention(q, k, v, bounds([70], device), 70, scale=1.0)
    (out,), gradients = run(op, inputs, [grad])
    exact = [x.double() for x in inputs]
    (truth,), exact_gradients = run(
        lambda q, k, v: plain_attention(q, k, v, [70], 1.0), exact, [grad.double()]
    )
    torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=1e-3)
    monkeypatch.setenv("MINIPLM_KERNELS", "reference")
    for one, two, three in zip(gradients, run(op, inputs, [grad])[1], exact_gradients, strict=True):
        assert (one - three).norm() <= 2 * (two - three).norm() + 1e-5 * three.norm()


def test_equal_scores(device):
    """Where all keys are alike, the output is the mean of the values so far."""
    q, k, v = random_inputs(device, 75, 2, 1, 16, torch.float32)
    out = flash_attention(q, k[:1].expand_as(k), v, bounds([35, 40], device), 40)
    mean = torch.cat(
        [x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None, None] for x in v.cpu().split([35, 40])]
    )  # on a GPU not deterministic
    torch.testing.assert_close(out.cpu(), mean.expand_as(out))


def test_log_sum_exp(device):
    q, k, v = random_inputs(device, 45, 2, 1, 16, torch.float32)
    arguments = q, k, v, bounds([5, 0, 40], device), 40, 0.5
    assert dispatch.implementation("flash_attention", None, q) is attention.flash_attention
    _, lse = torch.ops.miniplm.flash_attention(*arguments)
    expected = [
        (torch.einsum("qhd,kd->qhk", q[a:b], k[a:b, 0]) * 0.5)
        .masked_fill(torch.ones(b - a, b - a, dtype=torch.bool, device=device).triu(1)[:, None], -torch.inf)
        .logsumexp(-1)
        for a, b in ((0, 5), (5, 45))
    ]
    torch.testing.assert_close(lse, torch.cat(expected))


def test_opcheck(device):
    q, k, v = (x.requires_grad_() for x in random_inputs(device, 20, 2, 1, 16, torch.float32))
    cu_seqlens = bounds([8, 12], device)
    torch.library.opcheck(torch.ops.miniplm.flash_attention, (q, k, v, cu_seqlens, 12, 0.25))
    out, lse = torch.ops.miniplm.flash_attention(*(x.detach() for x in (q, k, v)), cu_seqlens, 12, 0.25)
    torch.library.opcheck(
        torch.ops.miniplm.flash_attention_backward,
        (torch.randn_like(q), q, k, v, out, lse, cu_seqlens, None, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )
