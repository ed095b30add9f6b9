"""The op benchmarks: every file in benchmarks/ that defines `cases` runs at toy size on the CPU."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if re.search(r"^def cases\(", path.read_text(), re.MULTILINE)
)
PEERS = {"eager", "compile", "torch", "liger", "liger-cutedsl", "cut-cross-entropy", "quack"}
CONTENDERS = {  # (benchmark, pass) → who must be there
    ("log_prob", "forward"): {"miniplm", "gluon", "GEMM"} | PEERS,
    ("cross_entropy", "forward"): {"miniplm", "gluon", "GEMMs", "liger-fp32"} | PEERS,
    ("cross_entropy", "both"): {"miniplm", "gluon", "GEMMs", "liger-fp32"} | PEERS,
    ("distillation", "forward"): {"miniplm", "gluon", "GEMMs", "eager", "compile", "liger", "liger-chunked"},
    ("distillation", "both"): {"miniplm", "gluon", "GEMMs", "eager", "compile", "liger", "liger-chunked"},
}
WITHOUT_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the benchmarks run at full size"
)


def command_line(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_head_benchmarks_are_found():
    assert {"log_prob", "cross_entropy", "distillation"} <= set(BENCHMARKS)


@WITHOUT_GPU
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_at_toy_size(name, tmp_path):
    done = command_line(f"benchmarks/{name}.py", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "toy sizes on the CPU" in done.stdout
    assert os.listdir(tmp_path) == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["op"], report["device"], report["toy"], report["finished"]) == (name, "cpu", True, True)
    assert report["environment"]["torch"] == torch.__version__
    assert report["ceilings"] == {"gemm_tflops": None, "copy_gb_per_s": None}
    assert any(record["contender"] == report["baseline"] and "ms" in record for record in report["records"])
    found = {}
    for record in report["records"]:
        found.setdefault((name, record["pass"], json.dumps(record["shape"])), []).append(record["contender"])
        assert record["contender"] in done.stdout
        if "skipped" in record:
            assert len(record["skipped"]) > 10 and record["skipped"] in done.stdout
            assert "miniplm" not in record["contender"] and record["contender"] not in (
                "eager",
                report["baseline"],
            )
        else:
            assert 0 < record["ms_low"] <= record["ms"] <= record["ms_high"]
            assert record["percent_of_ceiling"] is record["extra_bytes"] is None
            assert all(float(error) < 1e-5 for error in record["error"].values()), record
            assert record["accurate"] is (True if record["error"] else None)
        if "miniplm" in record["contender"]:
            assert record["accurate"] is True
    for (benchmark, name_of_pass, _), contenders in found.items():
        assert len(set(contenders)) == len(contenders)
        assert set(contenders) == CONTENDERS.get((benchmark, name_of_pass), set(contenders))


def test_what_run_all_does_not_ask_for_is_not_needed():
    """On a borrowed machine there is what the head of run_all.sh names, and what that brings along."""
    head = (ROOT / "benchmarks/run_all.sh").read_text().partition("set -u")[0]
    absent = ("datasets", "docstring_parser", "jsonargparse", "rich", "tensorboard", "dill")
    assert not [name for name in absent if name in head]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.path.insert(0, 'benchmarks'); "
        "import pipeline; print(sorted(pipeline.CONTENDERS))"
    )
    done = command_line("-c", program)
    assert done.returncode == 0 and "miniplm" in done.stdout, done.stderr


@WITHOUT_GPU
def test_a_checkout_need_not_be_installed(tmp_path):
    """-S: the packages that are installed are found, links to checkouts (editable installs) are not."""
    packages = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import harness, miniplm.kernels; "
        "print(miniplm.kernels.__file__)"
    )
    done = command_line("-S", "-c", program, PYTHONPATH=packages, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    if not (Path(sysconfig.get_path("purelib")) / "miniplm").exists():
        assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")
