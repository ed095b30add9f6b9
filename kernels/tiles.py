"""What several kernels share: how a matrix is passed and read in tiles, and the log-sum-exp of split rows.

T tokens, V vocabulary, d hidden width. A matrix comes to a kernel as a host tensor descriptor (TMA on Hopper
and newer) or as a pointer with its row stride; its last dimension is contiguous.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Arguments of kernels that change from batch to batch: Triton must not compile a kernel anew because one is
# 1, or no multiple of 16.
BATCH_SIZES = (
    "T",
    "R",
    "B",
    "P",
    "splits",
    "first_splits",
    "again_splits",
    "blocks_t",
    "tiles_per_split",
    "group",
)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SPLITS_AT_ONCE = tl.constexpr(8)  # one after the other, 200 splits would be 200 waits for memory
LOWEST = tl.constexpr(-2.3e38)  # a first maximum that stays finite when multiplied by log2(e)


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x [R, C], copied only if its rows are not contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def use_descriptors(where, *matrices: torch.Tensor) -> bool:
    """Whether the target reads all these matrices (rows contiguous) through descriptors: not empty, rows
    aligned to 16 bytes."""
    return where.descriptors and all(
        x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) > 0
        and x.stride(0) * x.itemsize % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in matrices
    )


def matrix(x: torch.Tensor, block_rows: int, block_columns: int, descriptors: bool):
    """The kernel's argument for a matrix [R, C] that is read in tiles."""
    return (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_rows, block_columns])
        if descriptors
        else x
    )


@triton.jit
def load_tile(
    x,
    row,
    column,
    rows,
    columns,
    stride_row,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """x[row : row + BLOCK_R, column : column + BLOCK_C]; zero beyond the last column, beyond the last row
    zero or a copy of it."""
    if DESCRIPTORS:
        tile = x.load([row, column])
    else:
        r = tl.minimum(row + tl.arange(0, BLOCK_R), rows - 1).to(tl.int64)
        c = column + tl.arange(0, BLOCK_C)
        tile = tl.load(x + r[:, None] * stride_row + c[None, :], mask=(c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    x,
    tile,
    row,
    column,
    rows,
    columns,
    stride_row,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """x[row : row + BLOCK_R, column : column + BLOCK_C] = tile, as far as x reaches, in its dtype."""
    if DESCRIPTORS:
        x.store([row, column], tile.to(x.dtype))
    else:
        r = (row + tl.arange(0, BLOCK_R)).to(tl.int64)
        c = column + tl.arange(0, BLOCK_C)
        tl.store(
            x + r[:, None] * stride_row + c[None, :],
            tile.to(x.dtype.element_ty),
            mask=(r < rows)[:, None] & (c < columns)[None, :],
        )


@triton.jit
def dot_step(
    x,
    w,
    t,
    v,
    k,
    T,
    V,
    d,
    stride_xt,
    stride_wv,
    logits,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """logits [BLOCK_T, BLOCK_V] + x[t:, k:] · w[v:, k:]ᵀ over BLOCK_D columns, in float32."""
    x_tile = load_tile(x, t, k, T, d, stride_xt, BLOCK_T, BLOCK_D, DESCRIPTORS)
    w_tile = load_tile(w, v, k, V, d, stride_wv, BLOCK_V, BLOCK_D, DESCRIPTORS)
    return tl.dot(x_tile, w_tile.T, logits, input_precision="ieee")


@triton.jit
def add_to_logsumexp(logits, largest, total):
    """(largest, total) of rows after the logits [BLOCK_T, BLOCK_V]: their maximum m, and Σ exp(z − m)."""
    new = tl.maximum(largest, tl.max(logits, 1))
    scaled = new * LOG2_E
    # The difference first: largest * LOG2_E - scaled becomes one operation with one rounding on a GPU, and is
    # not 0 where the maximum stays.
    total = total * tl.exp2((largest - new) * LOG2_E) + tl.sum(tl.exp2(logits * LOG2_E - scaled[:, None]), 1)
    return new, total


@triton.jit
def _load_splits(ptr, first, r, T, splits, beyond_last_split, beyond_last_row):
    """The partial results [SPLITS_AT_ONCE, rows] of the rows r, stored [splits, T], from split `first` on."""
    split = first + tl.arange(0, SPLITS_AT_ONCE)[:, None]
    inside = (split < splits) & (r < T)[None, :]
    loaded = tl.load(ptr + split.to(tl.int64) * T + r[None, :], mask=inside, other=beyond_last_row)
    return tl.where(split < splits, loaded, beyond_last_split)


@triton.jit
def combine_logsumexp(max_ptr, sum_ptr, r, T, splits, MAXIMUM: tl.constexpr = False):
    """log Σ exp of the rows r from their `splits` partial results, stored [splits, T], in a fixed order; or
    their maximum alone."""
    largest = tl.full([SPLITS_AT_ONCE, r.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([SPLITS_AT_ONCE, r.shape[0]], tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        m = _load_splits(max_ptr, first, r, T, splits, LOWEST, 0.0)
        s = _load_splits(sum_ptr, first, r, T, splits, 0.0, 1.0)
        new = tl.maximum(largest, m)
        total = total * tl.exp2((largest - new) * LOG2_E) + s * tl.exp2((m - new) * LOG2_E)
        largest = new
    maximum = tl.max(largest, 0)
    total = tl.sum(total * tl.exp2((largest - maximum[None, :]) * LOG2_E), 0)
    return maximum if MAXIMUM else maximum + tl.log2(total) * LN_2


@triton.jit
def log2_of_16_bits(x, NATIVE: tl.constexpr):
    """log2 x for x that was rounded to 16 bits: with NVIDIA's own instruction (relative error 2^-22) where
    NATIVE, twenty instructions else."""
    if NATIVE:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(x)
    return result


@triton.jit
def at_most_zero(log_prob):
    """Roundings of a logit and of the log-sum-exp differ, so a certain token could come out a little above 0.
    NaN stays."""
    return tl.where(log_prob > 0, 0.0, log_prob)


@triton.jit
def sum_splits(sum_ptr, r, T, splits):
    """The sum of the rows r over their `splits` partial results, stored [splits, T], in a fixed order."""
    total = tl.zeros([SPLITS_AT_ONCE, r.shape[0]], tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        total += _load_splits(sum_ptr, first, r, T, splits, 0.0, 1.0)
    return tl.sum(total, 0)
