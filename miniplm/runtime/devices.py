"""Where and in what dtype to compute, and how fast this machine multiplies matrices."""

import math
import os
import time

import torch

from .errors import UserError

# Instructions that multiply numbers in bfloat16, as torch.cpu.get_capabilities names them: of x86, of ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def choose_device(device: str) -> torch.device:
    """ "auto" is the GPU if there is one; UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is not known: give auto, cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device!r} is not there, torch sees {torch.cuda.device_count()} GPUs: give --device "
            f"cpu or another"
        )
    return chosen


def choose_dtype(dtype: str, device: torch.device | str) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, dtype)


def cpu_multiplies_bf16() -> bool:
    """Whether torch sees instructions for products in bfloat16 in this CPU; torch 2.10 looks for x86's
    alone."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)


def machine_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; a system without these names
        return None


def peak_flops(device: torch.device) -> float:
    """FLOP/s of a square matrix product, the best of ten: 8192 in bfloat16 on a GPU, 1024 in float32 on the
    CPU."""
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    matrix, best = torch.rand(size, size, dtype=dtype, device=device), math.inf
    for _ in range(10):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
