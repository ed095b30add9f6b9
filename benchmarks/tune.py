"""Time every launch configuration that tuning.py lists for each kernel, at the shapes that matter: which
should be the first, its default?

    python benchmarks/tune.py [--json FILE] [--only KERNEL,KERNEL] [--near]

What wins is moved to the front of its list in tuning.py.

A record: kernel, bucket (what candidates depend on), shape, configuration, and either ms (with ms_low,
ms_high: 20% and 80% quantile) or failed (why). The first configuration of a kernel and bucket is what runs
today. --near: also those that differ from a candidate in one number, doubled or halved (blocks, warps) or one
more or less (stages, programs on a processor); each is compiled first, which takes a second or two. Without
CUDA the toy shapes run in Triton's interpreter: that tests this file, and its figures say nothing else.
"""

import argparse
import json
import os
import sys
from functools import partial

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import harness
from miniplm.kernels import tuning
from timing import measure

from miniplm import kernels

V, T, WIDE = 151_936, 16_384, 65_536
PERSISTENT = ("logsumexp", "exponentials", "rms_norm_backward")  # whose grids follow per_processor


def calls(device, dtype):
    """(shape, a function that makes the inputs and returns the one that launches the kernels) for each shape.
    On the CPU: toys."""
    toy = device == "cpu"

    def new(*sizes, dtype=dtype):
        return torch.randn(sizes, device=device, dtype=dtype)

    def head(name, d, tokens=16 if toy else T, ids=80 if toy else V):
        x, w, targets = new(tokens, d), new(ids, d) * d**-0.5, torch.randint(ids, (tokens,), device=device)
        if name == "log_prob":
            return lambda: kernels.linear_log_prob(x, w, targets)
        x, w = x.requires_grad_(), w.requires_grad_()
        return lambda: kernels.linear_cross_entropy(x, w, targets)

    def attention(heads, kv_heads, D, tokens=48 if toy else T, length=4 if toy else 1024):
        q, k, v = (new(tokens, n, D).requires_grad_() for n in (heads, kv_heads, kv_heads))
        cu_seqlens = torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)
        return backward(lambda: kernels.flash_attention(q, k, v, cu_seqlens, length))

    def backward(function):
        def call():
            out = function()
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])

        return call

    def elementwise(name, d, tokens=5 if toy else WIDE):
        x, w = new(tokens, d).requires_grad_(), new(d).requires_grad_()
        if name == "add_rms_norm":
            stream = new(tokens, d, dtype=torch.float32).requires_grad_()
            return backward(lambda: kernels.add_rms_norm(x, stream, w))
        if name == "swiglu":
            both = new(tokens, 2 * d).requires_grad_()
            return backward(lambda: kernels.swiglu(both))
        if name == "rotary":
            q = new(tokens, d // 64, 64).requires_grad_()
            positions, inv_freq = torch.arange(tokens, device=device), torch.rand(32, device=device)
            return backward(lambda: kernels.apply_rotary(q, q, positions, inv_freq))
        return lambda: kernels.quantize_rows(x.detach())

    widths = [32] if toy else [512, 768, 1024, 1536, 2048]
    for d in widths:
        for name in ("log_prob", "cross_entropy"):
            yield {"op": name, "d": d}, partial(head, name, d)
    # The last has so many documents that one pass is a candidate.
    heads = [(12, 12, 64), (16, 16, 96), (16, 16, 128), (16, 4, 128), (12, 12, 64, WIDE)]
    for shape in [(2, 1, 16)] if toy else heads:
        yield (
            {"op": "attention", **dict(zip(("heads", "kv_heads", "D", "T"), shape, strict=False))},
            partial(attention, *shape),
        )
    for name in ("add_rms_norm", "swiglu", "rotary", "quantize_rows"):
        for d in [64] if toy else [768, 2048]:
            yield {"op": name, "d": d}, partial(elementwise, name, d)


def near(name, config, bucket):
    """Configurations that differ from this one in one number; blocks that must hold a whole row stay."""
    for key, value in config.blocks.items():
        if type(value) is int and not (key == "BLOCK_D" and "width" in bucket):
            yield from (
                config._replace(blocks={**config.blocks, key: number})
                for number in (2 * value, value // 2)
                if number
            )
    yield from (
        config._replace(num_warps=number)
        for number in (2 * config.num_warps, config.num_warps // 2)
        if 1 <= number <= 32
    )
    for key in ("num_stages", "per_processor")[: 1 + (name in PERSISTENT)]:
        yield from (
            config._replace(**{key: number})
            for number in (getattr(config, key) + 1, getattr(config, key) - 1)
            if number
        )


def configurations(name, where, bucket, wide):
    listed = tuning.CANDIDATES[name](where, **bucket)
    found = (
        [*listed, *(other for config in listed for other in near(name, config, bucket))] if wide else listed
    )
    return [config for i, config in enumerate(found) if config not in found[:i]]


class Timer:
    """Stands in for tuning.launch: times all configurations of each kernel, bucket and shape once.

    shape: that of the call under way.
    """

    def __init__(self, report: dict, options):
        self.report, self.options, self.shape, self.seen = report, options, None, set()

    def launch(self, name, run, device, **bucket):
        found = configurations(name, tuning.target(device), bucket, self.options.near)
        key = (name, *sorted(bucket.items()), *self.shape.items())
        # What is launched on condition mostly returns at once: its time says nothing.
        if name in self.options.only and key not in self.seen and not bucket.get("conditional"):
            self.seen.add(key)
            self.report["timings"] += [self.time(name, bucket, config, run) for config in found]
            if self.options.json:
                harness.write_json(self.options.json, self.report)
        return run(found[0])

    def time(self, name, bucket, config, run) -> dict:
        timing = {
            "kernel": name,
            "bucket": bucket,
            "shape": self.shape,
            "blocks": config.blocks,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "per_processor": config.per_processor,
        }
        try:
            ms, low, high = measure(lambda: run(config))
        except Exception as problem:  # too many registers, too much shared memory, anything
            return timing | {"failed": harness.reason(problem)}
        return timing | {"ms": ms, "ms_low": low, "ms_high": high}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the report here, anew after each kernel")
    parser.add_argument(
        "--only",
        metavar="KERNEL,KERNEL",
        type=lambda text: text.split(","),
        default=list(tuning.CANDIDATES),
        help="these kernels alone",
    )
    parser.add_argument("--near", action="store_true", help="also configurations near the candidates")
    options = parser.parse_args()
    if unknown := set(options.only) - set(tuning.CANDIDATES):
        sys.exit(f"--only: no kernel {', '.join(sorted(unknown))}; there are {', '.join(tuning.CANDIDATES)}")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if device == "cpu":
        os.environ["MINIPLM_KERNELS"] = "triton"
    report = {
        "op": "tune",
        "device": device,
        "toy": device == "cpu",
        "environment": harness.environment(),
        "finished": False,
        "timings": [],
    }
    timer = Timer(report, options)
    tuning.launch = timer.launch
    for shape, make in calls(device, dtype):
        print("tune:", harness.describe(shape), file=sys.stderr, flush=True)
        timer.shape = shape
        try:
            make()()
        except Exception as problem:
            report["timings"].append({"shape": shape, "failed": harness.reason(problem)})
    report["finished"] = True
    if options.json:
        harness.write_json(options.json, report)
    print(json.dumps(report["environment"]))
    print(table(report["timings"]))
    if report["toy"]:
        print("toy sizes in Triton's interpreter: a test of this file, not a measurement")
    if any("ms" not in timing for timing in report["timings"] if not options.near):
        sys.exit("some configurations failed")


def table(timings) -> str:
    """A line for each configuration, the fastest of a kernel and shape first, with its time over that of
    today's default."""
    groups, lines = {}, []
    for timing in timings:
        groups.setdefault(
            json.dumps([timing.get("kernel"), timing.get("bucket"), timing["shape"]]), []
        ).append(timing)
    for found in groups.values():
        lines.append(
            f"{found[0].get('kernel')}: {harness.describe(found[0]['shape'])} "
            f"{harness.describe(found[0].get('bucket', {}))}"
        )
        default = found[0].get("ms")
        for timing in sorted(found, key=lambda timing: timing.get("ms", float("inf"))):
            if "kernel" not in timing:
                lines.append(f"    failed: {timing['failed']}")
                continue
            text = harness.describe(
                timing["blocks"] | {key: timing[key] for key in ("num_warps", "num_stages", "per_processor")}
            )
            ratio = f"{timing['ms'] / default:6.3f}" if "ms" in timing and default else "     –"
            figure = f"{timing['ms']:9.4f} ms {ratio}" if "ms" in timing else f"failed: {timing['failed']}"
            lines.append(f"    {figure}  {text}" + "  (default)" * (timing is found[0]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
