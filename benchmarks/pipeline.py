"""`miniplm train` and `miniplm score` from end to end, between chunks in memory and losses or scores, against
what people would use instead.

    python benchmarks/pipeline.py train|score [--json FILE] [--quick] [--only NAME,NAME] [--profile FILE]
    python benchmarks/pipeline.py train --loss-curve STEPS [--json FILE]

miniplm is the project's own core: data.order.global_batch, stages.train's make_optimizer and train_step;
data.batches.pack, analysis.scoring's score_batch; "miniplm fp8" scores as --precision fp8 does, "miniplm
compiled" has its layers compiled by torch (is there a gain?). These are in own.py, the others in peers.py,
models and chunks in workload.py. Batches are made in a background thread, for all contenders alike; where
memory is short, the chunks per batch are halved until they fit.

A record: op, shape (model, chunks per training step or in all, length), dtype, contender, and either skipped
(why it failed) or
    chunks_per_batch      in a micro-batch of training, in a batch of scoring
    tokens_per_second, _low, _high   predictions over time: median, lowest and highest of REPEATS passes that
                          nothing interrupts
    mfu                   FLOPs that the models need (no padding, nothing twice) over time and the GEMM's rate
                          in the same run; null on the CPU
    peak_bytes            GPU memory at the peak of these passes, weights and optimiser included; null on the
                          CPU
    split                 shares of a further, instrumented pass, on the GPU's timeline (on the CPU by the
                          clock): data (waiting for a batch, copying it), forward, head (with its gradients
                          where the forward pass makes them), backward, optimiser (with clipping), other
    error, limit, accurate   before the first update: the loss and all gradients, or the scores, against plain
                          transformers in float64, ‖x − x*‖ / ‖x*‖; at most twice that of plain transformers
                          in the same dtype, plus FLOOR
    agreement             of the scores with miniplm's: Spearman's rank correlation, and the share selected or
                          dropped alike at ratio 0.5
Exit status 1 if miniplm fails or is not accurate.

--loss-curve STEPS: instead of all that, miniplm and plain transformers train a model for so many steps, from
the same weights on the same batches. Exit status 1 if miniplm's losses are more than three times as far as
the other's from those in full precision (root mean square; float32 on a GPU, float64 on the CPU). --profile
FILE: a Chrome trace of one more pass of the first contender. Without CUDA: toys, in float32.
"""

import argparse
import gc
import json
import math
import statistics
import sys

import harness
import own
import peers
import render
import torch
import workload
from workload import Job

from miniplm.config import OptimizerConfig
from miniplm.data.selection import rank_agreement
from miniplm.training import step as training

SHAPES = {
    "train": [{"model": model, "chunks": 64, "length": 1024} for model in ("200M", "104M", "500M", "1.2B")],
    "score": [{"model": "1.8B + 104M", "chunks": 256, "length": 1024}],
    "loss curve": [{"model": "104M", "chunks": 8, "length": 1024}],
}
TOYS = {
    "train": [{"model": "toy", "chunks": 8, "length": 64}],
    "score": [{"model": "larger toy + toy", "chunks": 16, "length": 64}],
    "loss curve": [{"model": "toy", "chunks": 8, "length": 64}],
}
REPEATS = 3  # timed passes
# Chunks per batch to begin with: miniplm's default in tokens; that of the peers, most of whom hold logits.
BATCH = {"cuda": (64, 16), "cpu": (4, 4)}
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


CONTENDERS = {
    harness.OURS: own.ours,
    **peers.PEERS,
    harness.OURS + " fp8": own.float8,
    harness.OURS + " compiled": own.compiled,
}


def truth_and_limits(job: Job, chunks) -> tuple[dict, dict]:
    with peers.plain(job._replace(dtype=torch.float64), 1) as exact:
        truth = workload.results(exact, job, chunks)
    with peers.plain(job, 1) as plain:
        return truth, {
            key: 2 * error + FLOOR[job.dtype]
            for key, error in workload.errors(workload.results(plain, job, chunks), truth).items()
        }


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def contend(name: str, job: Job, chunks, checked, truth: dict, limit: dict, gemm_tflops) -> dict:
    """The figures of one contender, or why there are none."""
    rows = BATCH[job.device][not name.startswith(harness.OURS)]
    while True:
        free()
        try:
            return figures(name, rows, job, chunks, checked, truth, limit, gemm_tflops)
        except torch.OutOfMemoryError as problem:
            if rows == 1:
                return {"skipped": harness.reason(problem)}
            rows //= 2
        except Exception as problem:
            return {"skipped": harness.reason(problem)}


def figures(name: str, rows: int, job: Job, chunks, checked, truth: dict, limit: dict, gemm_tflops) -> dict:
    with CONTENDERS[name](job, rows) as contender:
        error = workload.errors(workload.results(contender, job, checked), truth)
        found, _ = workload.run_pass(contender, job, chunks)
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [workload.run_pass(contender, job, chunks)[1] for _ in range(REPEATS)]
        peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else None
        split = workload.split(contender, job, chunks)
    tokens, needed = sum(len(chunk) - 1 for chunk in chunks), workload.flops(job, chunks)
    return {
        "chunks_per_batch": rows,
        "tokens_per_second": tokens / statistics.median(seconds),
        "tokens_per_second_low": tokens / max(seconds),
        "tokens_per_second_high": tokens / min(seconds),
        "mfu": gemm_tflops and needed / statistics.median(seconds) / gemm_tflops / 1e12,
        "peak_bytes": peak,
        "split": split,
        "error": error,
        "limit": limit,
        "accurate": all(float(error[key]) <= limit[key] for key in limit),
        **({} if job.trains else {"scores": found.double().numpy()}),
    }


# ---- the loss curve ----


def loss_curve(job: Job, per_step: int, steps: int) -> dict:
    chunks = workload.synthetic_chunks(steps * per_step, job, seed=2)
    batches, config = (
        [chunks[step::steps] for step in range(steps)],
        OptimizerConfig(warmup_steps=max(1, steps // 10)),
    )
    rates = [training.learning_rate(step + 1, steps, config) for step in range(steps)]
    full, curves = torch.float64 if job.device == "cpu" else torch.float32, {}
    for name, make, dtype in (
        (harness.OURS, own.ours, job.dtype),
        ("plain", peers.plain, job.dtype),
        ("full precision", peers.plain, full),
    ):
        free()
        with make(job._replace(dtype=dtype), per_step) as contender:
            curves[name] = contender.run(batches, rates)
    exact = curves["full precision"]
    far = {
        name: math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(curve, exact, strict=True)))
        for name, curve in curves.items()
    }
    equal = far[harness.OURS] <= 3 * far["plain"] + 1e-6 * statistics.fmean(exact)
    return {
        "steps": steps,
        "losses": {name: list(map(finite, curve)) for name, curve in curves.items()},
        "distance": {name: finite(distance) for name, distance in far.items()},
        "equal": equal,
    }


def finite(x: float):
    return x if math.isfinite(x) else None


# ---- the run ----


def chunks_of(shape: dict, job: Job):
    """Those of a pass."""
    return workload.synthetic_chunks(shape["chunks"] * (workload.STEPS if job.trains else 1), job, seed=0)


def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", choices=["train", "score"])
    parser.add_argument("--json", metavar="FILE", help="write the report here, anew after each contender")
    parser.add_argument("--quick", action="store_true", help="the first model alone")
    parser.add_argument(
        "--only", metavar="NAME,NAME", type=lambda text: text.split(","), help="these contenders alone"
    )
    parser.add_argument(
        "--loss-curve", metavar="STEPS", type=int, help="instead: the losses of so many training steps"
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="write a trace of one pass of the first contender (.json or .json.gz)",
    )
    options = parser.parse_args()
    names = [name for name in CONTENDERS if options.op == "score" or CONTENDERS[name] is not own.float8]
    if unknown := set(options.only or ()) - set(names):
        sys.exit(
            f"--only: no contender {', '.join(sorted(unknown))} in {options.op}; there are {', '.join(names)}"
        )
    options.only = [name for name in names if not options.only or name in options.only]
    if options.loss_curve and options.op != "train":
        sys.exit("--loss-curve goes with train")
    return options


def job_of(shape: dict, device: str, spread=True) -> Job:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return workload.make_job(shape["model"].split(" + "), device, dtype, shape["length"], spread)


def main():
    options = read_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    op = "loss curve" if options.loss_curve else options.op
    shapes = (SHAPES if device == "cuda" else TOYS)[op]
    report = {
        "op": op,
        "device": device,
        "toy": device == "cpu",
        "only": options.only,
        "environment": harness.environment(),
        "ceilings": harness.ceilings(),
        "finished": False,
        "records": [],
    }
    if options.loss_curve:
        job = job_of(shapes[0], device, spread=False)
        curve = loss_curve(job, shapes[0]["chunks"], options.loss_curve)
        report |= {"shape": shapes[0], "loss_curve": curve, "finished": True}
        write(report, options)
        print(json.dumps({key: curve[key] for key in ("steps", "distance", "equal")}))
        sys.exit(not curve["equal"])
    for shape in shapes[:1] if options.quick else shapes:
        measure_all(report, shape, options)
    report["finished"] = True
    write(report, options)
    finish(report, options)


def write(report: dict, options):
    if options.json:
        harness.write_json(options.json, report)


def measure_all(report: dict, shape: dict, options):
    """The records of all contenders at one shape, the report written after each."""
    job = job_of(shape, report["device"])
    chunks, checked = chunks_of(shape, job), workload.synthetic_chunks(BATCH[job.device][1], job, seed=1)
    truth, limit = truth_and_limits(job, checked)
    own_scores = None
    for name in options.only:
        print(f"{options.op}: {harness.describe(shape)}: {name}", file=sys.stderr, flush=True)
        figures = contend(name, job, chunks, checked, truth, limit, report["ceilings"]["gemm_tflops"])
        scores = figures.pop("scores", None)
        if name == harness.OURS:
            own_scores = scores
        elif own_scores is not None and scores is not None:
            figures["agreement"] = rank_agreement(own_scores, scores)
        dtype = str(job.dtype).removeprefix("torch.")
        report["records"].append(
            {"op": options.op, "shape": shape, "dtype": dtype, "contender": name, **figures}
        )
        write(report, options)


def finish(report: dict, options):
    """Trace and table; exit status 1 where ours failed."""
    ran = [record for record in report["records"] if "skipped" not in record]
    if options.profile and ran:
        profile(options.profile, ran[0], report["device"])
    print(json.dumps({key: report[key] for key in ("environment", "ceilings")}))
    print("\n".join(render.pipeline_table(report)))
    if report["toy"]:
        print("toys on the CPU: a test of this benchmark, not a measurement")
    ours = [record for record in report["records"] if record["contender"] == harness.OURS]
    if bad := [record for record in ours if not record.get("accurate")]:
        names = (f"{record['contender']} ({record['shape']['model']})" for record in bad)
        sys.exit("inaccurate or not run: " + ", ".join(names))


def profile(path: str, record: dict, device: str):
    """A trace of one pass of the contender of this record."""
    free()
    job = job_of(record["shape"], device)
    chunks = chunks_of(record["shape"], job)
    with CONTENDERS[record["contender"]](job, record["chunks_per_batch"]) as contender:
        workload.run_pass(contender, job, chunks)
        with torch.profiler.profile() as trace:
            workload.run_pass(contender, job, chunks)
        trace.export_chrome_trace(path)


if __name__ == "__main__":
    main()
