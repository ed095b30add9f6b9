import pytest
import torch
import torch.nn.functional as F
from checks import assert_accurate_everywhere, run, strided
from miniplm.kernels import flash_attention, reference

# Ragged, empty at both ends and within, one token; and runs of documents of one length, which the CPU path
# takes together.
LENGTHS = [[0, 5, 0, 1, 127, 3, 0], [255], [7, 7, 14, 0, 14, 28, 9, 9], [1, 1, 1, 2], [0, 507, 129]]


def bounds(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def random_inputs(tokens, heads, key_heads, dim, dtype=torch.float64):
    return [torch.randn(tokens, h, dim, dtype=dtype) for h in (heads, key_heads, key_heads)]


def plain_attention(q, k, v, lengths, scale):
    """One document at a time: in float64 by the formula, with the whole matrix of scores; else PyTorch's own
    attention."""
    parts = []
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for queries, keys, values in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        if q.dtype == torch.float64:
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        else:
            queries, keys, values = (x.transpose(0, 1)[None] for x in (queries, keys, values))
            parts.append(
                F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)[
                    0
                ].transpose(0, 1)
            )
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_accuracy(lengths, dtype):
    inputs = random_inputs(sum(lengths), 6, 2, 32)
    op = lambda q, k, v: flash_attention(q, k, v, bounds(lengths), max(lengths))
    plain = lambda q, k, v: plain_attention(q, k, v, lengths, 32**-0.5)
    assert_accurate_everywhere(op, plain, inputs, [torch.randn_like(inputs[0])], dtype)


@pytest.mark.parametrize(
    "heads, key_heads, dim", [(4, 4, 16), (3, 1, 32), (9, 3, 64), (2, 2, 96), (4, 2, 128)]
)
def test_heads(heads, key_heads, dim):
    lengths = [5, 33, 2]
    inputs = random_inputs(40, heads, key_heads, dim)
    op = lambda q, k, v: flash_attention(q, k, v, bounds(lengths), None)
    plain = lambda q, k, v: plain_attention(q, k, v, lengths, dim**-0.5)
    assert_accurate_everywhere(op, plain, inputs, [torch.randn_like(inputs[0])], torch.float32)
    out = flash_attention(*inputs, bounds(lengths), None, scale=0.3)
    torch.testing.assert_close(out, plain_attention(*inputs, lengths, 0.3))


@pytest.mark.parametrize("lengths", [[1], [1, 0, 1, 1], [0, 0], [0]], ids=str)
def test_documents_of_at_most_one_token(lengths):
    """One token attends to itself: the output is its value, whatever the scores."""
    q, k, v = (x.requires_grad_() for x in random_inputs(sum(lengths), 4, 2, 16, torch.float32))
    out = flash_attention(q, k, v, bounds(lengths), 1)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(dv, grad.unflatten(1, (2, 2)).sum(2))
    torch.testing.assert_close((dq, dk), (torch.zeros_like(q), torch.zeros_like(k)))


@pytest.mark.parametrize("lengths", [*LENGTHS, [1], [0]], ids=str)
def test_the_formula_for_other_devices(lengths, monkeypatch):
    """The path that other devices take, run on the CPU, gives what the CPU path gives, log-sum-exp
    included."""
    q, k, v = random_inputs(sum(lengths), 4, 2, 16)
    grad = torch.randn_like(q)

    def both():
        out, lse = reference.flash_attention(q, k, v, bounds(lengths), None, 0.2)
        return (
            out,
            lse,
            *reference.flash_attention_backward(grad, q, k, v, out, lse, bounds(lengths), None, 0.2),
        )

    expected = both()
    monkeypatch.setattr(reference, "_attend_cpu", reference._attend)
    monkeypatch.setattr(reference, "_attend_backward_cpu", reference._attend_backward)
    for found, wanted in zip(both(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in random_inputs(7, 4, 2, 3)]
    assert torch.autograd.gradcheck(lambda q, k, v: flash_attention(q, k, v, bounds([2, 0, 1, 4]), 4), inputs)


def test_no_token_sees_another_document_or_the_future():
    lengths = [3, 40, 40, 0, 1, 44]
    inputs = random_inputs(128, 4, 2, 16, torch.float32)
    before = flash_attention(*inputs, bounds(lengths), 44)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[20:83] = 1e3 * torch.randn_like(x[20:83])  # from within document 1 to the end of document 2
    after = flash_attention(*changed, bounds(lengths), 44)
    assert torch.equal(before[:20], after[:20])  # document 0, and the past in document 1
    assert torch.equal(before[83:], after[83:])  # the documents after
    assert not torch.isclose(before[20:83], after[20:83]).all(-1).any()


def test_gradients_stay_in_the_past_of_the_document():
    q, k, v = (x.requires_grad_() for x in random_inputs(128, 4, 2, 16, torch.float32))
    out = flash_attention(q, k, v, bounds([3, 40, 40, 45]), 45)
    for gradient in torch.autograd.grad(
        out[20].sum(), (q, k, v)
    ):  # a token of document 1, which is the tokens 3:43
        touched = gradient.flatten(1).any(1)
        assert not touched[:3].any() and not touched[21:].any()
    assert touched[3:21].all()  # v


def test_strided():
    qkv = torch.randn(20, 8 * 16)  # a fused projection
    inputs = [part.view(20, -1, 16) for part in qkv.split([4 * 16, 2 * 16, 2 * 16], 1)]
    call = lambda q, k, v: flash_attention(q, k, v, bounds([10, 10]), 10)
    grad = torch.randn(20, 4, 16)
    expected = run(call, [x.contiguous() for x in inputs], [grad])
    for change in (lambda x: x, strided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        for found, wanted in zip(
            run(call, [change(x) for x in inputs], [change(grad)]), expected, strict=True
        ):
            for one, two in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, two)


def test_large_scores():
    """Scores of ±1e4 neither overflow nor lose the softmax."""
    q, k, v = (x.requires_grad_() for x in random_inputs(50, 2, 2, 16, torch.float32))
    out = flash_attention(100 * q, 100 * k, v, bounds([50]), 50, scale=1.0)
    assert out.isfinite().all() and all(
        gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v))
    )


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


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(scale):
    inputs = [torch.randn(47, 2, 16, dtype=torch.float64) for _ in range(3)]
    grads = [torch.randn(47, 2, 16, dtype=torch.float64)]
    found, expected = (
        run(op, inputs, grads)
        for op in (
            lambda q, k, v: flash_attention(q, k, v, bounds([40, 7]), 40, scale),
            lambda q, k, v: plain_attention(q, k, v, [40, 7], scale),
        )
    )
    torch.testing.assert_close(found, expected)
