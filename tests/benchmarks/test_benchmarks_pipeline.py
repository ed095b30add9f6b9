"""The pipeline's benchmark: it runs at toy size with each contender, what computes something else is seen,
and what it writes is rendered."""

import contextlib
import gzip
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import own  # noqa: E402
import peers  # noqa: E402
import pipeline  # noqa: E402
import workload  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the benchmarks run at full size"
)
OPS = ("train", "score")
TOYS = {"train": ["toy"], "score": ["larger toy", "toy"]}


def make(op, dtype=torch.float32):
    """(job, chunks of a pass, chunks to check, truth, limits) of the toy shape."""
    job = workload.make_job(TOYS[op], "cpu", dtype, 64, spread=True)
    chunks, checked = (
        workload.synthetic_chunks(count, job, seed) for seed, count in enumerate((4 * workload.STEPS, 8))
    )
    return job, chunks, checked, *pipeline.truth_and_limits(job, checked)


@pytest.fixture(scope="module")
def inputs():
    return {op: make(op) for op in OPS}


def contend(name, inputs):
    return pipeline.contend(name, *inputs, gemm_tflops=0.01)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *map(str, arguments)])
    pipeline.main()


def changed(contender, change):
    """The contender, its results changed."""

    @contextlib.contextmanager
    def wrong(job, rows):
        with contender(job, rows) as inner:
            yield inner._replace(run=lambda *work: change(inner, inner.run(*work)))

    return wrong


def check_figures(op, record):
    assert (
        record["error"].keys()
        == record["limit"].keys()
        == ({"loss", "gradient"} if op == "train" else {"scores"})
    )
    if record["contender"] == "miniplm fp8":
        assert record["accurate"] is False and 1e-4 < record["error"]["scores"] < 0.1
    else:
        assert record["accurate"] is True and all(
            0 <= error <= record["limit"][key] < 1e-5 for key, error in record["error"].items()
        )
    agreement = record.get("agreement")
    assert (agreement is None) == (op == "train" or record["contender"] == "miniplm")
    assert not agreement or (
        agreement["rows"] == 16 and agreement["spearman"] > 0.9 and agreement["equal_selections"] > 0.8
    )
    assert (
        0 < record["tokens_per_second_low"] <= record["tokens_per_second"] <= record["tokens_per_second_high"]
    )
    assert record["mfu"] is record["peak_bytes"] is None
    parts = {"data", "other"} | (
        {"forward and head"} if record["contender"] == "transformers" else {"forward", "head"}
    )
    assert record["split"].keys() == parts | ({"backward", "optimiser"} if op == "train" else set())
    assert all(share > 0 for part, share in record["split"].items() if part != "other")
    assert sum(record["split"].values()) == pytest.approx(1) and -0.01 < record["split"]["other"] < 0.5


@pytest.mark.parametrize("op", OPS)
def test_it_runs_at_toy_size(op, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/pipeline.py",
            op,
            "--json",
            tmp_path / "report.json",
            "--profile",
            tmp_path / "trace.json.gz",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "toys on the CPU" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["op"], report["device"], report["toy"], report["finished"]) == (op, "cpu", True, True)
    ours = ["miniplm fp8", "miniplm compiled"] if op == "score" else ["miniplm compiled"]
    assert [record["contender"] for record in report["records"]] == [
        "miniplm",
        "authors",
        "transformers",
        "liger",
        *ours,
    ]
    for record in report["records"]:
        assert record["contender"] in done.stdout
        if "skipped" in record:
            reason = {"liger": "liger_kernel", "miniplm fp8": "precision fp8 does not run here"}
            assert reason[record["contender"]] in record["skipped"]
            assert "did not run" in done.stdout
        else:
            check_figures(op, record)
    names = {
        event.get("name")
        for event in json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    }
    assert {"aten::mm", "miniplm::swiglu"} <= names


@pytest.mark.parametrize("name", ["miniplm", "miniplm compiled", "authors", "transformers"])
@pytest.mark.parametrize("op", OPS)
def test_16_bits(op, name):
    """What a GPU runs: autocast, and for the authors' way float16 with a loss scale."""
    record = contend(name, make(op, torch.bfloat16))
    assert record["accurate"] and all(1e-5 < value < 0.05 for value in record["limit"].values()), record


def test_liger_is_patched_in_and_out(inputs, monkeypatch):
    """With a stand-in for Liger Kernel: nothing of it stays behind."""
    from transformers.models.qwen2 import modeling_qwen2

    original, seen = modeling_qwen2.Qwen2RMSNorm, []

    class Norm(original):
        def forward(self, x):
            seen.append("norm")
            return super().forward(x)

    def apply_liger_kernel_to_qwen2(fused_linear_cross_entropy):
        assert fused_linear_cross_entropy is False
        modeling_qwen2.Qwen2RMSNorm = Norm

    def liger_fused_linear_cross_entropy(hidden, weight, targets, reduction):
        seen.append(reduction)
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction=reduction)

    for module, attributes in (
        ("", {}),
        (".transformers", {"apply_liger_kernel_to_qwen2": apply_liger_kernel_to_qwen2}),
        (".transformers.functional", {"liger_fused_linear_cross_entropy": liger_fused_linear_cross_entropy}),
    ):
        stand_in = types.ModuleType("liger_kernel" + module)
        vars(stand_in).update(attributes)
        monkeypatch.setitem(sys.modules, "liger_kernel" + module, stand_in)
    for op in OPS:
        assert contend("liger", inputs[op])["accurate"]
        assert modeling_qwen2.Qwen2RMSNorm is original
    assert set(seen) == {"norm", "sum", "none"}


def test_mfu_counts_what_the_models_need(inputs, monkeypatch):
    monkeypatch.setattr(workload, "run_pass", lambda *_: (torch.zeros(1), 2.0))
    monkeypatch.setattr(workload, "split", lambda *_: {})
    for op, times in (("train", 3), ("score", 1)):
        job, chunks = inputs[op][:2]
        models = [workload.Decoder(config) for config in job.configs]
        needed = times * sum(
            (len(chunk) - 1) * model.flops_per_token(len(chunk) - 1) for model in models for chunk in chunks
        )
        record = contend("miniplm", inputs[op])
        assert record["mfu"] == pytest.approx(needed / 2 / 1e10)
        assert record["tokens_per_second"] == sum(len(chunk) - 1 for chunk in chunks) / 2


def forget_eos(monkeypatch):
    pad = peers.pad

    def wrong(chunks, width=None):
        ids, targets, mask = pad(chunks, width)
        after_eos = mask & (targets == peers.IGNORE_INDEX)
        assert after_eos.any()
        return ids, targets.masked_fill(after_eos, 3), mask

    monkeypatch.setattr(peers, "pad", wrong)


@pytest.mark.parametrize("op", OPS)
def test_a_peer_that_scores_what_it_must_not_is_marked(op, inputs, monkeypatch):
    assert contend("authors", inputs[op])["accurate"] is True
    forget_eos(monkeypatch)
    assert contend("authors", inputs[op])["accurate"] is False


def scale_a_gradient(inner, losses):
    inner.models[0].get_parameter("model.norm.weight").grad *= 1.001
    return losses


def spoil_a_gradient(inner, losses):
    inner.models[0].get_parameter("model.norm.weight").grad[3] = float("nan")
    return losses


@pytest.mark.parametrize(
    "op, change, key",
    [
        ("score", lambda inner, scores: scores * 1.0001, "scores"),
        ("score", lambda inner, scores: scores.roll(1), "scores"),
        ("score", lambda inner, scores: scores / 0, "scores"),
        ("train", lambda inner, losses: [loss * 1.0001 for loss in losses], "loss"),
        ("train", scale_a_gradient, "gradient"),
        ("train", spoil_a_gradient, "gradient"),
    ],
)
def test_ours_must_be_right(op, change, key, monkeypatch, tmp_path):
    monkeypatch.setitem(pipeline.CONTENDERS, "miniplm", changed(own.ours, change))
    with pytest.raises(SystemExit, match="inaccurate or not run: miniplm"):
        run(monkeypatch, op, "--only", "miniplm", "--json", tmp_path / "report.json")
    (record,) = json.loads((tmp_path / "report.json").read_text())["records"]
    wrong = {name for name, error in record["error"].items() if not float(error) <= record["limit"][name]}
    assert record["accurate"] is False and wrong == {key}


def test_a_contender_that_fails_is_recorded_and_the_run_goes_on(monkeypatch, tmp_path):
    def broken(job, rows):
        raise RuntimeError("a broken kernel")

    monkeypatch.setitem(pipeline.CONTENDERS, "authors", broken)
    run(monkeypatch, "score", "--only", "authors,miniplm", "--json", tmp_path / "report.json")
    records = json.loads((tmp_path / "report.json").read_text())["records"]
    assert {record["contender"]: record.get("skipped") for record in records} == {
        "miniplm": None,
        "authors": "RuntimeError: a broken kernel",
    }
    monkeypatch.setitem(pipeline.CONTENDERS, "miniplm", broken)
    with pytest.raises(SystemExit, match="inaccurate or not run: miniplm"):
        run(monkeypatch, "score", "--only", "miniplm")
    with pytest.raises(
        SystemExit, match="no contender minipm in score; there are miniplm, authors, transformers, liger"
    ):
        run(monkeypatch, "score", "--only", "minipm")
    with pytest.raises(SystemExit, match="no contender miniplm fp8 in train"):
        run(monkeypatch, "train", "--only", "miniplm fp8")


def test_batches_are_halved_until_they_fit(inputs, monkeypatch):
    tried = []

    def large(fits):
        @contextlib.contextmanager
        def contender(job, rows):
            tried.append(rows)
            if rows > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            with own.ours(job, rows) as inner:
                yield inner

        return contender

    monkeypatch.setitem(pipeline.CONTENDERS, "miniplm", large(1))
    assert contend("miniplm", inputs["score"])["chunks_per_batch"] == 1 and tried == [4, 2, 1]
    monkeypatch.setitem(pipeline.CONTENDERS, "miniplm", large(0))
    assert contend("miniplm", inputs["score"]) == {"skipped": "OutOfMemoryError: CUDA out of memory"}


def test_the_loss_curve(monkeypatch, tmp_path):
    def curve(status):
        with pytest.raises(SystemExit) as exit:
            run(monkeypatch, "train", "--loss-curve", 12, "--json", tmp_path / "report.json")
        assert exit.value.code == status
        return json.loads((tmp_path / "report.json").read_text())["loss_curve"]

    found = curve(False)
    assert found["equal"] and all(len(losses) == 12 for losses in found["losses"].values())
    assert found["losses"]["miniplm"][-1] < found["losses"]["miniplm"][0] - 0.01  # it learns
    assert found["distance"]["miniplm"] < 1e-5 > found["distance"]["plain"] > 0
    train_step = pipeline.training.train_step
    monkeypatch.setattr(
        pipeline.training,
        "train_step",
        lambda model, optimizer, batches, rate, *rest: train_step(model, optimizer, batches, rate / 2, *rest),
    )
    assert not curve(True)["equal"]
    with pytest.raises(SystemExit, match="goes with train"):
        run(monkeypatch, "score", "--loss-curve", 12)
