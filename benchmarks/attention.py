"""flash_attention on packed documents, forward and backward alone (on a graph that is kept), with the heads
of the published models.

    document=n         T / n documents of n tokens
    lengths=mixed      lengths from a log-normal distribution, median 500 tokens, σ = 1.3 (mean 1,164): a long
                       tail as in web text and papers. The distribution is assumed, not measured on a corpus

    sdpa-cudnn, sdpa-flash    PyTorch's scaled_dot_product_attention, each document a padded row of a batch
                          (at the end, where a causal mask hides it)
    flex                      FlexAttention, compiled, with a causal document mask over the packed tokens
    flash-attn-2, -3          flash_attn_varlen_func of flash-attn 2 and of Hopper's flash_attn_interface
    one-pass, two-passes      ours, backward, in one kernel over the keys and in two (miniplm takes the first
                          of tuning.py's "attention_passes")

What comes before the call is not timed: padding, FlexAttention's block mask, compilation. FLOPs are those of
the visible pairs alone, as is usual: 2 products forward and 5 backward (with the scores once more): 4·D·Hq·Σ
n (n + 1) / 2 for documents of n tokens, and 2.5 times that. Results and gradients are compared over the whole
shape with float64.
"""

import random
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from harness import Case, Skip, relative_error, run
from miniplm.kernels import flash_attention

HEADS = {16: 2, 64: 12, 96: 16, 128: 16}  # D → heads: 200M, 1.2B, the 1.8B teacher; 16 is the toy


def document_lengths(shape) -> list[int]:
    """The lengths of the shape's documents, T in sum."""
    T = shape["T"]
    if "document" in shape:
        return [shape["document"]] * (T // shape["document"])
    rng, lengths = random.Random(0), []
    while sum(lengths) < T:
        lengths.append(min(max(1, round(rng.lognormvariate(6.2146, 1.3))), T - sum(lengths)))
    return lengths


def exact(q, k, v, grad, lengths):
    """(out, dq, dk, dv) in float64, by the formula, some heads of a document at a time."""
    tensors = [
        x.double()
        for x in (
            q,
            k.repeat_interleave(q.shape[1] // k.shape[1], 1),
            v.repeat_interleave(q.shape[1] // k.shape[1], 1),
            grad,
        )
    ]
    results, scale = [torch.empty_like(tensors[0]) for _ in range(4)], q.shape[2] ** -0.5
    for start, end in pairwise(accumulate(lengths, initial=0)):
        step = max(1, (1 << 28) // (end - start) ** 2)
        for head in range(0, q.shape[1], step):
            part = slice(start, end), slice(head, head + step)
            queries, keys, values, upstream = (x[part].transpose(0, 1) for x in tensors)
            p = (queries @ keys.mT * scale).masked_fill_(
                torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1), -torch.inf
            )
            p = p.softmax(-1)
            out, dv = p @ values, p.mT @ upstream
            p.mul_((upstream @ values.mT).sub_((upstream * out).sum(-1, keepdim=True))).mul_(scale)
            for result, value in zip(results, (out, p @ keys, p.mT @ queries, dv), strict=True):
                result[part] = value.transpose(0, 1)
    return [
        x if x.shape[1] == like.shape[1] else x.unflatten(1, (like.shape[1], -1)).sum(2)
        for x, like in zip(results, (q, q, k, v), strict=True)
    ]


def padded(x, lengths):
    """x [T, H, D] as [B, H, longest, D]."""
    return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()


def packed(x, lengths):
    """The opposite; [1, H, T, D], too, becomes [T, H, D]."""
    if x.ndim == 3:
        return x
    return torch.cat(
        [
            row[:, :n].transpose(0, 1)
            for row, n in zip(x, lengths if len(x) == len(lengths) else [x.shape[2]], strict=True)
        ]
    )


def sdpa(backend, lengths, cu_seqlens, inputs):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )

    return attend, [padded(x, lengths) for x in inputs]


def flex(lengths, cu_seqlens, inputs):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, T = inputs[0].device, len(inputs[0])
    if device.type != "cuda":
        raise Skip("FlexAttention has no backward pass on the CPU")
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), cu_seqlens.diff())
    mask = create_block_mask(
        lambda b, h, i, j: (document[i] == document[j]) & (j <= i), None, None, T, T, device=device
    )
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward pass runs many times on one graph
    attend = torch.compile(flex_attention, dynamic=False)
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=grouped), [
        x.transpose(0, 1)[None].contiguous() for x in inputs
    ]


def flash_attn(module, lengths, cu_seqlens, inputs):
    from importlib import import_module

    function, longest = import_module(module).flash_attn_varlen_func, max(lengths)

    def attend(q, k, v):
        out = function(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
        return out[0] if isinstance(out, tuple) else out

    return attend, inputs


def ours(lengths, cu_seqlens, inputs):
    return lambda q, k, v: flash_attention(q, k, v, cu_seqlens, max(lengths)), inputs


def backward_pass(module, name, q, k, v, grad, cu_seqlens):
    """One of our two ways, at sizes that it is made for."""
    from importlib import import_module

    if not q.is_cuda:
        raise Skip("needs a GPU: launched without the op around it")
    if name == "one_pass" and q.shape[2] > 64:
        raise Skip("one pass spills registers above D = 64, and is never taken there")
    function, scale = getattr(import_module(f"miniplm.kernels.{module}"), name), q.shape[2] ** -0.5
    out, lse = torch.ops.miniplm.flash_attention(q, k, v, cu_seqlens, None, scale)
    return lambda: function(grad, q, k, v, out, lse, cu_seqlens, scale)


def passes(*inputs):
    """The contenders that are ways of ours."""
    return {
        "one-pass": partial(backward_pass, "attention_backward_single", "one_pass", *inputs),
        "two-passes": partial(backward_pass, "attention_backward", "two_passes", *inputs),
    }


CONTENDERS = {
    "miniplm": ours,
    "sdpa-cudnn": partial(sdpa, "CUDNN_ATTENTION"),
    "sdpa-flash": partial(sdpa, "FLASH_ATTENTION"),
    "flex": flex,
    "flash-attn-2": partial(flash_attn, "flash_attn"),
    "flash-attn-3": partial(flash_attn, "flash_attn_interface"),
}


def cases(shape, device, dtype):
    lengths, heads = document_lengths(shape), HEADS[shape["D"]]
    q, k, v, grad = (
        torch.randn(shape["T"], h, shape["D"], device=device, dtype=dtype)
        for h in (heads, *[shape.get("key_heads", heads)] * 2, heads)
    )
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    out, *gradients = exact(q, k, v, grad, lengths)

    def forward(prepare):
        attend, inputs = prepare(lengths, cu_seqlens, [q, k, v])

        def call():
            with torch.no_grad():
                return attend(*inputs)

        return call

    def backward(prepare):
        attend, inputs = prepare(lengths, cu_seqlens, [q, k, v])
        inputs = [x.detach().requires_grad_() for x in inputs]
        result = attend(*inputs)
        upstream = (
            grad
            if result.ndim == 3
            else padded(grad, lengths)
            if len(result) == len(lengths)
            else grad.transpose(0, 1)[None]
        )
        return lambda: torch.autograd.grad(result, inputs, upstream, retain_graph=True)

    flops = 4 * shape["D"] * heads * sum(n * (n + 1) // 2 for n in lengths)
    contenders = lambda measured: {name: partial(measured, prepare) for name, prepare in CONTENDERS.items()}
    yield Case(
        "forward",
        contenders(forward),
        flops=flops,
        errors=lambda found: {"out": relative_error(packed(found, lengths), out)},
    )
    yield Case(
        "backward",
        contenders(backward) | passes(q, k, v, grad, cu_seqlens),
        flops=2.5 * flops,
        errors=lambda found: {
            name: relative_error(packed(x, lengths), truth)
            for name, x, truth in zip(("dq", "dk", "dv"), found, gradients, strict=True)
        },
    )


if __name__ == "__main__":
    T = 32_768
    DOCUMENTS = [*({"document": n} for n in (128, 1024, 4096, 16_384)), {"lengths": "mixed"}]
    SHAPES = [{"T": T, "D": D, **documents} for D in (64, 96, 128) for documents in DOCUMENTS]
    SHAPES += [{"T": 65_536, "D": 64, "document": 1024}]
    SHAPES += [{"T": T, "D": 128, "key_heads": 4, **documents} for documents in (DOCUMENTS[1], DOCUMENTS[3])]
    TOY = [
        {"T": 96, "D": 16, "document": 48},
        {"T": 96, "D": 16, "document": 32},
        {"T": 1200, "D": 16, "key_heads": 1, "lengths": "mixed"},
    ]
    run(
        "attention",
        __doc__,
        cases,
        SHAPES,
        quick=[shape for shape in SHAPES if shape.get("document") == 1024],
        toy=TOY,
        baseline="sdpa-flash",
        by="document",
    )
