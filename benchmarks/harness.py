"""What the benchmarks of the ops share: time, memory, ceilings, errors, and a run that loses nothing.

A benchmark file is shapes, contenders and one call:

    def cases(shape, device, dtype):  # yields a Case per pass; the inputs live as long as its frame
        x, weight = ...
        def plain():  # prepare: imports, needs memory, compiles; returns the callable that is timed
            return lambda: torch.nn.functional.rms_norm(x, weight.shape, weight)
        def errors(out):
            return {"out": relative_error(out, truth)}
        yield Case("forward", {"plain": plain, ...}, bytes=..., errors=errors)

    if __name__ == "__main__":
        shapes = [{"T": 16384, "d": 512}, ...]
        run("rms_norm", __doc__, cases, shapes, quick=[...], toy=[...], baseline="plain", by="d")

(Import harness before miniplm: it finds the package in a checkout that is not installed.)

    python benchmarks/FILE.py [--json FILE] [--plot FILE] [--quick] [--only NAME,NAME]

A contender that raises (Skip, ImportError, out of memory, anything) is recorded as {"skipped": reason}; the
run goes on. Its callable returns a tensor, a sequence of tensors, or None where there is nothing to compare.
Contenders whose name begins with "miniplm" must run, be compared and be accurate, or the exit status is 1.
What they ran is in environment.triton_ops: an op that is not there has no Triton kernel, and its figures on a
GPU are those of the PyTorch reference.
Without CUDA the toy shapes run on the CPU in float32: that tests the benchmark, and its figures say nothing
else.

A record: op, shape, dtype, pass, contender, and either skipped or
    ms, ms_low, ms_high  median, 20% and 80% quantile of the timed calls
    host_ms              time in which the host queues a call: where it is above ms, the host is the slower
                         one in a run ("host-bound" in the table); null on the CPU
    tflops, gb_per_s     FLOPs and bytes of the case over ms: what the operation needs, not what the contender
                         does
    percent_of_ceiling   of the bf16 GEMM's rate where the case has FLOPs, else of the copy's, both measured
                         in the same run
    extra_bytes          peak_memory less the results (gradients are results); null on the CPU
    error, accurate      relative errors against float64 by name ("inf": not finite), and whether all are
                         within LIMITS; null: not compared
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from report import OURS, describe, plot, table, write_json
from timing import ceilings, host_time, measure, peak_memory

ROOT = Path(__file__).resolve().parent.parent
try:
    import miniplm.kernels
except ImportError:  # a checkout that is not installed: do what setup.py's package_dir does
    sys.path.append(str(ROOT))
    import miniplm

    miniplm.__path__.append(str(ROOT))
    import miniplm.kernels

LIMITS = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}  # largest relative error of a right result
PACKAGES = ("triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn")
PACKAGES += ("flash-attn-3", "nvidia-cutlass-dsl")


class Skip(Exception):
    """Raised by a contender that cannot run here; the text says why."""


class Case(NamedTuple):
    """One pass of one shape."""

    name: str  # forward, backward, both
    contenders: dict[str, Callable[[], Callable]]  # name → prepare
    flops: float = 0
    bytes: float = 0
    errors: Optional[Callable] = None  # result of a contender → {name: relative_error}


def environment() -> dict:
    """Where and with what the figures are measured."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "MINIPLM_KERNELS": os.environ.get("MINIPLM_KERNELS", "auto"),
        "triton_ops": sorted(miniplm.kernels.dispatch.TRITON),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        found |= {"device": "cpu", "threads": torch.get_num_threads()}
    try:
        found["commit"] = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = None
    return found


def need_memory(size: float):
    """Skip unless `size` bytes of GPU memory are free; on the CPU, where only toys run, they are."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if size > free:
            raise Skip(f"needs about {size / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free")


def relative_error(result, truth) -> float:
    """‖result − truth‖ / ‖truth‖ in float64; inf where the shapes differ or it is not finite."""
    if result.shape != truth.shape:
        return math.inf
    error = float((result.detach().double() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else math.inf


def reason(problem: Exception) -> str:
    """Why a contender was skipped, in one line: whatever a peer raises is its reason."""
    text = str(problem) if isinstance(problem, Skip) else f"{type(problem).__name__}: {problem}"
    return " ".join(text.split())[:300]


def contend(case: Case, name: str, dtype: torch.dtype, ceilings: dict) -> dict:
    """The figures of one contender, or why there are none."""
    try:
        function = case.contenders[name]()
        result = function()
        errors = case.errors(result) if case.errors and result is not None else {}
        result_bytes = sum(x.nbytes for x in ([result] if isinstance(result, torch.Tensor) else result or ()))
        del result
        peak = peak_memory(function)
        ms, low, high = measure(function)
        host_ms = host_time(function) if torch.cuda.is_available() else None
    except Exception as problem:
        return {"skipped": reason(problem)}
    tflops, gb_per_s = case.flops / ms / 1e9 or None, case.bytes / ms / 1e6 or None
    rate, ceiling = (tflops, ceilings["gemm_tflops"]) if tflops else (gb_per_s, ceilings["copy_gb_per_s"])
    return {
        "ms": ms,
        "ms_low": low,
        "ms_high": high,
        "host_ms": host_ms,
        "tflops": tflops,
        "gb_per_s": gb_per_s,
        "percent_of_ceiling": 100 * rate / ceiling if rate and ceiling else None,
        "extra_bytes": None if peak is None else max(0, peak - result_bytes),
        "error": {key: error if math.isfinite(error) else "inf" for key, error in errors.items()},
        "accurate": all(error <= LIMITS[dtype] for error in errors.values()) if errors else None,
    }


def _options(description: str, baseline: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the report here, anew after each contender")
    parser.add_argument(
        "--plot", metavar="FILE", help=f"draw the times over those of {baseline} (needs matplotlib)"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument(
        "--only", metavar="NAME,NAME", type=lambda text: text.split(","), help="these contenders alone"
    )
    return parser.parse_args()


def run(
    op: str,
    description: str,
    cases,
    shapes: list[dict],
    quick: list[dict],
    toy: list[dict],
    baseline: str,
    by: str,
):
    """Read the options, measure every contender of every Case of every shape, print the table, exit 1 if ours
    is inaccurate or did not run.

    Args:
        cases: (shape, device, dtype) → the Cases of the shape. shapes, quick, toy: what runs by default, with
            --quick, and without CUDA.
        baseline: the contender whose time the others' are divided by. by: the size on the plot's horizontal
            axis.
    """
    options = _options(description, baseline)
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    report = {
        "op": op,
        "device": "cuda" if on_gpu else "cpu",
        "toy": not on_gpu,
        "only": options.only,
        "baseline": baseline,
        "by": by,
        "environment": environment(),
        "ceilings": ceilings(),
        "finished": False,
        "records": [],
    }
    chosen = (quick if options.quick else shapes) if on_gpu else toy
    known = _measure_all(report, cases, chosen, options)
    report["finished"] = True
    if options.json:
        write_json(options.json, report)
    print(json.dumps({key: report[key] for key in ("environment", "ceilings")}))
    print(table(report))
    if not on_gpu:
        print("toy sizes on the CPU: a test of this benchmark, not a measurement")
    if options.plot:
        plot(report, options.plot, by)
    if unknown := set(options.only or ()) - known:
        sys.exit(f"--only: no contender {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    ours = [record for record in report["records"] if record["contender"].startswith(OURS)]
    if bad := [record for record in ours if not record.get("accurate")]:
        names = {f"{record['contender']} ({record['pass']})" for record in bad}
        sys.exit("inaccurate or not run: " + ", ".join(sorted(names)))


def _measure_all(report: dict, cases, shapes: list[dict], options) -> set[str]:
    """Fill report["records"], written after each contender; returns the names of all contenders there are."""
    dtype, known = torch.bfloat16 if report["device"] == "cuda" else torch.float32, set()
    for shape in shapes:
        for case in cases(shape, report["device"], dtype):
            known |= set(case.contenders)
            for name in case.contenders:
                if options.only and name not in options.only:
                    continue
                print(f"{report['op']}: {describe(shape)}: {case.name}: {name}", file=sys.stderr, flush=True)
                record = {
                    "op": report["op"],
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": case.name,
                    "contender": name,
                }
                report["records"].append(record | contend(case, name, dtype, report["ceilings"]))
                if options.json:
                    write_json(options.json, report)
    return known
