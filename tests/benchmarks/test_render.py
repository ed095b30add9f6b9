"""benchmarks/render.py: results → the README's tables."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import render  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the benchmarks run at full size"
)

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
