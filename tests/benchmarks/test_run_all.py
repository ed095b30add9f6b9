"""benchmarks/run_all.sh: goes on after a failure, ends in time."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the benchmarks run at full size"
)
OPS = ("train", "score")

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
        == {"environment", "tests", "train", "score", "tune", "host-cost", "loss-curve", "more-tests"}
        | benchmarks
    )
    assert done.returncode == 1 and {name for name, line in lines.items() if not line.startswith("ok")} == {
        "score"
    }
    assert re.fullmatch(r"failed, \d s: score failed", lines["score"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.txt",
        *(f"{name}.log" for name in lines),
    } | {f"{name}.json" for name in {"train", "score", "tune", "host-cost", "loss-curve"} | benchmarks}
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
