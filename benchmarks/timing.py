"""Time, memory and ceilings on this machine."""

import math
import statistics
import time
from typing import Optional

import torch

# Read before each timed call, several times any L2 cache. (What is written would be written back in the timed
# call's time.)
FLUSH_BYTES = 256 << 20
MAX_FLUSHES = 32
WARM_MS = 50  # of calls before the timed ones: an idle GPU has slow clocks
TIMED_MS, MIN_CALLS, MAX_CALLS = 400, 7, 100  # timed calls: about TIMED_MS in sum


def measure(function) -> tuple[float, float, float]:
    """(median, 20% quantile, 80% quantile) in ms of a call, after calls that compile, tune and warm up.

    On CUDA: events around each call, what was in the L2 cache pushed out before it, for long enough that the
    host has queued all of the call by then: else its pauses would be timed. On the CPU: three calls by the
    clock.
    """
    function()
    if not torch.cuda.is_available():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
        return _quantiles(times)
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")

    def timed(call, count, flushes=1):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            for _ in range(flushes):
                flush.amax()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    flushes = flushes_for(host_time(function), min(timed(flush.amax, 3)))
    estimate = min(timed(function, 2, flushes))
    timed(function, min(MAX_CALLS, int(WARM_MS / estimate)), flushes)
    count = min(MAX_CALLS, max(MIN_CALLS, int(TIMED_MS / estimate)))
    return _quantiles(timed(function, count, flushes))


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), cuts[0], cuts[-1]


def host_time(function) -> float:
    """ms that the host takes to queue a call on the GPU: the least of three."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return min(times)


def flushes_for(host_ms: float, flush_ms: float) -> int:
    """How many flushes last twice as long as the host takes to queue the call behind them; one at least, and
    MAX_FLUSHES at most, since a call that waits for the GPU takes the host long whatever goes before."""
    return min(MAX_FLUSHES, max(1, math.ceil(2 * host_ms / flush_ms)))


def peak_memory(function) -> Optional[int]:
    """Bytes allocated at the peak of a call beyond those allocated before it; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gemm_ceiling() -> Optional[float]:
    """TFLOP/s of an 8192³ bf16 matrix product of random numbers; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    return 2 * 8192**3 / measure(lambda: torch.mm(x, y, out=out))[0] / 1e9


def copy_bandwidth() -> Optional[float]:
    """GB/s, read plus written, of a device-to-device copy of 2 GiB; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / measure(lambda: y.copy_(x))[0] / 1e6


def ceilings() -> dict:
    return {"gemm_tflops": gemm_ceiling(), "copy_gb_per_s": copy_bandwidth()}
