"""The logits z = x Wᵀ, tile by tile: what of them every user of the head needs, without all of them in
memory.

T tokens, V vocabulary, d hidden width. x [T, d], W [V, d].

_logits_kernel walks over all tiles [BLOCK_T, BLOCK_V] of z and keeps, per token and split of the vocabulary,
    its maximum m and Σ exp(z − m): the online log-sum-exp (Milakov & Gimelshein 2018, arXiv 1805.02867), or
    given an offset c per token, Σ E with E = exp((z − c) / temperature), and if wanted E itself, written in
    the dtype of x.
A grid that just fills the GPU takes the items (block of tokens, split of the vocabulary) in turn: group by
group of blocks, whose part of x, read again for every tile of the vocabulary, stays in the L2 cache
(GROUP_BYTES); within a group split by split, so that all programs read the same part of W at a time. Tiles,
and the steps along d within them, are one flat loop per group: the loads of the next tile are under way while
a tile is finished. The last tile of a vocabulary that is no multiple of BLOCK_V stands apart, so that only it
is masked. _target_logit_kernel computes x[t] · W[target_t], a gather and a dot.

FLOPs 2·T·V·d. Bytes: x once and W once per group (⌈2·T·d / GROUP_BYTES⌉ groups in 16 bits: 4 for T = 16k and
d = 2048), 8·T·splits for the results, and 2·T·V for E. From the L2 cache: x ⌈V / BLOCK_V⌉ times, W
⌈T / BLOCK_T⌉ times.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from . import gluon_logits, tuning
from .tiles import (
    BATCH_SIZES,
    LOWEST,
    add_to_logsumexp,
    contiguous_rows,
    dot_step,
    matrix,
    store_tile,
    use_descriptors,
)

GROUP_BYTES = 16 << 20  # of x at most, so that W and E have room beside it in an L2 cache of 50 MB (H100)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _logits_kernel(
    x,
    w,
    offset_ptr,
    e,
    max_ptr,
    sum_ptr,
    flag_ptr,
    T,
    V,
    d,
    stride_xt,
    stride_wv,
    stride_et,
    blocks_t,
    tiles,
    tiles_per_split,
    group,
    exp_scale,
    EXP: tl.constexpr,
    FLAG: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    if FLAG:
        if tl.load(flag_ptr) == 0:
            return
    steps = tl.maximum(tl.cdiv(d, BLOCK_D), 1)
    programs = tl.num_programs(0)
    splits = tl.cdiv(tiles, tiles_per_split)
    position = tl.program_id(0)  # of this program's next item among those of a group
    for first in range(0, blocks_t, group):
        width = tl.minimum(group, blocks_t - first)  # blocks of tokens in this group
        items = width * splits
        own = tl.cdiv(tl.maximum(items - position, 0), programs)
        own_of_last_split = own - tl.cdiv(tl.maximum(items - width - position, 0), programs)
        count = own * tiles_per_split - own_of_last_split * (splits * tiles_per_split - tiles)

        split, block, step = position // width, position % width, 0
        next_split, next_block = programs // width, programs % width  # how far it is to the next item
        tile = split * tiles_per_split
        largest = tl.full([BLOCK_T], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for _ in range(count * steps):
            t = (first + block) * BLOCK_T
            tile_done = step == steps - 1
            item_done = tile_done & (tile == tl.minimum((split + 1) * tiles_per_split, tiles) - 1)
            logits = dot_step(
                x,
                w,
                t,
                tile * BLOCK_V,
                step * BLOCK_D,
                T,
                V,
                d,
                stride_xt,
                stride_wv,
                logits,
                BLOCK_T,
                BLOCK_V,
                BLOCK_D,
                DESCRIPTORS,
            )
            if tile_done:
                largest, total = _finish_tile(
                    logits,
                    offset_ptr,
                    e,
                    t,
                    tile * BLOCK_V,
                    T,
                    V,
                    stride_et,
                    exp_scale,
                    largest,
                    total,
                    EXP,
                    BLOCK_T,
                    BLOCK_V,
                    DESCRIPTORS,
                )
                logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
                if item_done:
                    _store_rows(max_ptr, sum_ptr, split, t, T, largest, total, EXP, BLOCK_T)
                    largest = tl.full([BLOCK_T], LOWEST, tl.float32)
                    total = tl.zeros([BLOCK_T], tl.float32)
            # Selects, no branch: the loads run ahead of the loop, and so must what they depend on. No
            # division: it would take longer than all else in a step along d.
            step = tl.where(tile_done, 0, step + 1)
            block = tl.where(item_done, block + next_block, block)
            split = tl.where(item_done, split + next_split, split)
            split = tl.where(block >= width, split + 1, split)
            block = tl.where(block >= width, block - width, block)
            tile = tl.where(item_done, split * tiles_per_split, tl.where(tile_done, tile + 1, tile))
        position += own * programs - items

    if tiles * BLOCK_V < V:  # the tile that reaches beyond the vocabulary: a split of its own, the last
        for block in range(tl.program_id(0), blocks_t, programs):
            t, v = block * BLOCK_T, tiles * BLOCK_V
            z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
            for k in range(0, steps * BLOCK_D, BLOCK_D):
                z = dot_step(
                    x, w, t, v, k, T, V, d, stride_xt, stride_wv, z, BLOCK_T, BLOCK_V, BLOCK_D, DESCRIPTORS
                )
            z = tl.where((v + tl.arange(0, BLOCK_V) < V)[None, :], z, -float("inf"))
            largest, total = _finish_tile(
                z,
                offset_ptr,
                e,
                t,
                v,
                T,
                V,
                stride_et,
                exp_scale,
                tl.full([BLOCK_T], LOWEST, tl.float32),
                tl.zeros([BLOCK_T], tl.float32),
                EXP,
                BLOCK_T,
                BLOCK_V,
                DESCRIPTORS,
            )
            _store_rows(max_ptr, sum_ptr, tl.cdiv(tiles, tiles_per_split), t, T, largest, total, EXP, BLOCK_T)


@triton.jit
def _finish_tile(
    logits,
    offset_ptr,
    e,
    t,
    v,
    T,
    V,
    stride_et,
    exp_scale,
    largest,
    total,
    EXP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    if EXP:
        r = t + tl.arange(0, BLOCK_T)
        offset = tl.load(offset_ptr + r, mask=r < T, other=0.0) * exp_scale
        exponential = tl.exp2(logits * exp_scale - offset[:, None])
        total += tl.sum(exponential, 1)
        if e is not None:
            store_tile(e, exponential, t, v, T, V, stride_et, BLOCK_T, BLOCK_V, DESCRIPTORS)
    else:
        largest, total = add_to_logsumexp(logits, largest, total)
    return largest, total


@triton.jit
def _store_rows(max_ptr, sum_ptr, split, t, T, largest, total, EXP: tl.constexpr, BLOCK_T: tl.constexpr):
    r = t + tl.arange(0, BLOCK_T)
    row = tl.cast(split, tl.int64) * T + r
    tl.store(sum_ptr + row, total, mask=r < T)
    if not EXP:
        tl.store(max_ptr + row, largest, mask=r < T)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _target_logit_kernel(
    x_ptr,
    w_ptr,
    targets_ptr,
    out_ptr,
    T,
    V,
    d,
    stride_xt,
    stride_wv,
    stride_target,
    ignore_index,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + r.to(tl.int64) * stride_target, mask=r < T, other=ignore_index)
    inside = (
        (r < T) & (target >= 0) & (target < V)
    )  # beyond the last row stands ignore_index, which may be an id
    x_row = x_ptr + r.to(tl.int64)[:, None] * stride_xt
    w_row = w_ptr + tl.where(inside, target, 0)[:, None] * stride_wv
    logit = tl.zeros([BLOCK_T], tl.float32)
    for k in range(0, d, BLOCK_D):
        c = k + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (c < d)[None, :]
        x = tl.load(x_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
        logit += tl.sum(x * tl.load(w_row + c[None, :], mask=mask, other=0.0).to(tl.float32), 1)
    tl.store(out_ptr + r, tl.where(inside | (target == ignore_index), logit, float("nan")), mask=r < T)


def token_group(bytes_per_block: int) -> int:
    """How many blocks of tokens are worked on together: as many as take GROUP_BYTES, a power of two."""
    return 1 << max(0, (GROUP_BYTES // max(1, bytes_per_block)).bit_length() - 1)


@functools.lru_cache
def tiles_per_split(tiles: int, blocks_t: int, programs: int) -> int:
    """How many tiles of the vocabulary an item takes: few enough that the items divide evenly among the
    programs and that a split's part of W stays in the L2 cache, many enough that its partial results (taken
    as a fifteenth of a tile's work) cost little."""
    return min(
        range(1, 17),
        key=lambda size: triton.cdiv(blocks_t * triton.cdiv(tiles, size), programs) * (size + 1 / 15),
    )


def _walk(x, w, offset, e, flag, temperature):
    """Launch _logits_kernel; see logsumexp_partials and exponentials."""
    (T, d), V = x.shape, len(w)
    where = tuning.target(x.device)
    descriptors = use_descriptors(where, *(matrix for matrix in (x, w, e) if matrix is not None))

    def run(config, gluon=False):
        block_t, block_v, block_d = (config.blocks[name] for name in ("BLOCK_T", "BLOCK_V", "BLOCK_D"))
        blocks_t, tiles = triton.cdiv(T, block_t), V // block_v
        programs = where.processors * config.per_processor
        size = tiles_per_split(tiles, blocks_t, programs)
        items = blocks_t * triton.cdiv(tiles, size)
        total = x.new_empty(triton.cdiv(tiles, size) + (V % block_v > 0), T, dtype=torch.float32)
        largest = torch.empty_like(total) if offset is None else None
        grid = (min(max(items, blocks_t), programs),)
        order = blocks_t, tiles, size, token_group(block_t * d * x.itemsize)
        exp_scale = 1 / math.log(2) / temperature
        if gluon:
            gluon_logits.launch(grid, config, x, w, offset, e, total, order, exp_scale)
            return largest, total
        _logits_kernel[grid](
            matrix(x, block_t, block_d, descriptors),
            matrix(w, block_v, block_d, descriptors),
            offset,
            e if e is None else matrix(e, block_t, block_v, descriptors),
            largest,
            total,
            flag,
            T,
            V,
            d,
            x.stride(0),
            w.stride(0),
            0 if e is None else e.stride(0),
            *order,
            exp_scale,
            EXP=offset is not None,
            FLAG=flag is not None,
            DESCRIPTORS=descriptors,
            **config.options,
        )
        return largest, total

    name = "logsumexp" if e is None else "exponentials"
    fit = descriptors and flag is None and offset is not None and x.itemsize == 2
    if gluon_logits.wanted(where) and fit:
        return run(tuning.GLUON[name], gluon=True)
    if fit and tuning.OFFLINE and gluon_logits.possible(where):  # there every kernel is compiled
        run(tuning.GLUON[name], gluon=True)
    return tuning.launch(
        name, run, x.device, itemsize=x.itemsize, descriptors=descriptors, conditional=flag is not None
    )


def logsumexp_partials(x, w, flag=None):
    """(maximum, Σ exp(z − maximum)) of every row of the logits of x [T, d] and w [V, d], per split of the
    vocabulary: float32 [splits, T]. With a flag (int32 on the device) nothing is computed where it is 0."""
    return _walk(contiguous_rows(x), contiguous_rows(w), None, None, flag, 1.0)


def exponentials(x, w, offset, e, flag=None, temperature=1.0):
    """Write E = exp((z − offset) / temperature) [T, V] to e unless it is None, offset [T] float32, and return
    Σ E per split of the vocabulary, float32 [splits, T]. x, w and e have contiguous rows. With a flag nothing
    is computed where it is 0."""
    return _walk(x, w, offset, e, flag, temperature)[1]


def target_logits(x, w, targets, ignore_index):
    """x[t] · w[targets[t]] [T] float32; 0 where ignored, NaN for a target outside the vocabulary."""
    x, w = contiguous_rows(x), contiguous_rows(w)
    T, d = x.shape
    out = x.new_empty(T, dtype=torch.float32)
    _target_logit_kernel[(triton.cdiv(T, 8),)](
        x,
        w,
        targets,
        out,
        T,
        len(w),
        d,
        x.stride(0),
        w.stride(0),
        targets.stride(0),
        ignore_index,
        BLOCK_T=8,
        BLOCK_D=256,
    )
    return out
