"""flash_attention on Triton: tiles, layouts and offsets that the reference knows nothing of."""

import random as random_numbers

import pytest
import torch
import triton
import triton.language as tl
from checks import (
    assert_accurate_everywhere,
    assert_close_everywhere,
    assert_equal_everywhere,
    remember_calls,
    run,
)
from miniplm.kernels import (
    attention,
    attention_backward,
    attention_backward_single,
    dispatch,
    flash_attention,
    tuning,
)
from oracles import plain_attention
from random_inputs import bounds, heads_first, on, random_heads

pytestmark = pytest.mark.usefixtures("triton_ops")


def test_this_is_triton(device):
    q = torch.empty(1, 1, 16, device=device)
    assert dispatch.implementation("flash_attention", None, q) is attention.flash_attention


# --- long documents ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128])
def test_long_documents(dim, dtype, device):
    lengths = [507, 1, 1000, 129, 0, 1030, 255]
    inputs, cu_seqlens = on(device, *random_heads(sum(lengths), 6, 2, dim)), bounds(lengths, device)
    op = lambda q, k, v: flash_attention(q, k, v, cu_seqlens, 1030)
    plain = lambda q, k, v: plain_attention(q, k, v, lengths, dim**-0.5)
    assert_accurate_everywhere(op, plain, inputs, [torch.randn_like(inputs[0])], dtype)


@pytest.mark.gpu
def test_more_than_64k_tokens(device):
    inputs = on(device, *random_heads(70_001, 2, 1, 64), dtype=torch.bfloat16)
    out = flash_attention(*inputs, bounds([1, 70_000], device), 70_000)[-64:]
    q, k, v = (x[1:].double() for x in inputs)
    scores = torch.einsum("qhd,kd->hqk", q[-64:], k[:, 0]) / 8
    future = torch.ones(64, 70_000, dtype=torch.bool, device=device).triu(70_000 - 63)
    scores = scores.masked_fill(future, -torch.inf)
    truth = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0])
    assert (out.double() - truth).norm() <= 1e-2 * truth.norm()


# --- the list of tiles ---


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
    rng = random_numbers.Random(0)
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


# --- how it is read and written ---


def test_repeatable_and_max_seqlen_is_not_needed(device):
    inputs = on(device, *random_heads(60, 2, 1, 16), dtype=torch.float32)
    cu_seqlens, grad = bounds([40, 0, 20], device), torch.randn_like(inputs[0])
    op = lambda longest: lambda q, k, v: flash_attention(q, k, v, cu_seqlens, longest)
    first, *others = [run(op(longest), inputs, [grad]) for longest in (40, None, 7)]
    for other in others:
        assert_equal_everywhere(other, first)


def test_views_of_one_tensor_are_read_where_they_lie(device):
    qkv = torch.randn(45, 8 * 16, device=device)
    views = [part.view(45, -1, 16) for part in qkv.split([4 * 16, 2 * 16, 2 * 16], 1)]
    where = attention.tuning.INTERPRETER
    assert attention.describable(where, *views) and all(attention.padded(x) is x for x in views)
    bases = [attention.arguments(16, True, x)[0].base for x in views]
    assert [base.data_ptr() for base in bases] == [x.data_ptr() for x in views]
    assert not attention.describable(where, heads_first(views[0]))


@pytest.mark.parametrize("heads_far_apart", [False, True])
def test_far_apart(heads_far_apart, far_apart, device):
    """Rows, or heads, 2³⁰ elements apart: offsets beyond int32."""
    if heads_far_apart:
        inputs = [far_apart(3, 4 * 16).view(3, 4, 16).transpose(0, 1) for _ in range(3)]
    else:
        inputs = [far_apart(3, 4 * 16).view(3, 4, 16)[:, ::2] for _ in range(3)]
    cu_seqlens = bounds([1, len(inputs[0]) - 1], device)
    call = lambda q, k, v: flash_attention(q, k, v, cu_seqlens, None)
    grad = torch.randn_like(inputs[0].contiguous())
    found = run(call, inputs, [grad])
    assert_close_everywhere(found, run(call, [x.contiguous() for x in inputs], [grad]))


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


# --- the backward pass in one pass ---


def test_many_documents():
    """One pass is considered where no document is long and no program keeps the others waiting for long."""
    many = lambda tokens, documents, longest, heads=12: attention_backward_single.many_documents(
        132, tokens, heads, documents, longest
    )
    assert many(32_768, 32, 1024) and many(65_536, 64, 1024) and many(131_072, 64, 2048)
    assert not many(16_384, 16, 1024)  # 192 programs: the second of two waves is half empty
    assert not many(65_536, 64, None) and not many(65_536, 64, 0)
    assert not many(65_536, 64, 2048) and many(65_536, 64, 1300)  # an average of 1,024 may hide a long one
    assert not many(2**20, 256, 4096)
    assert many(65_536, 65_536, 1) and not many(0, 0, 16)


@pytest.mark.parametrize(
    "longest, documents, taken", [(20, 12, "one_pass"), (None, 12, "two_passes"), (20, 3, "two_passes")]
)
def test_one_pass_is_a_candidate_for_many_documents(longest, documents, taken, device, monkeypatch):
    if device == "cuda":
        pytest.skip("of the interpreter's number of processors")
    candidates = tuning.CANDIDATES["attention_passes"]
    monkeypatch.setitem(tuning.CANDIDATES, "attention_passes", lambda *a, **b: candidates(*a, **b)[::-1])
    once = remember_calls(monkeypatch, attention_backward_single, "one_pass")
    twice = remember_calls(monkeypatch, attention_backward, "two_passes")
    inputs = [x.float().requires_grad_() for x in random_heads(documents * 20, 1, 1, 16)]
    flash_attention(*inputs, bounds([20] * documents), longest).sum().backward()
    assert [*once, *twice] == [taken]
