"""flash_attention: the gradients in one pass, for batches of many documents that are not long.

The formulas and names are those of attention_backward.py. One program per document and key head takes the
document's tiles of keys one after the other, and with each walks over the queries from the diagonal on, of
every head that reads it. dk and dv of a tile add up in registers. dq adds up in float32 in a buffer,
[BLOCK_M, D] for each head and tile of queries: first written at the first tile of keys, and written out, in
q's dtype, at the last one, which is that of the diagonal.

A program owns its part of the buffer, so nothing is atomic, nothing waits for another program, and every sum
has one order. What the program's threads have written they read back at the next tile of keys: no thread may
pass the barrier between two tiles before all have reached it, and a barrier of the program's threads makes
the writes to global memory before it visible to all of them after it (CUDA: __syncthreads; Triton needs
tl.debug_barrier for it, github.com/triton-lang/triton/pull/11872). Within a tile of keys each part of the
buffer is met once. The buffer is read and written by ordinary loads and stores, never by descriptors, whose
copies such a barrier does not order; what they read was there before the kernel began.

Before it a small kernel computes lse in base 2 and Δ of all queries, in slots of whole tiles (see
attention.find_tile). A tile that reaches past its document is read so far back that it does not
(attention.moved_back); the queries in it that belong to the tile before get lse = ∞, a weight of zero.

FLOPs: D·Hq·Σ n² for each of 5 products (documents of n tokens), where two passes take 7, and one pass of
exponentials instead of two. Bytes moved: as there, and through the L2 cache 8·D bytes of the buffer for each
query and tile of keys up to it. Memory: 4·D·Hq·(T + BLOCK_M·B) bytes for the buffer.
"""

import torch
import triton
import triton.language as tl

from . import tuning
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
    zeros,
)
from .tiles import BATCH_SIZES, LOG2_E, matrix

LONGEST = 2048  # of a batch's documents


def many_documents(processors: int, T: int, Hk: int, B: int, max_seqlen) -> bool:
    """Whether one pass can be the faster one for T tokens, Hk key heads, B documents, none longer than
    max_seqlen (None: not known), by numbers that the host has: it waits for nothing.

    A program does all of a document's key head, so that one long document could keep all the others waiting.
    The programs have Hk · T² / B pairs of tokens to do at least, whatever the lengths; by the time that the
    last one starts none is idle, so all end within a processor's share of those pairs and max_seqlen² more.
    By the count of products, 5 against 7, that is no later than two passes where it is 7/5 of the share.
    """
    if max_seqlen is None or not 0 < max_seqlen <= LONGEST:
        return False
    return 2 * Hk * T**2 > 5 * processors * max_seqlen**2 * B


@triton.jit(do_not_specialize=BATCH_SIZES)
def _rows_kernel(
    grad,
    out,
    lse_ptr,
    values_ptr,
    cu_seqlens_ptr,
    B,
    Hq,
    stride_values,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """values[head] = lse in base 2, values[Hq + head] = Δ, of a slot's tile of queries as it is read."""
    head, slot = tl.program_id(0) % Hq, tl.program_id(0) // Hq
    _, start, end, row = find_tile(cu_seqlens_ptr, B, slot, BLOCK_M)
    if start + row >= end:
        return
    first = start + moved_back(row, end - start, BLOCK_M, DESCRIPTORS)
    rows = first + tl.arange(0, BLOCK_M)
    inside = (rows >= start + row) & (rows < end)
    grad_tile = load_head(
        (grad, None), first, end, head, stride_gt, stride_gh, BLOCK_M, D, PARTS, False, False
    )  # [BLOCK_M, D]
    out_tile = load_head((out, None), first, end, head, stride_ot, stride_oh, BLOCK_M, D, PARTS, False, False)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(PARTS)):
        delta += tl.sum(grad_tile[i].to(tl.float32) * out_tile[i].to(tl.float32), 1)
    lse = tl.load(lse_ptr + rows.to(tl.int64) * Hq + head, mask=inside, other=0.0) * LOG2_E
    values_ptr += head.to(tl.int64) * stride_values + slot * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(values_ptr, tl.where(inside, lse, float("inf")))
    tl.store(values_ptr + tl.cast(Hq, tl.int64) * stride_values, tl.where(inside, delta, 0.0))


@triton.jit
def load_values(values, row, column, stride, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """values[row, column : column + BLOCK]."""
    if DESCRIPTORS:
        tile = values.load([row, column]).reshape(BLOCK)
    else:
        tile = tl.load(values + row.to(tl.int64) * stride + column + tl.arange(0, BLOCK))
    return tile


@triton.jit
def add_to_buffer(
    buffer_ptr,
    dq_ptr,
    d_scores,
    k_tile,
    earlier,
    scale,
    rows,
    inside,
    head,
    heads,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    LAST: tl.constexpr,
):
    """A tile of dq, contiguous in the buffer, part by part: what `earlier` tiles of keys left there, if any,
    plus d_scores · k; written back, or where LAST times scale into dq[rows, head], those inside."""
    column = 0
    for i in tl.static_range(len(k_tile)):
        columns = tl.arange(0, k_tile[i].shape[1])
        buffer = (
            buffer_ptr + column * BLOCK + tl.arange(0, BLOCK)[:, None] * k_tile[i].shape[1] + columns[None, :]
        )
        before = tl.load(buffer, mask=tl.full(buffer.shape, True, tl.int1) & earlier, other=0.0)
        total = tl.dot(d_scores, k_tile[i], before, input_precision="ieee")
        if LAST:
            target = dq_ptr + (rows.to(tl.int64) * heads + head)[:, None] * D + column + columns[None, :]
            tl.store(target, (total * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])
        else:
            tl.store(buffer, total)
        column += k_tile[i].shape[1]


@triton.jit(do_not_specialize=BATCH_SIZES)
def _single_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    v_rest,
    grad,
    grad_rest,
    values,
    buffer_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
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
    SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    Hk = Hq // GROUP
    key_head, document = tl.program_id(0) % Hk, tl.program_id(0) // Hk
    start, end = tl.load(cu_seqlens_ptr + document), tl.load(cu_seqlens_ptr + document + 1)
    tokens, slot = end - start, start // BLOCK_M + document
    tiles = tl.cdiv(tokens, BLOCK_M)
    if DESCRIPTORS and (tokens < BLOCK_N) != SHORT:
        return
    for row in tl.range(0, tokens, BLOCK_N):
        tl.debug_barrier()  # what was written to the buffer for the tile before is read from here on
        read = moved_back(row, tokens, BLOCK_N, DESCRIPTORS)
        k_tile = load_head(
            (k, k_rest),
            start + read,
            end,
            key_head,
            stride_kt,
            stride_kh,
            BLOCK_N,
            D,
            PARTS,
            DESCRIPTORS,
            SHORT,
        )  # [BLOCK_N, D]
        v_tile = load_head(
            (v, v_rest),
            start + read,
            end,
            key_head,
            stride_vt,
            stride_vh,
            BLOCK_N,
            D,
            PARTS,
            DESCRIPTORS,
            SHORT,
        )
        keys = (tl.arange(0, BLOCK_N) + (read - row)).to(tl.uint32)  # those before `row` become large
        dk, dv = zeros(BLOCK_N, PARTS), zeros(BLOCK_N, PARTS)
        full = tl.minimum((row + BLOCK_N) // BLOCK_M, tiles)
        # The tiles of queries on the diagonal, whose dq is complete with these keys; those after it.
        for LOOP in tl.static_range(1 if SHORT else 2):
            first = full if LOOP else row // BLOCK_M
            last = tiles if LOOP else full
            for step in tl.range(first * GROUP, last * GROUP):
                head, tile = key_head * GROUP + step % GROUP, step // GROUP
                query = moved_back(tile * BLOCK_M, tokens, BLOCK_M, DESCRIPTORS)
                q_tile = load_head(
                    (q, q_rest),
                    start + query,
                    end,
                    head,
                    stride_qt,
                    stride_qh,
                    BLOCK_M,
                    D,
                    PARTS,
                    DESCRIPTORS,
                    SHORT,
                )  # [BLOCK_M, D]
                grad_tile = load_head(
                    (grad, grad_rest),
                    start + query,
                    end,
                    head,
                    stride_gt,
                    stride_gh,
                    BLOCK_M,
                    D,
                    PARTS,
                    DESCRIPTORS,
                    SHORT,
                )
                column = tl.multiple_of((slot + tile) * BLOCK_M, 16)
                lse = load_values(values, head, column, stride_values, BLOCK_M, DESCRIPTORS)  # [BLOCK_M]
                delta = load_values(values, Hq + head, column, stride_values, BLOCK_M, DESCRIPTORS)
                weights = tl.exp2(
                    inner_product(k_tile, q_tile) * scale_log2 - lse[None, :]
                )  # [BLOCK_N, BLOCK_M]
                queries = query + tl.arange(0, BLOCK_M)
                if LOOP == 0:
                    seen = tl.maximum(queries - row + 1, 0).to(tl.uint32)
                    weights = tl.where(keys[:, None] < seen[None, :], weights, 0.0)
                dv = add_product(dv, weights, grad_tile)
                d_scores = weights * (inner_product(v_tile, grad_tile) - delta[None, :])
                d_scores = d_scores.to(q_tile[0].dtype)
                dk = add_product(dk, d_scores, q_tile)
                add_to_buffer(
                    buffer_ptr
                    + (head.to(tl.int64) * (stride_values // BLOCK_M) + slot + tile) * (BLOCK_M * D),
                    dq_ptr,
                    d_scores.T,
                    k_tile,
                    row > 0,
                    scale,
                    start + queries,
                    (queries >= tile * BLOCK_M) & (queries < tokens),
                    head,
                    Hq,
                    BLOCK_M,
                    D,
                    LOOP == 0,
                )
        store_head(dk_ptr, scaled(dk, scale), start + read, end, key_head, Hk, BLOCK_N, D, start + row)
        store_head(dv_ptr, dv, start + read, end, key_head, Hk, BLOCK_N, D, start + row)


def one_pass(grad, q, k, v, out, lse, cu_seqlens, scale):
    """dq, dk, dv as of reference.flash_attention_backward."""
    (T, Hq, dim), Hk, B = q.shape, k.shape[1], len(cu_seqlens) - 1
    grad, q, k, v, out = (padded(x) for x in (grad, q, k, v, out))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse, cu_seqlens, D = lse.contiguous(), cu_seqlens.contiguous(), q.shape[2]
    descriptors = describable(tuning.target(q.device), grad, q, k, v)

    def run(config):
        M, N = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        slots = T // M + B
        values = lse.new_empty(2 * Hq, slots * M)  # of each head lse in base 2, then of each head Δ
        buffer = lse.new_empty(Hq, slots, M * D)
        _rows_kernel[(slots * Hq,)](
            grad,
            out,
            lse,
            values,
            cu_seqlens,
            B,
            Hq,
            slots * M,
            *grad.stride()[:2],
            *out.stride()[:2],
            D,
            parts_of(D),
            descriptors,
            M,
        )
        for short in (False, True)[: 1 + descriptors]:
            _single_kernel[(B * Hk,)](
                *(
                    part
                    for x, block in ((q, M), (k, N), (v, N), (grad, M))
                    for part in arguments(block, descriptors, x)
                ),
                matrix(values, 1, M, descriptors),
                buffer,
                dq,
                dk,
                dv,
                cu_seqlens,
                Hq,
                scale,
                scale * LOG2_E.value,
                slots * M,
                *(stride for x in (q, k, v, grad) for stride in x.stride()[:2]),
                Hq // Hk,
                D,
                parts_of(D),
                descriptors,
                short,
                **config.options,
            )

    bucket = {"dim": D, "itemsize": q.itemsize, "descriptors": descriptors}
    tuning.launch("attention_single", run, q.device, **bucket)
    return tuple(x[..., :dim].contiguous() for x in (dq, dk, dv))
