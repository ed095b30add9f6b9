"""flash_attention: causal softmax attention within each packed document (Dao 2023, arXiv 2307.08691),
forward.

    out = softmax(scale · q kᵀ) v        lse = log Σ exp(scale · q kᵀ)
    over the keys up to the query's own position

T tokens, B documents, Hq query heads, Hk key heads (query head h reads key head h // (Hq / Hk)), D head
dimension. A tile is BLOCK_M queries or BLOCK_N keys of one document, counted from its start; its D columns
are held in PARTS, powers of two (96 = 64 + 32).

One program per tile of queries and head walks over the keys with an online softmax in base 2; the tiles on
the diagonal alone are masked. A document's last tile of keys, where it is not whole, is read so far back that
it ends with the document (`moved_back`), so that no tile goes through registers to be cleared of the next
document's rows but that of a document shorter than a tile. The list of programs is flat: a document of n
tokens owns ⌊n / BLOCK_M⌋ + 1 slots, or one more or less, T // BLOCK_M + B in all, and a program finds its
document in cu_seqlens by bisection, so documents of unequal length leave nothing idle. The late tiles of a
document, which have the most keys, start first; the heads that share keys run side by side.

FLOPs: 2·D·Hq·Σ n² for documents of n tokens. Bytes moved: q, out and lse once, k and v once per tile of
queries (from the L2 cache).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import dispatch, tuning
from .tiles import BATCH_SIZES, LN_2, LOG2_E, matrix, use_descriptors


@triton.jit
def find_tile(cu_seqlens_ptr, B, slot, BLOCK: tl.constexpr):
    """(document, start, end, row) of the slot's tile: its document, that one's bounds, the tile's first
    position there (beyond the end if none).

    Document b owns the slots from cu_seqlens[b] // BLOCK + b to the next document's: ⌈n / BLOCK⌉ of them or
    more for n tokens.
    """
    low = 0
    high = B - 1
    while low < high:  # the last document whose slots begin here or before
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= slot:
            low = middle
        else:
            high = middle - 1
    start = tl.load(cu_seqlens_ptr + low)
    return low, start, tl.load(cu_seqlens_ptr + low + 1), (slot - start // BLOCK - low) * BLOCK


@triton.jit
def moved_back(row, tokens, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Where the tile at `row` of a document is read: so far back that it does not reach past the document's
    end, but not before its beginning. Its rows before `row` are those of the tile before, and are masked.

    A descriptor reads whole tiles, and rows of another document may hold NaN, which a weight of zero does not
    silence. (A pointer reads the last row again in their place.)
    """
    return tl.maximum(tl.minimum(row, tokens - BLOCK), 0) if DESCRIPTORS else row


@triton.jit
def load_head(
    x,
    row,
    end,
    head,
    stride_t,
    stride_h,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """x[row : row + BLOCK, head] as tiles of PARTS columns; x: a descriptor for each of one or two parts, or
    a pointer and None. Rows from `end` on hold anything; where RAGGED numbers of this document, or zeros, so
    that a weight of zero silences them."""
    parts = ()
    column = 0
    for i in tl.static_range(len(PARTS)):
        if DESCRIPTORS:
            part = x[i].load([row, head * D + column])
            if RAGGED:
                part = tl.where((row + tl.arange(0, BLOCK) < end)[:, None], part, 0.0)
        else:
            rows = tl.minimum(row + tl.arange(0, BLOCK), end - 1).to(tl.int64)
            columns = column + tl.arange(0, PARTS[i])
            part = tl.load(x[0] + head.to(tl.int64) * stride_h + rows[:, None] * stride_t + columns[None, :])
        parts = parts + (part,)
        column += PARTS[i]
    return parts


@triton.jit
def store_head(x_ptr, parts, row, end, head, heads, BLOCK: tl.constexpr, D: tl.constexpr, first=None):
    """x[row : row + BLOCK, head] = parts, up to `end` and from `first` on; x [T, heads, D] contiguous."""
    column = 0
    rows = row + tl.arange(0, BLOCK)
    inside = rows < end if first is None else (rows < end) & (rows >= first)
    for i in tl.static_range(len(parts)):
        columns = column + tl.arange(0, parts[i].shape[1])
        target = x_ptr + (rows.to(tl.int64) * heads + head)[:, None] * D + columns[None, :]
        tl.store(target, parts[i].to(x_ptr.dtype.element_ty), mask=inside[:, None])
        column += parts[i].shape[1]


@triton.jit
def zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (tl.full((ROWS, PARTS[i]), 0.0, tl.float32),)
    return parts


@triton.jit
def inner_product(x, y):
    """x · yᵀ in float32 of tiles in parts."""
    product = tl.dot(x[0], y[0].T, input_precision="ieee")
    for i in tl.static_range(1, len(x)):
        product = tl.dot(x[i], y[i].T, product, input_precision="ieee")
    return product


@triton.jit
def add_product(parts, weights, x):
    """parts + weights · x, the weights rounded to x's dtype."""
    sums = ()
    for i in tl.static_range(len(x)):
        sums = sums + (tl.dot(weights.to(x[i].dtype), x[i], parts[i], input_precision="ieee"),)
    return sums


@triton.jit
def visible(tile, first, queries, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """[queries, BLOCK]: which keys of the tile read at `tile` a query sees, of those from `first` on."""
    if DESCRIPTORS:
        keys = (tl.arange(0, BLOCK) + (tile - first)).to(tl.uint32)  # those before `first` become large
        seen = keys[None, :] < tl.maximum(queries - first + 1, 0).to(tl.uint32)[:, None]
    else:  # nothing is moved back
        seen = (first + tl.arange(0, BLOCK))[None, :] <= queries[:, None]
    return seen


@triton.jit
def scaled(parts, factor):
    products = ()
    for i in tl.static_range(len(parts)):
        products = products + (parts[i] * factor,)
    return products


@triton.jit(do_not_specialize=BATCH_SIZES)
def _forward_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    v_rest,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    B,
    Hq,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0) % Hq
    _, start, end, row = find_tile(
        cu_seqlens_ptr, B, (tl.num_programs(0) - 1 - tl.program_id(0)) // Hq, BLOCK_M
    )
    if start + row >= end:
        return
    q_tile = load_head(
        (q, q_rest), start + row, end, head, stride_qt, stride_qh, BLOCK_M, D, PARTS, DESCRIPTORS, False
    )  # [BLOCK_M, D]
    queries = row + tl.arange(0, BLOCK_M)
    # Of the scores in base 2; finite after the first tile, which holds key 0.
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = zeros(BLOCK_M, PARTS)
    scale *= LOG2_E
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
                False,
            )
            scores = inner_product(q_tile, k_tile)  # [BLOCK_M, BLOCK_N]
            if LOOP:
                scores = tl.where(visible(tile, key, queries, BLOCK_N, DESCRIPTORS), scores, -float("inf"))
            new = tl.maximum(largest, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new[:, None])
            factor = tl.exp2(largest - new)
            total = total * factor + tl.sum(weights, 1)
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
                LOOP == 2,
            )
            out = add_product(scaled(out, factor[:, None]), weights, v_tile)
            largest = new
    store_head(out_ptr, scaled(out, (1 / total)[:, None]), start + row, end, head, Hq, BLOCK_M, D)
    rows = start + queries
    tl.store(lse_ptr + rows.to(tl.int64) * Hq + head, (largest + tl.log2(total)) * LN_2, mask=rows < end)


def padded(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] with D a multiple of 16 and contiguous."""
    x = F.pad(x, (0, -x.shape[2] % 16)) if x.shape[2] % 16 else x
    return x if x.stride(2) == 1 else x.contiguous()


def parts_of(dim: int) -> tuple:
    """The powers of two that make up a multiple of 16, largest first."""
    powers = [1 << bit for bit in reversed(range(4, dim.bit_length()))]
    return tuple(power for power in powers if dim & power)


def describable(where: tuning.Target, *tensors: torch.Tensor) -> bool:
    """Whether all tensors [T, H, D] can be read through descriptors, as matrices [T, H · D]."""
    parts = len(parts_of(tensors[0].shape[2]))
    return (
        parts <= 2
        and all(x.stride(1) == x.shape[2] for x in tensors)
        and use_descriptors(where, *(x.flatten(1) for x in tensors))
    )


def arguments(block: int, descriptors: bool, x: torch.Tensor) -> tuple:
    """The kernel's two arguments for x [T, H, D], read in tiles of `block` rows. (A launcher takes no
    descriptors inside of tuples.)"""
    if not descriptors:
        return x, None
    parts = [matrix(x.flatten(1), block, width, True) for width in parts_of(x.shape[2])]
    return (*parts, None) if len(parts) == 1 else tuple(parts)


def examples(make):
    """Every head dimension, grouped heads, an input that descriptors cannot take, float16 and float32."""
    cu_seqlens = make(17, dtype=torch.int32)
    for dim, heads, key_heads, dtype in (
        (16, 4, 4, torch.bfloat16),
        (32, 4, 4, torch.bfloat16),
        (64, 12, 12, torch.bfloat16),
        (96, 16, 16, torch.bfloat16),
        (96, 8, 1, torch.bfloat16),
        (128, 16, 16, torch.bfloat16),
        (128, 28, 4, torch.bfloat16),
        (64, 8, 2, torch.float16),
        (64, 4, 4, torch.float32),
    ):
        k = make(16384, key_heads, dim, dtype=dtype)
        yield make(16384, heads, dim, dtype=dtype), k, k, cu_seqlens, 1024, dim**-0.5
    for dim in (64, 128):  # heads far apart
        k = make(4, 16384, dim).transpose(0, 1)
        yield k, k, k, cu_seqlens, 1024, dim**-0.5


@dispatch.triton("flash_attention", examples)
def flash_attention(q, k, v, cu_seqlens, max_seqlen, scale):
    """As reference.flash_attention; max_seqlen is not needed."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    T, Hq, dim = q.shape
    q, k, v = padded(q), padded(k), padded(v)
    D, B, cu_seqlens = q.shape[2], len(cu_seqlens) - 1, cu_seqlens.contiguous()
    result = out if D == dim else torch.empty_like(q, memory_format=torch.contiguous_format)
    descriptors = describable(tuning.target(q.device), q, k, v)

    def run(config):
        M, N = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        _forward_kernel[((T // M + B) * Hq,)](
            *arguments(M, descriptors, q),
            *arguments(N, descriptors, k),
            *arguments(N, descriptors, v),
            result,
            lse,
            cu_seqlens,
            B,
            Hq,
            scale,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            Hq // k.shape[1],
            D,
            parts_of(D),
            descriptors,
            **config.options,
        )

    tuning.launch("attention", run, q.device, dim=D, itemsize=q.itemsize, descriptors=descriptors)
    return out.copy_(result[..., :dim]) if D != dim else out, lse
