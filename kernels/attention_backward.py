"""flash_attention: the gradients.

With P = softmax(scale · q kᵀ) = exp(scale · q kᵀ − lse), computed anew, Δ = Σ_D grad · out and dS = P ∘ (grad
vᵀ − Δ):

    dq = scale · dS k        dk = scale · dSᵀ q        dv = Pᵀ grad

Names, tiles and the list of programs as in attention.py. Two kernels, each program the only writer of its
results, so no sum depends on the order in which programs run. One per tile of queries and query head walks
over the keys for dq, and leaves each row's lse (in base 2) and Δ for the other. That one, per tile of keys
and key head, walks over the queries of every head that reads it for dk and dv; its scores are transposed,
[BLOCK_N, BLOCK_M], because then Pᵀ and dSᵀ go from registers straight into the next product.

For batches of many short documents attention_backward_single.py does the same in one kernel.

FLOPs: D·Hq·Σ n² for each product (documents of n tokens), 3 of them for dq and 4 for dk and dv. Bytes moved:
q, k, v, grad, out and the gradients once, and what the loops read from the L2 cache: k and v per tile of
queries, q and grad per tile of keys.
"""

import torch
import triton
import triton.language as tl

from . import attention_backward_single, dispatch, tuning
from .attention import (
    add_product,
    arguments,
    describable,
    find_tile,
    inner_product,
    load_head,
    moved_back,
    padded,
    parts_of,
    scaled,
    store_head,
    visible,
    zeros,
)
from .attention import examples as forward_examples
from .tiles import BATCH_SIZES, LOG2_E, matrix


@triton.jit
def aligned(start, document):
    """Where a document begins in the rows of `values`: there each begins at a multiple of 16, as descriptors
    and wide loads ask."""
    return (start // 16 + document) * 16


@triton.jit
def load_values(values, row, column, stride, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """values[row, column : column + BLOCK]."""
    if DESCRIPTORS:
        tile = values.load([row, column]).reshape(BLOCK)
    else:
        tile = tl.load(values + row.to(tl.int64) * stride + column + tl.arange(0, BLOCK))
    return tile


@triton.jit(do_not_specialize=BATCH_SIZES)
def _query_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    v_rest,
    grad,
    grad_rest,
    out,
    dq_ptr,
    lse_ptr,
    values_ptr,
    cu_seqlens_ptr,
    B,
    Hq,
    scale,
    scale_log2,
    stride_values,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0) % Hq
    document, start, end, row = find_tile(
        cu_seqlens_ptr, B, (tl.num_programs(0) - 1 - tl.program_id(0)) // Hq, BLOCK_M
    )
    if start + row >= end:
        return
    queries = row + tl.arange(0, BLOCK_M)
    inside = queries < end - start
    # Through pointers, and first: a descriptor's load outside a loop is waited for before the next one
    # begins.
    lse = tl.load(lse_ptr + (start + queries).to(tl.int64) * Hq + head, mask=inside, other=0.0) * LOG2_E
    out_tile = load_head(
        (out, None), start + row, end, head, stride_ot, stride_oh, BLOCK_M, D, PARTS, False, False
    )
    q_tile = load_head(
        (q, q_rest), start + row, end, head, stride_qt, stride_qh, BLOCK_M, D, PARTS, DESCRIPTORS, False
    )  # [BLOCK_M, D]
    grad_tile = load_head(
        (grad, grad_rest), start + row, end, head, stride_gt, stride_gh, BLOCK_M, D, PARTS, DESCRIPTORS, False
    )
    delta = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(PARTS)):
        delta += tl.sum(grad_tile[i].to(tl.float32) * out_tile[i].to(tl.float32), 1)
    values_ptr += head.to(tl.int64) * stride_values + aligned(start, document) + queries
    tl.store(values_ptr, lse, mask=inside)
    tl.store(values_ptr + tl.cast(Hq, tl.int64) * stride_values, delta, mask=inside)
    dq = zeros(BLOCK_M, PARTS)
    tokens = end - start
    diagonal, last = row // BLOCK_N * BLOCK_N, tl.minimum(row + BLOCK_M, tokens)
    short = tokens < BLOCK_N
    # The tiles before the diagonal; those on it; the only one of a document shorter than a tile.
    for LOOP in tl.static_range(3 if DESCRIPTORS else 2):
        first = diagonal if LOOP else 0
        stop = last if LOOP else diagonal
        if LOOP and DESCRIPTORS:
            stop = tl.where(short == (LOOP == 2), stop, first)
        for key in tl.range(first, stop, BLOCK_N, num_stages=1 if LOOP == 2 else None):
            tile = moved_back(key, tokens, BLOCK_N, DESCRIPTORS) if LOOP else key
            k_tile = load_head(
                (k, k_rest),
                start + tile,
                end,
                head // GROUP,
                stride_kt,
                stride_kh,
                BLOCK_N,
                D,
                PARTS,
                DESCRIPTORS,
                LOOP == 2,
            )
            v_tile = load_head(
                (v, v_rest),
                start + tile,
                end,
                head // GROUP,
                stride_vt,
                stride_vh,
                BLOCK_N,
                D,
                PARTS,
                DESCRIPTORS,
                False,
            )
            weights = tl.exp2(inner_product(q_tile, k_tile) * scale_log2 - lse[:, None])  # [BLOCK_M, BLOCK_N]
            d_scores = weights * (inner_product(grad_tile, v_tile) - delta[:, None])
            if LOOP:
                d_scores = tl.where(visible(tile, key, queries, BLOCK_N, DESCRIPTORS), d_scores, 0.0)
            dq = add_product(dq, d_scores, k_tile)
    store_head(dq_ptr, scaled(dq, scale), start + row, end, head, Hq, BLOCK_M, D)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _key_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    v_rest,
    grad,
    grad_rest,
    values,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    B,
    Hq,
    scale,
    scale_log2,
    stride_values,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    Hk = Hq // GROUP
    key_head = tl.program_id(0) % Hk
    document, start, end, row = find_tile(cu_seqlens_ptr, B, tl.program_id(0) // Hk, BLOCK_N)
    if start + row >= end:
        return
    k_tile = load_head(
        (k, k_rest), start + row, end, key_head, stride_kt, stride_kh, BLOCK_N, D, PARTS, DESCRIPTORS, False
    )  # [BLOCK_N, D]
    v_tile = load_head(
        (v, v_rest), start + row, end, key_head, stride_vt, stride_vh, BLOCK_N, D, PARTS, DESCRIPTORS, False
    )
    dk, dv = zeros(BLOCK_N, PARTS), zeros(BLOCK_N, PARTS)
    # Tiles of queries: those before `full` lie on the diagonal, those from `cut` on (one or none) reach past
    # the document; both are masked.
    tiles = tl.cdiv(end - start, BLOCK_M)
    full = tl.minimum(tl.cdiv(row + BLOCK_N, BLOCK_M), tiles)
    cut = tl.maximum((end - start) // BLOCK_M, full)
    for MASKED in tl.static_range(2):
        first = row // BLOCK_M if MASKED else full
        last = tiles - (cut - full) if MASKED else cut
        # Heads and tiles in one loop: two would need more registers.
        for step in tl.range(first * GROUP, last * GROUP):
            head, tile = key_head * GROUP + step % GROUP, step // GROUP
            if MASKED:
                tile += tl.where(tile >= full, cut - full, 0)
            query = start + tile * BLOCK_M
            q_tile = load_head(
                (q, q_rest), query, end, head, stride_qt, stride_qh, BLOCK_M, D, PARTS, DESCRIPTORS, MASKED
            )  # [BLOCK_M, D]
            grad_tile = load_head(
                (grad, grad_rest),
                query,
                end,
                head,
                stride_gt,
                stride_gh,
                BLOCK_M,
                D,
                PARTS,
                DESCRIPTORS,
                MASKED,
            )
            column = tl.multiple_of(aligned(start, document) + tile * BLOCK_M, 16)
            lse = load_values(values, head, column, stride_values, BLOCK_M, DESCRIPTORS)  # [BLOCK_M]
            delta = load_values(values, Hq + head, column, stride_values, BLOCK_M, DESCRIPTORS)
            if MASKED:  # beyond the document the weights come out as 2^−∞
                inside = tl.arange(0, BLOCK_M) < end - query
                lse, delta = tl.where(inside, lse, float("inf")), tl.where(inside, delta, 0.0)
            weights = tl.exp2(inner_product(k_tile, q_tile) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
            if MASKED:
                key = tl.arange(0, BLOCK_N)[:, None] + (row - tile * BLOCK_M)
                visible = key <= tl.arange(0, BLOCK_M)[None, :]
                weights = tl.where(visible, weights, 0.0)
            dv = add_product(dv, weights, grad_tile)
            d_scores = weights * (inner_product(v_tile, grad_tile) - delta[None, :])
            dk = add_product(dk, d_scores, q_tile)
    store_head(dk_ptr, scaled(dk, scale), start + row, end, key_head, Hk, BLOCK_N, D)
    store_head(dv_ptr, dv, start + row, end, key_head, Hk, BLOCK_N, D)


def _examples(make):
    for q, *others in forward_examples(make):
        like_q = make(*q.shape, dtype=q.dtype)
        yield like_q, q, *others[:2], like_q, make(*q.shape[:2], dtype=torch.float32), *others[2:]


@dispatch.triton("flash_attention_backward", _examples)
def flash_attention_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale):
    """As reference.flash_attention_backward; by max_seqlen and the shapes one pass may do."""
    if q.numel() == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    backward = {1: attention_backward_single.one_pass, 2: two_passes}
    # Offline both are compiled, whatever the lengths.
    many = tuning.OFFLINE is not None or attention_backward_single.many_documents(
        tuning.target(q.device).processors, len(q), k.shape[1], len(cu_seqlens) - 1, max_seqlen
    )

    def run(config):
        return backward[config.blocks["PASSES"]](grad, q, k, v, out, lse, cu_seqlens, scale)

    bucket = {"dim": q.shape[2], "itemsize": q.itemsize, "many": many}
    return tuning.launch("attention_passes", run, q.device, **bucket)


def two_passes(grad, q, k, v, out, lse, cu_seqlens, scale):
    """dq, dk, dv as of reference.flash_attention_backward: dq in one pass over the keys, dk and dv in another
    over the queries."""
    (T, Hq, dim), Hk, B = q.shape, k.shape[1], len(cu_seqlens) - 1
    grad, q, k, v, out = (padded(x) for x in (grad, q, k, v, out))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse, cu_seqlens = lse.contiguous(), cu_seqlens.contiguous()
    descriptors = describable(tuning.target(q.device), grad, q, k, v)
    width = (T // 16 + B + 16) * 16  # every document from a multiple of 16 on, and a tile beyond the last
    values = lse.new_empty(2 * Hq, width)  # of each head lse in base 2, then of each head Δ
    bucket = {"dim": q.shape[2], "itemsize": q.itemsize, "descriptors": descriptors}

    def split(config, *tensors):
        """(the kernel's arguments for q, k, v and grad; its last ones, with the strides of all tensors)."""
        M, N = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        tiles = []
        for x, block in zip(tensors[:4], (M, N, N, M), strict=True):
            tiles += arguments(block, descriptors, x)
        strides = [stride for x in tensors for stride in x.stride()[:2]]
        return tiles, (
            cu_seqlens,
            B,
            Hq,
            scale,
            scale * LOG2_E.value,
            width,
            *strides,
            Hq // Hk,
            q.shape[2],
            parts_of(q.shape[2]),
            descriptors,
        )

    def query_pass(config):
        tiles, others = split(config, q, k, v, grad, out)
        _query_kernel[((T // config.blocks["BLOCK_M"] + B) * Hq,)](
            *tiles, out, dq, lse, values, *others, **config.options
        )

    def key_pass(config):
        tiles, others = split(config, q, k, v, grad)
        tiles.append(matrix(values, 1, config.blocks["BLOCK_M"], descriptors))
        _key_kernel[((T // config.blocks["BLOCK_N"] + B) * Hk,)](*tiles, dk, dv, *others, **config.options)

    tuning.launch("attention_dq", query_pass, q.device, **bucket)
    tuning.launch("attention_dkdv", key_pass, q.device, **bucket, grouped=Hq != Hk)
    return tuple(x[..., :dim].contiguous() for x in (dq, dk, dv))
