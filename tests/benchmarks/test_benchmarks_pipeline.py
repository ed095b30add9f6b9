"""The pipeline's benchmark: it runs at toy size with each contender, what computes something else is seen,
and what it writes is rendered."""

import contextlib
import gzip
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import pipeline  # noqa: E402
import render  # noqa: E402
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


# --- the workload ---


def test_the_models_are_those_of_the_published_configs():
    for name, file in (
        ("104M", "qwen_104m_reference"),
        ("200M", "qwen_200m"),
        ("500M", "qwen_500m"),
        ("1.2B", "qwen_1.2b"),
    ):
        settings = yaml.safe_load((ROOT / "configs" / f"{file}.yaml").read_text())["model"]
        assert settings.pop("vocab_size") == 151_936
        assert {key: getattr(workload.MODELS[name], key) for key in settings} == settings


def test_chunks_are_like_those_of_prepare():
    job = workload.make_job(["toy"], "cpu", torch.float32, 64, spread=False)
    chunks = workload.synthetic_chunks(200, job, seed=3)
    lengths, ids = np.array([len(chunk) for chunk in chunks]), np.concatenate(chunks)
    assert len(chunks) == 200 and lengths.max() <= 65 and 30 < lengths.mean() < 60
    assert ids.min() == workload.EOS and ids.max() < 500
    documents = (ids == workload.EOS).sum()
    assert 100 < documents < 600  # of 38 ids in the mean
    counts = np.bincount(ids, minlength=500)[1:]
    assert (
        0.08 < counts[0] / len(ids) < 0.16 and counts[:100].sum() > 2 * counts[100:].sum()
    )  # p(1) = ln 2 / ln 500 = 0.11
    assert all(
        np.array_equal(a, b) for a, b in zip(chunks, workload.synthetic_chunks(200, job, seed=3), strict=True)
    )


def test_padding_leaves_out_what_is_not_predicted():
    ids, targets, mask = peers.pad([np.array([5, 0, 7, 8]), np.array([9, 4])], width=4)
    assert ids.tolist() == [[5, 0, 7, 0], [9, 0, 0, 0]]
    assert targets.tolist() == [[0, -100, 8, -100], [4, -100, -100, -100]]
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]


# --- each contender ---


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
            assert (
                record["contender"] == "liger"
                and "liger_kernel" in record["skipped"]
                and "did not run" in done.stdout
            )
            continue
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
            0
            < record["tokens_per_second_low"]
            <= record["tokens_per_second"]
            <= record["tokens_per_second_high"]
        )
        assert record["mfu"] is record["peak_bytes"] is None
        parts = {"data", "other"} | (
            {"forward and head"} if record["contender"] == "transformers" else {"forward", "head"}
        )
        assert record["split"].keys() == parts | ({"backward", "optimiser"} if op == "train" else set())
        assert all(share > 0 for part, share in record["split"].items() if part != "other")
        assert sum(record["split"].values()) == pytest.approx(1) and -0.01 < record["split"]["other"] < 0.5
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


# --- what is wrong is seen ---


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
    monkeypatch.setitem(pipeline.CONTENDERS, "miniplm", changed(pipeline.ours, change))
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
            with pipeline.ours(job, rows) as inner:
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


# --- render ---

ENVIRONMENT = {
    "device": "NVIDIA Example",
    "date": "2026-11-22 10:00 UTC",
    "torch": "2.11.0",
    "cuda": "13.0",
    "commit": "0123456789abcdef-dirty",
    **dict.fromkeys(render.harness.PACKAGES),
    "triton": "3.6.0",
}


def report(op, records, **more):
    return {
        "op": op,
        "device": "cuda",
        "toy": False,
        "environment": ENVIRONMENT,
        "ceilings": {"gemm_tflops": 788.0, "copy_gb_per_s": 4300.0},
        "finished": True,
        "records": records,
        **more,
    }


def speed(contender, tokens_per_second):
    return {
        "shape": {"model": "200M", "chunks": 64},
        "contender": contender,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second / 6e5,
        "peak_bytes": 30e9,
        "chunks_per_batch": 64,
        "split": {"data": 0.02, "other": 0.98},
        "error": {"loss": 1e-4},
        "accurate": True,
    }


def op_record(contender, ms, accurate=True):
    return {
        "shape": {"T": 16384, "d": 768},
        "pass": "forward",
        "contender": contender,
        "ms": ms,
        "percent_of_ceiling": 80.0,
        "extra_bytes": 5_000_000,
        "accurate": accurate,
    }


@pytest.fixture
def results(tmp_path):
    """write(name=report, ...) → the README's text after rendering."""
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    (folder / "old.json").write_bytes(
        next((ROOT / "benchmarks" / "results").glob("cpu-2-cores*.json")).read_bytes()
    )
    (folder / "cut.json").write_text('{"op": "train", "rec')
    (folder / "list.json").write_text("[1, 2]")

    def write(**reports):
        for name, content in reports.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        readme.write_text("before\n" + "\nold\n".join(render.MARKERS) + "\nafter\n")
        subprocess.run(
            [sys.executable, ROOT / "benchmarks/render.py", "--results", folder, "--readme", readme],
            check=True,
        )
        text = readme.read_text()
        assert (
            text.startswith(f"before\n{render.MARKERS[0]}\n")
            and text.endswith(f"\n{render.MARKERS[1]}\nafter\n")
            and "old\n" not in text
        )
        return text

    return write


def test_without_gpu_results_nothing_is_claimed(results):
    toy = report("train", [speed("miniplm", 1e5)], toy=True) | {"device": "cpu"}
    assert results(toy=toy).splitlines()[2] == "GPU: not measured yet."


def test_tables(results):
    train = report(
        "train",
        [
            speed("miniplm", 300_000.0),
            speed("authors", 90_000.0),
            {**speed("liger", 1.0), "skipped": "ImportError: no | liger"},
        ],
    )
    older = report("train", [speed("miniplm", 1_000.0)]) | {
        "environment": {**ENVIRONMENT, "date": "2026-11-20 10:00 UTC"}
    }
    head = report(
        "log_prob",
        [
            op_record("miniplm", 2.0),
            op_record("GEMM", 1.6, accurate=None),
            op_record("wrong", 1.0, accurate=False),
            op_record("eager", 9.0),
            op_record("compile", 5.0),
        ],
        baseline="GEMM",
        by="d",
        finished=False,
    )
    curve = report(
        "loss curve",
        [],
        shape={"model": "104M", "chunks": 8},
        loss_curve={"steps": 200, "distance": {"miniplm": 1e-3, "plain": None}, "losses": {}, "equal": True},
    )
    score = report(
        "score",
        [
            speed("miniplm fp8", 5e5)
            | {"accurate": False, "agreement": {"rows": 256, "spearman": 0.99123, "equal_selections": 0.98}}
        ],
    )
    text = results(train=train, an_older_run=older, head=head, curve=curve, score=score)
    assert "| 1.0e-04 (inaccurate); ranks 0.9912, 98.0% selected alike |" in text
    assert (
        "**`train`**: NVIDIA Example, 2026-11-22 10:00 UTC; torch 2.11.0, triton 3.6.0, CUDA 13.0, bf16 "
        "GEMM 788 TFLOP/s" in text
    )
    assert "commit 0123456789ab-dirty\n" in text
    assert (
        "| model=200M chunks=64 | miniplm | 300,000 | 1.00 | 50.0 | 30.0 | 64 | 1.0e-04 | data 2%, other "
        "98% |" in text
    )
    assert "| model=200M chunks=64 | authors | 90,000 | 3.33 | 15.0 |" in text
    assert "| liger | did not run: ImportError: no / liger |" in text and "| 1,000 |" not in text
    assert "**log_prob**" in text and "; cut short\n" in text
    assert "| T=16384 d=768 | forward | miniplm | 2.000 | 80.0 | 5 | 0.80 | compile | 2.50 |" in text
    assert (
        "200 steps, model=104M chunks=8, from" in text
        and "miniplm 1.0e-03, plain transformers in bf16 – nats" in text
    )
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) == {10}


def test_the_readme_needs_its_markers(tmp_path):
    (tmp_path / "README.md").write_text("no markers\n")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/render.py", "--readme", tmp_path / "README.md"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "must hold each of these lines once" in done.stderr
    assert (tmp_path / "README.md").read_text() == "no markers\n"


def test_the_readme_shows_the_results(tmp_path):
    if render.MARKERS[0] not in (text := render.README.read_text(encoding="utf-8")):
        pytest.skip("the README has no place for them yet")
    shutil.copytree(render.RESULTS, tmp_path / "benchmarks" / "results")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/render.py",
            "--results",
            tmp_path / "benchmarks/results",
            "--readme",
            tmp_path / "README.md",
        ],
        check=True,
    )
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text, "run benchmarks/render.py"


# --- run_all.sh ---

STUB = """#!{python}
import sys, time
from pathlib import Path
arguments = " ".join(sys.argv[1:])
print("ran", arguments)
if "render.py" in arguments:
    sys.exit(print("the tables"))
if "--json" in sys.argv:
    Path(sys.argv[sys.argv.index("--json") + 1]).write_text("{{}}")
if "/score.json" in arguments:
    sys.exit("score failed")
if "{slow}" in arguments:
    time.sleep(60)
"""


def run_all(tmp_path, slow, *arguments):
    python = tmp_path / "python"
    python.write_text(STUB.format(python=sys.executable, slow=slow))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/run_all.sh", tmp_path / "out", *arguments],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    return done, dict(
        line.split(maxsplit=1) for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()
    )


def test_run_all_goes_on_after_a_failure(tmp_path):
    done, lines = run_all(tmp_path, "nothing is slow")
    benchmarks = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if re.search(r"^def cases\(", path.read_text(), re.MULTILINE)
    }
    assert (
        lines.keys()
        == {"environment", "tests", "train", "score", "tune", "loss-curve", "more-tests"} | benchmarks
    )
    assert done.returncode == 1 and {name for name, line in lines.items() if not line.startswith("ok")} == {
        "score"
    }
    assert re.fullmatch(r"failed, \d s: score failed", lines["score"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.txt",
        *(f"{name}.log" for name in lines),
    } | {f"{name}.json" for name in {"train", "score", "tune", "loss-curve"} | benchmarks}
    assert done.stdout.index("the tables") < done.stdout.rindex("environment")  # the summary is last
    assert "-m gpu" in (tmp_path / "out" / "tests.log").read_text()


def test_run_all_ends_in_time(tmp_path):
    done, lines = run_all(tmp_path, "/train.json", "12")
    assert (
        done.returncode == 1
        and lines["train"].startswith("cut at its limit")
        and lines["more-tests"] == "left out, no time"
    )
    assert (tmp_path / "out" / "train.json").exists() and "ran" in (
        tmp_path / "out" / "train.log"
    ).read_text()


@pytest.mark.slow
def test_run_all_on_the_cpu(tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/run_all.sh", tmp_path, "300", "environment", "tests", "train", "score"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.count(" ok, ") == 8 and "GPU: not measured yet." in done.stdout
    )  # each line as it comes, and in the summary
    assert (
        json.loads((tmp_path / "environment.json").read_text())["environment"]["torch"] == torch.__version__
    )
    assert all(json.loads((tmp_path / f"{op}.json").read_text())["finished"] for op in OPS)
