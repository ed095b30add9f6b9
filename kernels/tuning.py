"""Launch configurations: the block sizes, warps and stages of every kernel, per bucket of shapes and GPU.

A launcher asks `launch(name, run, **bucket)`, which calls run(config) with one stated configuration: the
first of CANDIDATES[name](target, **bucket). A bucket holds only what changes the choice (widths, element
size, head dimension), never a packed length, so nothing is tuned anew when that changes. MINIPLM_AUTOTUNE=1
times all candidates at a bucket's first launch and keeps the fastest; which one it is may differ from run to
run, and with it the last bits of results. Where a CUDA graph is being captured, or memory does not suffice to
time them, it is the first.

benchmarks/compile_report.py compiles every candidate without a GPU: a new kernel gets there by its entry here
and by the examples that its launcher is registered with (see dispatch.triton).
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, TypeVar, Union

import torch

Result = TypeVar("Result")


class Target(NamedTuple):
    """What a kernel is compiled for."""

    backend: str  # cuda, hip, or cpu (Triton's interpreter)
    arch: Union[int, str]  # 80, 90, … or "gfx942"
    processors: int  # streaming multiprocessors, or compute units

    @property
    def descriptors(self) -> bool:
        """Whether tiles come through host tensor descriptors: TMA, on NVIDIA's data centre GPUs from Hopper
        on. (Consumer GPUs from 120 on have it too, but neither the shared memory nor the matrix instructions
        that the large tiles are for.) The interpreter takes both ways."""
        if self.backend == "cuda":
            return 90 <= int(self.arch) < 120
        return self.backend == "cpu"


class Config(NamedTuple):
    """One launch configuration."""

    blocks: dict  # the kernel's constexpr block sizes
    num_warps: int = 4
    num_stages: int = 2
    per_processor: int = 1  # programs of a persistent grid on each processor
    registers: Optional[int] = None  # the most a thread may take: fewer, and more programs fit

    @property
    def options(self) -> dict:
        """Keyword arguments for the kernel."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


OFFLINE: Optional[Target] = None  # to compile for, without a GPU: then launch runs every candidate
INTERPRETER = Target("cpu", 0, 4)
_FASTEST: dict[tuple, Config] = {}  # (name, target, bucket) → found under MINIPLM_AUTOTUNE=1


def target(device: torch.device) -> Target:
    """What kernels on tensors of `device` are compiled for."""
    if OFFLINE:
        return OFFLINE
    if device.type == "cpu":
        return INTERPRETER
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(name: str, run: Callable[[Config], Result], device: torch.device, **bucket: Any) -> Result:
    """run(config) with the configuration of kernel `name` for a bucket; returns what it returns.

    Args:
        run: launches the kernel; called several times while configurations are compared, so it must not
            change its inputs.
        bucket: numbers that candidates depend on.
    """
    where = target(device)
    candidates = CANDIDATES[name](where, **bucket)
    if OFFLINE:
        results = [run(config) for config in candidates]
        return results[0]
    if len(candidates) == 1 or os.environ.get("MINIPLM_AUTOTUNE") != "1" or where.backend == "cpu":
        return run(candidates[0])
    key = (name, where, *sorted(bucket.items()))
    if key not in _FASTEST:
        if torch.cuda.is_current_stream_capturing():  # timing would wait, which capturing forbids
            return run(candidates[0])
        _FASTEST[key] = _time(candidates, run)
    return run(_FASTEST[key])


def _time(candidates: list[Config], run: Callable[[Config], Any]) -> Config:
    """The fastest; the first where there is no memory to time them in."""
    from triton.testing import do_bench

    try:
        return min(candidates, key=lambda config: do_bench(lambda: run(config), return_mode="median"))
    except torch.OutOfMemoryError:
        warnings.warn(
            "MINIPLM_AUTOTUNE: no GPU memory left to time configurations in, the stated ones are used",
            stacklevel=2,
        )
        return candidates[0]


def _logits(where: Target, itemsize: int, descriptors: bool, conditional: bool = False) -> list[Config]:
    """GEMM-shaped kernels over [BLOCK_T, BLOCK_V] tiles of logits with an accumulator tile in registers. What
    is launched on condition mostly returns at once: there is nothing to time."""
    blocks = lambda tokens, vocabulary, width: {"BLOCK_T": tokens, "BLOCK_V": vocabulary, "BLOCK_D": width}
    if where.backend == "cpu":
        return [Config(blocks(32, 64, 32))]
    if itemsize == 4:  # no matrix unit computes exact float32 products: small tiles
        # Two stages spill on sm_80 where a maximum is looked for, which is on condition.
        return [Config(blocks(64, 32, 16), 8, 1 if conditional else 2, per_processor=2)]
    if where.backend == "hip":
        found = [Config(blocks(128, 128, 64), 8, 2), Config(blocks(128, 128, 32), 8, 2)]
    elif descriptors:
        found = [
            Config(blocks(128, 256, 64), 8, 4),
            Config(blocks(128, 256, 64), 8, 3),
            Config(blocks(128, 128, 64), 4, 3, per_processor=2),
        ]
    else:
        found = [Config(blocks(128, 128, 32), 8, 3), Config(blocks(128, 128, 32), 8, 4)]
    return found[:1] if conditional else found


def _blackwell(where: Target) -> bool:
    """Where some of the tiles that Hopper holds in registers spill, and take more shared memory."""
    return where.backend == "cuda" and int(where.arch) >= 100


def _exponentials(where: Target, itemsize: int, descriptors: bool, conditional: bool = False) -> list[Config]:
    """As _logits, with a tile of the result in shared memory on its way out."""
    if not (descriptors and where.backend == "cuda" and itemsize == 2):
        return _logits(where, itemsize, descriptors, conditional)
    wide = {"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_D": 64}
    narrow = {**wide, "BLOCK_V": 128}
    stages = 2 if _blackwell(where) else 3  # there the sums pass through shared memory too
    found = [Config(wide, 8, stages), Config(narrow, 8, 4), Config(narrow, 4, 2, per_processor=2)]
    return found[:1] if conditional else found


def _queries_and_keys(
    queries: int, keys: int, num_warps: int, num_stages: int, registers: Optional[int] = None
) -> Config:
    return Config({"BLOCK_M": queries, "BLOCK_N": keys}, num_warps, num_stages, registers=registers)


def _attention(where: Target, dim: int, itemsize: int, descriptors: bool) -> list[Config]:
    """Tiles of queries that walk over keys. On Hopper up to D = 96, 128 · 64 leaves room for two programs,
    four warp groups, on a processor: the exponentials of one run under the products of another. Fewer queries
    a tile ask more keys of L2 than it delivers."""
    if where.backend == "cpu":
        return [_queries_and_keys(32, 16, 4, 1)]
    if itemsize == 4:  # no matrix unit computes exact float32 products: their operands fill the registers
        return [_queries_and_keys(32, 32, 8, 1) if dim <= 64 else _queries_and_keys(16, 16, 8, 1)]
    if dim > 128:
        return [_queries_and_keys(64, 64 if descriptors else 32, 8, 1)]
    if where.backend == "hip":
        return [_queries_and_keys(128, 64, 4, 1), _queries_and_keys(128, 32, 4, 1)]
    if not descriptors:
        return [_queries_and_keys(128, 64, 8, 2), _queries_and_keys(64, 64, 4, 2)]
    if dim > 96:
        return [
            _queries_and_keys(128, 128, 8, 3),
            _queries_and_keys(128, 128, 8, 2),
            _queries_and_keys(128, 64, 8, 3),
        ]
    if _blackwell(where):
        found = [_queries_and_keys(128, 64, 8, 3), _queries_and_keys(128, 128, 8, 2)]
        return found if dim <= 64 else found[1:]
    found = [_queries_and_keys(128, 64, 8, 3, registers=128), _queries_and_keys(128, 128, 8, 2)]
    if dim > 32:
        found.append(_queries_and_keys(64, 64, 4, 3))
    return found


def _attention_dq(where: Target, dim: int, itemsize: int, descriptors: bool) -> list[Config]:
    """As _attention, with two tiles of scores in registers. Of two stages the second is loaded only after the
    first is used up: the loop waits for it."""
    if where.backend == "cpu":
        return [_queries_and_keys(32, 32, 4, 1)]
    if itemsize == 4:
        return [_queries_and_keys(16, 16, 8, 1)]
    if dim > 128:  # spills registers, as the next function does
        return [_queries_and_keys(64, 32, 8, 1)]
    if not descriptors:
        return [_queries_and_keys(128, 32, 8, 1), _queries_and_keys(64, 32, 4, 1)]
    limit = 128 if dim <= 64 else None  # as in _attention: two programs on a processor
    found = [_queries_and_keys(128, 64, 8, 3, limit), _queries_and_keys(128, 64, 8, 2, limit)]
    if _blackwell(where):
        return found[:1]
    if dim <= 64:
        found.append(_queries_and_keys(128, 128, 8, 2))
    return found


def _attention_dkdv(where: Target, dim: int, itemsize: int, descriptors: bool, grouped: bool) -> list[Config]:
    """Tiles of keys that walk over queries. Two sums [BLOCK_N, D] in registers leave room for 64 queries, at
    D = 128 for 32 in groups; without descriptors at D = 64 for 32."""
    if where.backend == "cpu":
        return [_queries_and_keys(16, 32, 4, 1)]
    if itemsize == 4:
        return [_queries_and_keys(16, 16, 8 if descriptors else 4, 1)]
    if dim > 128:
        return [_queries_and_keys(32, 64 if descriptors else 32, 8, 1)]
    if not descriptors:
        if dim <= 64:
            return [_queries_and_keys(64 if dim <= 32 else 32, 64, 4, 1)]
        return [_queries_and_keys(16, 64, 4, 1) if dim <= 96 else _queries_and_keys(32, 64, 8, 1)]
    queries = 32 if grouped and dim > 96 else 64
    found = [
        _queries_and_keys(queries, 128, 8, 3),
        _queries_and_keys(queries, 128, 8, 2),
        _queries_and_keys(queries, 64, 4, 2),
    ]
    if _blackwell(where):
        return found[2:] if grouped and dim > 96 else found[1:]
    if dim == 64:  # two programs on a processor
        found.append(_queries_and_keys(queries, 64, 4, 3))
    return found


def _attention_passes(where: Target, dim: int, itemsize: int, many: bool) -> list[Config]:
    """The backward pass in two passes, or for many documents in one. Which is faster no GPU has said yet. One
    spills registers above D = 64, and on other GPUs than Hopper."""
    found = [Config({"PASSES": 2})]
    hopper = where.backend == "cuda" and 90 <= int(where.arch) < 100
    if many and dim <= 64 and ((hopper and itemsize == 2) or where.backend == "cpu"):
        found.append(Config({"PASSES": 1}))
    return found


def _attention_single(where: Target, dim: int, itemsize: int, descriptors: bool) -> list[Config]:
    """Tiles of keys that walk over queries. Two sums [BLOCK_N, D] are in registers; the queries' comes and
    goes with each tile of keys, so these are large. BLOCK_N is a multiple of BLOCK_M."""
    if where.backend == "cpu":
        return [_queries_and_keys(16, 32, 4, 1)]
    if itemsize == 4:
        return [_queries_and_keys(16, 16, 8, 1)]
    if not descriptors:
        return [_queries_and_keys(64, 64, 8, 1) if dim <= 64 else _queries_and_keys(32, 64, 8, 1)]
    if dim > 64:
        return [_queries_and_keys(64, 64, 8, 2)]
    return [_queries_and_keys(64, 128, 8, 3), _queries_and_keys(64, 128, 8, 2)]


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _whole_rows(elements: int, width: int) -> dict[str, int]:
    """Blocks of whole rows: about `elements` elements, one row at least."""
    block = max(16, _next_power_of_2(width))
    return {"BLOCK_R": max(1, elements // block), "BLOCK_D": block}


def _rms_norm(where: Target, width: int, itemsize: int) -> list[Config]:
    """Memory-bound: 8 KiB of each input in flight per program, 64 bytes a thread; a wide row gets more
    threads."""
    if where.backend == "cpu":
        return [Config({**_whole_rows(1, width), "BLOCK_R": 4})]
    blocks = [_whole_rows(size // itemsize, width) for size in (8192, 4096)]
    return [Config(each, min(16, max(4, each["BLOCK_R"] * each["BLOCK_D"] // 1024))) for each in blocks]


def _rms_norm_backward(where: Target, width: int, itemsize: int) -> list[Config]:
    """Up to three inputs of 4 KiB in flight per program, four programs of 4 warps on a processor; the sum for
    dw is in registers."""

    def config(elements: int) -> Config:
        blocks = _whole_rows(elements, width)
        warps = min(16, max(4, blocks["BLOCK_R"] * blocks["BLOCK_D"] // 512))
        per_processor = max(1, 16 // warps)
        together = blocks["BLOCK_D"] <= 8192  # beyond, registers do not hold the row and the sum
        return Config({**blocks, "SUM": together}, warps if together else 32, per_processor=per_processor)

    if where.backend == "cpu":
        return [Config({**_whole_rows(1, width), "BLOCK_R": 4, "SUM": width < 500})]
    found = [config(4096 // itemsize), config(8192 // itemsize)]
    if _blackwell(where):
        return found[1:]  # the other one spills 8 bytes for some arguments
    return found if where.descriptors else found[:1]  # as the second does on sm_80


def _rotary(where: Target, dim: int, itemsize: int) -> list[Config]:
    """Memory-bound; eight heads share a sine and a cosine, or these would take longer than the memory."""
    if where.backend == "cpu":
        return [Config({"BLOCK_T": 16, "BLOCK_H": 3})]
    tokens = max(8, 1024 // _next_power_of_2(dim // 2))  # eight pairs a thread: 16 bytes per access
    return [
        Config({"BLOCK_T": tokens, "BLOCK_H": 8}),
        Config({"BLOCK_T": 2 * tokens, "BLOCK_H": 8}),
        Config({"BLOCK_T": tokens, "BLOCK_H": 16}),
    ]


def _swiglu(where: Target, itemsize: int) -> list[Config]:
    """Memory-bound: tiles of 512-byte pieces of rows, several 16-byte accesses a thread and tensor; 256
    divides most widths well."""
    if where.backend == "cpu":
        return [Config({"BLOCK_R": 4, "BLOCK_F": 64})]
    heights = (16, 8) if itemsize == 2 else (4,)
    return [Config({"BLOCK_R": rows, "BLOCK_F": 256}) for rows in heights]


def _divergence(where: Target, itemsize: int) -> list[Config]:
    """Two tiles of logits at a time, hardly ever launched in earnest."""
    if where.backend == "cpu" or itemsize == 4:
        return [Config({"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_D": 16}, 4)]
    return [Config({"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_D": 64}, 4)]


CANDIDATES: dict[str, Callable[..., list[Config]]] = {
    "logsumexp": _logits,
    "exponentials": _exponentials,
    "divergence": _divergence,
    "attention": _attention,
    "attention_dq": _attention_dq,
    "attention_dkdv": _attention_dkdv,
    "attention_passes": _attention_passes,
    "attention_single": _attention_single,
    "quantize_rows": _rms_norm,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu,
}

# gluon_logits.py, without and with E: the warps are a consumer's; a stage of the ring takes 48 KiB of 227,
# E's tile 64.
_GLUON_BLOCKS = {"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_D": 64}
GLUON: dict[str, Config] = {
    "logsumexp": Config(_GLUON_BLOCKS, 4, 4),
    "exponentials": Config(_GLUON_BLOCKS, 4, 3),
}
