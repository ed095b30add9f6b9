"""Compile every Triton kernel of the package, in every configuration that tuning.py can choose, with no GPU,
and look at the result.

Every launcher runs on its own examples (see dispatch.triton) with tensors that have no storage, and each
launch of a kernel only compiles it, exactly as it would be compiled there: a kernel added later is covered by
being registered. A row per kernel and variant: registers a thread, bytes spilled, bytes of shared memory,
matrix and TMA instructions. It ends with exit status 1 where

    a kernel does not compile, or is never launched by any example (its name ends in _kernel)
    it needs more shared memory than the GPU has
    and on NVIDIA GPUs: it spills registers; it multiplies 16-bit tiles without the GPU's own matrix
    instructions (wgmma on sm_90); or the assembler makes its wgmma instructions wait for one another

    python benchmarks/compile_report.py [--arch sm_90] [--op NAME] [--json FILE]
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # the compiler is what is looked at

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness  # noqa: F401 (finds the package in a checkout that is not installed)
import torch
import triton
from miniplm.kernels import dispatch, tuning
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# name → (backend, arch, processors, bytes of shared memory a program may have, the instruction that
# multiplies matrices)
TARGETS = {
    "sm_80": ("cuda", 80, 108, 163 << 10, "mma.sync"),
    "sm_89": ("cuda", 89, 128, 99 << 10, "mma.sync"),
    "sm_90": ("cuda", 90, 132, 227 << 10, "wgmma.mma_async"),
    "sm_100": ("cuda", 100, 148, 227 << 10, "tcgen05.mma"),
    "sm_120": ("cuda", 120, 170, 99 << 10, "mma.sync"),
    "gfx942": ("hip", "gfx942", 304, 64 << 10, "v_mfma"),
}
BY_DEFAULT = ("sm_80", "sm_90", "sm_100", "gfx942")  # the others' few spills are known: docs/facts.md
HOPPER_ONLY = (
    "gluon_logits._gluon_logits_kernel",
    "attention_backward_single._rows_kernel",
    "attention_backward_single._single_kernel",
)
COLUMNS = ("op", "kernel", "variant", "registers", "spilled", "shared", "matrix", "tma", "broken")


class NoGPU:
    """As much of a Triton driver as compiling takes. Compiled kernels are kept per device, so each target is
    one."""

    def __init__(self, name):
        backend, arch, *_ = TARGETS[name]
        self.target, self.device = (
            GPUTarget(backend, arch, 32 if backend == "cuda" else 64),
            list(TARGETS).index(name),
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return None


def make(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache  # which keeps the rule: it ends with its library
def teach_shapes():
    """Sums of products with an output dtype on tensors without storage: PyTorch before 2.13 takes the rule of
    another variant's arguments for them, and fails."""
    total, factor = make(16, 16, dtype=torch.float32), make(16, 16)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except TypeError:
        rules = torch.library.Library("aten", "IMPL", "Meta")
        rules.impl("addmm.dtype_out", lambda *_, out, **options: out, allow_override=True)
        return rules


def compile_op(name: str, op: str) -> list[dict]:
    """The rows of all kernels that an op's launcher launches on its examples, for the target `name`."""
    teach_shapes()
    backend, arch, processors, *_ = TARGETS[name]
    driver.set_active(NoGPU(name))
    tuning.OFFLINE = tuning.Target(backend, arch, processors)
    rows, seen, run = [], set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            dtype = re.search(
                "bf16|fp16|fp32", str(kernel.src.signature)
            )  # of the first tensor that is not of integers
            variant = {"dtype": dtype.group() if dtype else "", **constants(self, args, options)}
            rows.append(
                {
                    "arch": name,
                    "op": op,
                    "kernel": full_name(self),
                    "variant": variant,
                    "hash": kernel.hash,
                    **resources(name, kernel),
                }
            )
        return kernel

    JITFunction.run = compile_only
    try:
        for example in dispatch.EXAMPLES[op](make):
            try:
                dispatch.TRITON[op](*example)
            except Exception as error:  # the compiler raises anything
                rows.append(
                    {
                        "arch": name,
                        "op": op,
                        "kernel": "",
                        "variant": {},
                        "broken": [f"{type(error).__name__}: {str(error)[:2000]}"],
                    }
                )
    finally:
        JITFunction.run, tuning.OFFLINE = run, None
    return rows


def full_name(function) -> str:
    return f"{function.module.rpartition('.')[2]}.{function.__name__}"


def constants(function, args, options) -> dict:
    """The compile-time arguments of a launch, warps and stages among them."""
    named = {**dict(zip(function.arg_names, args, strict=False)), **options}
    chosen = [function.arg_names[i] for i in function.constexprs] + ["num_warps", "num_stages"]
    return {key: named[key] for key in chosen if key in named}


def resources(name: str, kernel) -> dict:
    """What a compiled kernel needs, and which limits it breaks."""
    *_, most_shared, instruction = TARGETS[name]
    text, broken = kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"], []
    if "ptx" in kernel.asm:
        log = assemble(name, text)
        found = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
        row = {key: int(re.search(pattern, log).group(1)) for key, pattern in found.items()}
        if "wgmma.mma_async instructions are serialized" in log:
            broken.append("wgmma serialized")
        if row["spilled"]:
            broken.append("spills")
    else:
        row = {
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)),
            "spilled": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1)),
        }
    row |= {
        "shared": kernel.metadata.shared,
        "matrix": text.count(instruction),
        "tma": text.count("cp.async.bulk.tensor"),
    }
    if row["shared"] > most_shared:
        broken.append(f"shared memory above {most_shared}")
    if re.search(r"tt\.dot .*tensor<\S+xb?f16", kernel.asm.get("ttir", "")) and not row["matrix"]:
        broken.append(f"no {instruction}")
    return {**row, "broken": broken}


def assemble(name: str, ptx: str) -> str:
    """What NVIDIA's assembler says of a kernel."""
    arch = TARGETS[name][1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        result = subprocess.run(
            [
                get_ptxas(arch).path,
                "-v",
                f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
                file.name,
                "-o",
                os.devnull,
            ],
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stderr


def all_kernels() -> set[str]:
    """The names of all kernels of the package: what is jitted and ends in _kernel."""
    modules = [module for key, module in sys.modules.items() if key.startswith("miniplm.kernels.")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {full_name(function) for function in found if function.__name__.endswith("_kernel")}


def report(archs, ops=None) -> list[dict]:
    """Rows for all ops (or those given) on all targets given, and one for each kernel that no example
    launches."""
    jobs = [(arch, op) for arch in archs for op in ops or sorted(dispatch.TRITON)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count()), mp_context=get_context("spawn")) as pool:
        rows = [row for found in pool.map(compile_op, *zip(*jobs, strict=True)) for row in found]
    if not ops:
        for arch in archs:
            launched = {row["kernel"] for row in rows if row["arch"] == arch}
            hopper_only = () if arch == "sm_90" else HOPPER_ONLY
            for kernel in sorted(all_kernels() - launched - set(hopper_only)):
                rows.append(
                    {
                        "arch": arch,
                        "op": "",
                        "kernel": kernel,
                        "variant": {},
                        "broken": ["no example launches it"],
                    }
                )
    return rows


def show(rows):
    table = [COLUMNS]
    for row in rows:
        variant = " ".join(
            f"{key}={value}" if key != "dtype" else value for key, value in row["variant"].items()
        )
        cells = {**row, "variant": variant, "broken": "; ".join(row["broken"]).split("\n")[0]}
        table.append(tuple(str(cells.get(column, "")) for column in COLUMNS))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        action="append",
        choices=list(TARGETS),
        help=f"for this GPU (may be repeated); default: {', '.join(BY_DEFAULT)}",
    )
    parser.add_argument(
        "--op", action="append", choices=sorted(dispatch.TRITON), help="only this op (may be repeated)"
    )
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    rows = report(options.arch or BY_DEFAULT, options.op)
    for arch in options.arch or BY_DEFAULT:
        print(f"\n{arch} (Triton {triton.__version__})")
        show([row for row in rows if row["arch"] == arch])
    if options.json:
        Path(options.json).write_text(
            json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n"
        )
    for row in rows:
        if row["broken"]:
            print(
                f"{row['arch']} {row['kernel']} {row['variant']}: {'; '.join(row['broken'])}", file=sys.stderr
            )
    sys.exit(any(row["broken"] for row in rows))


if __name__ == "__main__":
    main()
