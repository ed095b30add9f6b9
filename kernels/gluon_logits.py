"""The tile loop of logits.py for Hopper, in Gluon: one warp loads, two groups of warps multiply. Opt-in:
MINIPLM_GLUON=1.

T tokens, V vocabulary, d hidden width. Σ E, and if wanted E = exp((z − c) / temperature), for a given offset
c per token. Results, splits and the order of the items are those of logits._logits_kernel; what differs is
who does what. There the matrix units are idle while a tile is finished (its exponentials and sums). Here a
program has

    a producer, one warp: loads x [BLOCK_T, BLOCK_D] and W [BLOCK_V, BLOCK_D] by TMA, step along d by step,
        into a ring of STAGES buffers, as soon as one is free
    two consumers, four warps each: half the tokens of a tile each, their logits in registers

and a turn: only the consumer whose turn it is finishes a tile. While it does, the other multiplies alone, as
far ahead as the ring reaches; so from the first tile on their ends do not coincide.

    full[s]   TMA has filled buffer s          empty[s]  both consumers have read it
    turn[0]   consumer 0 has finished a tile   turn[1]   consumer 1 has: they alternate, 0 first

An mbarrier is waited for by the parity of its phase; of a new one, parity 1 counts as passed. There is no
cycle of waits: a consumer waits for its turn only after it has given back all buffers of its tile.

FLOPs and bytes: those of logits.py. Gluon has no interpreter: this kernel is compiled for sm_90 anywhere, but
runs, and is tested, on a GPU alone.
"""

import os

from . import tuning

ENVIRONMENT = "MINIPLM_GLUON"
HOPPER = 90

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:  # a Triton without it, or with another interface
    MISSING = str(error)
else:
    MISSING = None


def possible(where: tuning.Target) -> bool:
    """Whether the kernel compiles for the target with this Triton."""
    return where.backend == "cuda" and where.arch == HOPPER and MISSING is None


def wanted(where: tuning.Target) -> bool:
    """Whether MINIPLM_GLUON asks for the kernel.

    ValueError for a value that is neither 0 nor 1; RuntimeError where it is 1 and the kernel cannot run.
    """
    choice = os.environ.get(ENVIRONMENT) or "0"
    if choice not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} is {choice!r}; it must be 0 or 1")
    if choice == "1" and not possible(where):
        problem = (
            f"this Triton has no Gluon for it ({MISSING})"
            if MISSING and where.backend == "cuda" and where.arch == HOPPER
            else f"it runs on Hopper GPUs alone (sm_{HOPPER}), and here is {where.backend} {where.arch}"
        )
        raise RuntimeError(f"{ENVIRONMENT}=1, but {problem}: unset {ENVIRONMENT}")
    return choice == "1"


if MISSING is None:
    from .tiles import BATCH_SIZES

    # Triton 3.9 has other names for them.
    async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

    @gluon.jit
    def _item(item, first, width, tiles_per_split, tiles):
        """(block of tokens, split, its first tile, the one after its last) of an item of the group that
        begins at block `first`."""
        split = item // width
        tile = split * tiles_per_split
        return first + item % width, split, tile, min(tile + tiles_per_split, tiles)

    @gluon.jit
    def _next_position(position, items, programs):
        """A program's first item in the next group: what it is beyond the end of this one, counted on."""
        own = (max(items - position, 0) + programs - 1) // programs
        return position + own * programs - items

    @gluon.jit
    def _load_tile(x, w, xs, ws, full, empty, block, tile, steps, loaded):
        """All steps of a tile into the ring; returns how many were loaded so far."""
        STAGES: gl.constexpr = ws.shape[0]
        ROWS: gl.constexpr = xs.shape[1]
        BLOCK_V: gl.constexpr = ws.shape[1]
        BLOCK_D: gl.constexpr = ws.shape[2]
        for step in range(steps):
            stage = loaded % STAGES
            mbarrier.wait(empty.index(stage), (loaded // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (2 * ROWS + BLOCK_V) * BLOCK_D * 2)
            for half in gl.static_range(2):
                async_load(
                    x,
                    [(2 * block + half) * ROWS, step * BLOCK_D],
                    full.index(stage),
                    xs.index(2 * stage + half),
                )
            async_load(w, [tile * BLOCK_V, step * BLOCK_D], full.index(stage), ws.index(stage))
            loaded += 1
        return loaded

    @gluon.jit
    def _producer(x, w, shared, order):
        xs, ws, full, empty = shared
        V, steps, blocks_t, tiles, tiles_per_split, group = order
        BLOCK_V: gl.constexpr = ws.shape[1]
        programs = gl.num_programs(0)
        splits = (tiles + tiles_per_split - 1) // tiles_per_split
        position = gl.program_id(0)
        loaded = 0
        for first in range(0, blocks_t, group):
            width = min(group, blocks_t - first)
            for item in range(position, width * splits, programs):
                block, _, begin, end = _item(item, first, width, tiles_per_split, tiles)
                for tile in range(begin, end):
                    loaded = _load_tile(x, w, xs, ws, full, empty, block, tile, steps, loaded)
            position = _next_position(position, width * splits, programs)
        if tiles * BLOCK_V < V:
            for block in range(gl.program_id(0), blocks_t, programs):
                loaded = _load_tile(x, w, xs, ws, full, empty, block, tiles, steps, loaded)

    @gluon.jit
    def _multiply_tile(HALF: gl.constexpr, xs, ws, full, empty, steps, used, LAYOUT: gl.constexpr):
        """(half a tile of logits, how many steps were used so far). One product is under way while the next
        buffer is waited for; a buffer is given back when the product after its own has begun."""
        STAGES: gl.constexpr = ws.shape[0]
        ROWS: gl.constexpr = xs.shape[1]
        BLOCK_V: gl.constexpr = ws.shape[1]
        z = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_V], gl.float32, layout=LAYOUT))
        for step in range(steps):
            stage = used % STAGES
            mbarrier.wait(full.index(stage), used // STAGES & 1)
            z = warpgroup_mma(
                xs.index(2 * stage + HALF),
                ws.index(stage).permute((1, 0)),
                z,
                use_acc=step > 0,
                is_async=True,
            )
            z = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(z,)))
            mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=step > 0)
            used += 1
        z = warpgroup_mma_wait(0, deps=(z,))
        mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
        return z, used

    @gluon.jit
    def _finish_tile(z, e, e_tile, offset, t, v, exp_scale, total, STORE: gl.constexpr):
        """The sum of the rows after the logits z; E too where STORE."""
        exponential = gl.exp2(z * exp_scale - offset[:, None])
        if STORE:
            tma.store_wait(0)  # the tile before has been read
            e_tile.store(exponential.to(e.dtype))
            fence_async_shared()
            async_store(e, [t, v], e_tile)
        return total + gl.sum(exponential, 1)

    @gluon.jit
    def _begin_rows(
        block, HALF: gl.constexpr, T, offset_ptr, exp_scale, ROWS: gl.constexpr, OF_ROWS: gl.constexpr
    ):
        """(first row of half a block, its rows, their offsets, a sum to begin with)."""
        t = (2 * block + HALF) * ROWS
        r = t + gl.arange(0, ROWS, layout=OF_ROWS)
        offset = gl.load(offset_ptr + r, mask=r < T, other=0.0) * exp_scale
        return t, r, offset, gl.zeros([ROWS], gl.float32, layout=OF_ROWS)

    @gluon.jit
    def _consumer(HALF: gl.constexpr, STORE: gl.constexpr, shared, results, order):
        xs, ws, full, empty = shared
        turn, e, e_tiles, offset_ptr, sum_ptr, T, exp_scale = results
        V, steps, blocks_t, tiles, tiles_per_split, group = order
        ROWS: gl.constexpr = xs.shape[1]
        BLOCK_V: gl.constexpr = ws.shape[1]
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16]
        )
        OF_ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
        e_tile = e_tiles.index(HALF)
        programs = gl.num_programs(0)
        splits = (tiles + tiles_per_split - 1) // tiles_per_split
        position = gl.program_id(0)
        used = 0
        finished = 0
        for first in range(0, blocks_t, group):
            width = min(group, blocks_t - first)
            for item in range(position, width * splits, programs):
                block, split, begin, end = _item(item, first, width, tiles_per_split, tiles)
                t, r, offset, total = _begin_rows(block, HALF, T, offset_ptr, exp_scale, ROWS, OF_ROWS)
                for tile in range(begin, end):
                    z, used = _multiply_tile(HALF, xs, ws, full, empty, steps, used, LAYOUT)
                    mbarrier.wait(turn.index(1 - HALF), (finished & 1) ^ (1 - HALF))
                    total = _finish_tile(z, e, e_tile, offset, t, tile * BLOCK_V, exp_scale, total, STORE)
                    mbarrier.arrive(turn.index(HALF), count=1)
                    finished += 1
                gl.store(sum_ptr + split.to(gl.int64) * T + r, total, mask=r < T)
            position = _next_position(position, width * splits, programs)
        v = tiles * BLOCK_V
        if v < V:  # the tile that reaches beyond the vocabulary: a split of its own, the last
            inside = v + gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, LAYOUT)) < V
            for block in range(gl.program_id(0), blocks_t, programs):
                t, r, offset, total = _begin_rows(block, HALF, T, offset_ptr, exp_scale, ROWS, OF_ROWS)
                z, used = _multiply_tile(HALF, xs, ws, full, empty, steps, used, LAYOUT)
                z = gl.where(inside[None, :], z, -float("inf"))
                mbarrier.wait(turn.index(1 - HALF), (finished & 1) ^ (1 - HALF))
                total = _finish_tile(z, e, e_tile, offset, t, v, exp_scale, total, STORE)
                mbarrier.arrive(turn.index(HALF), count=1)
                finished += 1
                gl.store(sum_ptr + splits.to(gl.int64) * T + r, total, mask=r < T)
        if STORE:
            tma.store_wait(0)

    @gluon.jit(do_not_specialize=BATCH_SIZES)
    def _gluon_logits_kernel(
        x,
        w,
        e,
        offset_ptr,
        sum_ptr,
        T,
        V,
        d,
        blocks_t,
        tiles,
        tiles_per_split,
        group,
        exp_scale,
        STORE: gl.constexpr,
        STAGES: gl.constexpr,
    ):
        ROWS: gl.constexpr = x.block_shape[0]
        BLOCK_D: gl.constexpr = x.block_shape[1]
        BLOCK_V: gl.constexpr = w.block_shape[0]
        xs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, ROWS, BLOCK_D], x.layout)
        ws = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_V, BLOCK_D], w.layout)
        e_tiles = xs
        if STORE:
            e_tiles = gl.allocate_shared_memory(e.dtype, [2, ROWS, BLOCK_V], e.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=2)
        for half in gl.static_range(2):
            mbarrier.init(turn.index(half), count=1)
        fence_async_shared()
        steps = (d + BLOCK_D - 1) // BLOCK_D
        order = (V, steps, blocks_t, tiles, tiles_per_split, group)
        shared = (xs, ws, full, empty)
        results = (turn, e, e_tiles, offset_ptr, sum_ptr, T, exp_scale)
        gl.warp_specialize(
            [
                (_consumer, (0, STORE, shared, results, order)),
                (_consumer, (1, STORE, shared, results, order)),
                (_producer, (x, w, shared, order)),
            ],
            [4, 1],
            [240, 24],
        )


def _descriptor(x, block_rows, block_columns):
    block = [block_rows, block_columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # the same for float16
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def launch(grid, config, x, w, offset, e, total, order, exp_scale):
    """Launch the kernel; arguments as those of logits._logits_kernel with EXP, in 16 bits, every matrix fit
    for a descriptor.

    Args:
        order: (blocks of tokens, tiles, tiles of a split, blocks of a group).
    """
    half, block_v, block_d = config.blocks["BLOCK_T"] // 2, config.blocks["BLOCK_V"], config.blocks["BLOCK_D"]
    w_tiles = _descriptor(w, block_v, block_d)
    _gluon_logits_kernel[grid](
        _descriptor(x, half, block_d),
        w_tiles,
        w_tiles if e is None else _descriptor(e, half, block_v),
        offset,
        total,
        len(x),
        len(w),
        x.shape[1],
        *order,
        exp_scale,
        STORE=e is not None,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        maxnreg=168,  # of 65,536 for 12 warps, until the producer's go to the consumers
    )
