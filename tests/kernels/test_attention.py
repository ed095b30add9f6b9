"""flash_attention, on the reference and on Triton."""

import random as random_numbers

import pytest
import torch
from checks import assert_accurate_everywhere, assert_close_everywhere, assert_equal_everywhere, run, strided
from miniplm.kernels import flash_attention
from oracles import plain_attention
from random_inputs import bounds, heads_first, on, random_heads

pytestmark = pytest.mark.products
EVERY_WAY = pytest.mark.parametrize("implementation", ["reference", "triton", "one_pass"], indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Ragged, empty at both ends and within, one token; and runs of documents of one length, which the reference
# takes together.
LENGTHS = [
    [0, 5, 0, 1, 127, 3, 0],
    [185],
    [7, 7, 14, 0, 14, 28, 9, 9],
    [3, 64, 32],
    [1, 1, 1, 2],
    pytest.param([255], marks=pytest.mark.large),
    pytest.param([0, 507, 129], marks=pytest.mark.large),
]


def check(implementation, lengths, heads, key_heads, dim, dtype, scale=None):
    inputs = on(implementation.device, *random_heads(sum(lengths), heads, key_heads, dim))
    cu_seqlens = bounds(lengths, implementation.device)
    op = lambda q, k, v: flash_attention(q, k, v, cu_seqlens, max(lengths), scale)
    plain = lambda q, k, v: plain_attention(q, k, v, lengths, dim**-0.5 if scale is None else scale)
    assert_accurate_everywhere(op, plain, inputs, [torch.randn_like(inputs[0])], dtype)


@EVERY_WAY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_accuracy(lengths, dtype, implementation):
    heads, key_heads = (6, 2) if implementation.name == "reference" else (2, 1)  # the interpreter is slow
    check(implementation, lengths, heads, key_heads, 32, dtype)


@EVERY_WAY
@pytest.mark.parametrize("seed", range(3))
def test_random_documents(seed, implementation):
    rng = random_numbers.Random(seed)
    lengths = [rng.choice([0, 1, rng.randrange(20), rng.randrange(70)]) for _ in range(rng.randrange(1, 9))]
    key_heads = rng.choice([1, 2])
    heads, dim = key_heads * rng.choice([1, 3]), rng.choice([16, 32, 64])
    scale = rng.choice([None, 0.3, 2.0])
    check(implementation, [*lengths, 1], heads, key_heads, dim, torch.float32, scale)


@EVERY_WAY
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
        *(
            pytest.param(*shape, marks=pytest.mark.large)
            for shape in ((4, 4, 16), (9, 3, 64), (2, 2, 96), (4, 2, 128))
        ),
    ],
)
def test_heads(heads, key_heads, dim, dtype, implementation):
    check(implementation, [5, 37, 2], heads, key_heads, dim, dtype)
    if implementation.name == "reference":  # twice would take long in the interpreter
        check(implementation, [5, 37, 2], heads, key_heads, dim, dtype, scale=0.3)


@EVERY_WAY
@pytest.mark.parametrize("lengths", [[1], [1, 0, 1, 1], [0, 0], [0]], ids=str)
def test_documents_of_at_most_one_token(lengths, implementation):
    """One token attends to itself: the output is its value, whatever the scores."""
    inputs = on(implementation.device, *random_heads(sum(lengths), 4, 2, 16), dtype=torch.float32)
    q, k, v = (x.requires_grad_() for x in inputs)
    out = flash_attention(q, k, v, bounds(lengths, implementation.device), 1)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(dv, grad.unflatten(1, (2, 2)).sum(2))
    torch.testing.assert_close((dq, dk), (torch.zeros_like(q), torch.zeros_like(k)))


def test_gradcheck():
    inputs = [x.requires_grad_() for x in random_heads(7, 4, 2, 3)]
    assert torch.autograd.gradcheck(lambda q, k, v: flash_attention(q, k, v, bounds([2, 0, 1, 4]), 4), inputs)


# --- who sees whom ---


def test_no_token_sees_another_document_or_the_future(implementation):
    lengths = [3, 40, 40, 0, 1, 44]
    inputs = on(implementation.device, *random_heads(128, 4, 2, 16), dtype=torch.float32)
    cu_seqlens = bounds(lengths, implementation.device)
    before = flash_attention(*inputs, cu_seqlens, 44)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[20:83] = 1e3 * torch.randn_like(x[20:83])  # from within document 1 to the end of document 2
    after = flash_attention(*changed, cu_seqlens, 44)
    assert torch.equal(before[:20], after[:20])  # document 0, and the past in document 1
    assert torch.equal(before[83:], after[83:])  # the documents after
    assert not torch.isclose(before[20:83], after[20:83]).all(-1).any()


@EVERY_WAY
def test_gradients_stay_in_the_past_of_the_document(implementation):
    """The gradient of output i for input j is exactly zero unless j is in i's document and not after i; then
    it is not zero."""
    lengths = [3, 34, 0, 1, 20]
    inputs = on(implementation.device, *random_heads(58, 2, 1, 16), dtype=torch.float32)
    q, k, v = (x.requires_grad_() for x in inputs)
    out = flash_attention(q, k, v, bounds(lengths, implementation.device), 40)
    for token, start in ((2, 0), (3, 3), (4, 3), (36, 3), (37, 37), (50, 38)):
        gradients = torch.autograd.grad(out[token].sum(), (q, k, v), retain_graph=True)
        dq, dk, dv = (gradient.flatten(1).any(1).cpu() for gradient in gradients)
        seen = torch.zeros(58, dtype=torch.bool)
        seen[start : token + 1] = True
        assert torch.equal(dv, seen)
        assert torch.equal(dk, seen) or token == start  # a single key: no choice, no gradient
        assert not dq[:token].any() and not dq[token + 1 :].any()


@EVERY_WAY
@pytest.mark.parametrize("before", [5, 37])  # shorter than a tile, and with a last tile that is not whole
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", [lambda x: x, heads_first], ids=["packed", "heads_first"])
def test_a_broken_document_does_not_reach_the_others(before, layout, bad, implementation):
    inputs = on(implementation.device, *random_heads(before + 60, 2, 1, 16), dtype=torch.float32)
    cu_seqlens = bounds([before, 20, 40], implementation.device)
    grad = torch.randn_like(inputs[0])
    broken, broken_grad = [x.clone() for x in inputs], grad.clone()
    for x in (*broken, broken_grad):
        x[before : before + 20] = bad
    op = lambda q, k, v: flash_attention(layout(q), layout(k), layout(v), cu_seqlens, 40)
    (expected,), gradients = run(op, inputs, [grad])
    (out,), broken_gradients = run(op, broken, [broken_grad])
    for one, two in zip((out, *broken_gradients), (expected, *gradients), strict=True):
        assert torch.equal(one[:before], two[:before]) and torch.equal(one[before + 20 :], two[before + 20 :])
    assert not out[before : before + 20].isfinite().any()


# --- values and layouts ---


@EVERY_WAY
def test_strided(implementation):
    device = implementation.device
    qkv = torch.randn(25, 8 * 16, device=device)  # a fused projection
    views = [part.view(25, -1, 16) for part in qkv.split([4 * 16, 2 * 16, 2 * 16], 1)]
    cu_seqlens, grad = bounds([10, 15], device), torch.randn(25, 4, 16, device=device)
    call = lambda q, k, v: flash_attention(q, k, v, cu_seqlens, 20)
    expected = run(call, [x.contiguous() for x in views], [grad])
    every_other = lambda x: torch.stack((x, x), 2).flatten(1, 2)[:, ::2]
    for change in (lambda x: x, strided, heads_first, every_other):
        assert_close_everywhere(run(call, [change(x) for x in views], [change(grad)]), expected)
    expanded = grad[:1, :1, :1].expand(25, 4, 16)
    assert_equal_everywhere(run(call, views, [expanded]), run(call, views, [expanded.contiguous()]))


@EVERY_WAY
@pytest.mark.parametrize("scale", [-0.4, 0.0, 0.3, 1.0])
def test_scales(scale, implementation):
    dtype = implementation.finest
    inputs = on(implementation.device, *random_heads(47, 2, 1, 16), dtype=dtype)
    cu_seqlens, grad = bounds([40, 7], implementation.device), torch.randn_like(inputs[0])
    found = run(lambda q, k, v: flash_attention(q, k, v, cu_seqlens, 40, scale), inputs, [grad])
    exact = [x.double() for x in inputs]
    truth = run(lambda q, k, v: plain_attention(q, k, v, [40, 7], scale), exact, [grad])
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    for one, two in zip((*found[0], *found[1]), (*truth[0], *truth[1]), strict=True):
        torch.testing.assert_close(one, two.to(dtype), rtol=tolerance, atol=tolerance)


@EVERY_WAY
def test_large_scores(implementation, monkeypatch):
    """Scores of ±1e4 neither overflow nor lose the softmax; the gradients on Triton are as good as the
    reference's, which keeps the log-sum-exp too."""
    q, k, v = on(implementation.device, *random_heads(70, 2, 1, 16), dtype=torch.float32)
    # Whole numbers: products are exact in float32, in whichever order a machine adds them.
    inputs, grad = [(50 * q).round(), (50 * k).round(), v], torch.randn_like(q)
    assert 1e4 < torch.einsum("qhd,kd->hqk", *inputs[:1], inputs[1][:, 0]).abs().max() < 1e5
    cu_seqlens = bounds([70], implementation.device)
    op = lambda q, k, v: flash_attention(q, k, v, cu_seqlens, 70, scale=1.0)
    (out,), gradients = run(op, inputs, [grad])
    exact = [x.double() for x in inputs]
    plain = lambda q, k, v: plain_attention(q, k, v, [70], 1.0)
    (truth,), exact_gradients = run(plain, exact, [grad.double()])
    torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if implementation.name == "triton":
        monkeypatch.setenv("MINIPLM_KERNELS", "reference")
        _, reference = run(op, inputs, [grad])
        for one, two, three in zip(gradients, reference, exact_gradients, strict=True):
            assert (one - three).norm() <= 2 * (two - three).norm() + 1e-5 * three.norm()


def test_equal_scores(implementation):
    """Where all keys are alike, the output is the mean of the values so far."""
    q, k, v = on(implementation.device, *random_heads(75, 2, 1, 16), dtype=torch.float32)
    out = flash_attention(q, k[:1].expand_as(k), v, bounds([35, 40], implementation.device), 40)
    means = [
        # On the CPU: cumsum is not deterministic on a GPU.
        part.cumsum(0) / torch.arange(1, len(part) + 1)[:, None, None]
        for part in v.cpu().split([35, 40])
    ]
    torch.testing.assert_close(out.cpu(), torch.cat(means).expand_as(out))


def test_log_sum_exp(implementation):
    q, k, v = on(implementation.device, *random_heads(45, 2, 1, 16), dtype=torch.float32)
    cu_seqlens = bounds([5, 0, 40], implementation.device)
    _, lse = torch.ops.miniplm.flash_attention(q, k, v, cu_seqlens, 40, 0.5)
    expected = []
    for start, end in ((0, 5), (5, 45)):
        scores = torch.einsum("qhd,kd->qhk", q[start:end], k[start:end, 0]) * 0.5
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        expected.append(scores.masked_fill(future[:, None], -torch.inf).logsumexp(-1))
    torch.testing.assert_close(lse, torch.cat(expected))


@pytest.mark.slow
def test_opcheck(implementation):
    inputs = on(implementation.device, *random_heads(20, 2, 1, 16), dtype=torch.float32)
    q, k, v = (x.requires_grad_() for x in inputs)
    cu_seqlens = bounds([8, 12], implementation.device)
    torch.library.opcheck(torch.ops.miniplm.flash_attention, (q, k, v, cu_seqlens, 12, 0.25))
    out, lse = torch.ops.miniplm.flash_attention(*(x.detach() for x in (q, k, v)), cu_seqlens, 12, 0.25)
    torch.library.opcheck(
        torch.ops.miniplm.flash_attention_backward,
        (torch.randn_like(q), q, k, v, out, lse, cu_seqlens, None, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )


# --- refusals ---


@pytest.mark.parametrize(
    "argument, change",
    [
        ("q", {"q": torch.randn(3, 16)}),
        ("k", {"k": torch.randn(3, 2, 8)}),
        ("k", {"k": torch.randn(4, 2, 16)}),
        ("k", {"k": torch.randn(3, 2, 16).half()}),
        ("k", {"k": torch.randn(3, 3, 16), "v": torch.randn(3, 3, 16)}),
        ("k", {"k": torch.randn(3, 0, 16), "v": torch.randn(3, 0, 16)}),
        ("v", {"v": torch.randn(3, 1, 16)}),
        ("v", {"v": torch.randn(3, 2, 16, device="meta")}),
        ("cu_seqlens", {"cu_seqlens": bounds([3]).long()}),
        ("cu_seqlens", {"cu_seqlens": bounds([3])[None]}),
        ("cu_seqlens", {"cu_seqlens": bounds([2])}),
        ("cu_seqlens", {"cu_seqlens": bounds([4])}),
        ("cu_seqlens", {"cu_seqlens": bounds([4, -1])}),
        ("cu_seqlens", {"cu_seqlens": bounds([3])[1:]}),
        ("cu_seqlens", {"cu_seqlens": bounds([])[1:]}),
        ("max_seqlen", {"max_seqlen": 2}),
    ],
)
def test_wrong_arguments(argument, change):
    right = {
        "q": torch.randn(3, 4, 16),
        "k": torch.randn(3, 2, 16),
        "v": torch.randn(3, 2, 16),
        "cu_seqlens": bounds([3]),
        "max_seqlen": 3,
    }
    flash_attention(**right)
    with pytest.raises(ValueError, match=f"^{argument} (has|is|must)"):
        flash_attention(**{**right, **change})
