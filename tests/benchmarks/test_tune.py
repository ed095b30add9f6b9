"""benchmarks/tune.py: every launch configuration of every kernel is timed, failures and all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
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


@WITHOUT_GPU
def test_tune_times_every_kernel(module, tmp_path):
    pytest.importorskip("triton")
    done = command_line("benchmarks/tune.py", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finished"] and report["toy"] and all(timing["ms"] > 0 for timing in report["timings"])
    assert {timing["kernel"] for timing in report["timings"]} == set(module("tune").tuning.CANDIDATES) - {
        "divergence"
    }  # that one hardly ever runs


@WITHOUT_GPU
def test_tune_goes_on_after_a_failure(module, monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    tune = module("tune")
    monkeypatch.setenv("MINIPLM_KERNELS", "auto")
    monkeypatch.setattr(tune.tuning, "launch", tune.tuning.launch)  # main replaces it
    (good,) = tune.tuning.CANDIDATES["swiglu"](tune.tuning.INTERPRETER, itemsize=4)
    monkeypatch.setitem(
        tune.tuning.CANDIDATES,
        "swiglu",
        lambda *_, **__: [good, good._replace(blocks={"BLOCK_R": 3, "BLOCK_F": 64})],
    )  # no power of two
    monkeypatch.setattr(sys, "argv", ["tune.py", "--only", "swiglu", "--json", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit, match="some configurations failed"):
        tune.main()
    one, other = json.loads((tmp_path / "report.json").read_text())["timings"]
    assert (
        one["blocks"] == good.blocks
        and one["ms"] > 0
        and "ms" not in other
        and "power of 2" in other["failed"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1] == "swiglu: op=swiglu d=64 itemsize=4"
        and lines[2].endswith("(default)")
        and "1.000" in lines[2]
        and "failed: " in lines[3]
    )


def test_tune_tries_configurations_near_the_candidates(module):
    tune = module("tune")
    config = tune.tuning.Config({"BLOCK_R": 4, "BLOCK_D": 64, "SUM": True}, num_warps=1, num_stages=1)
    found = tune.configurations(
        "rms_norm_backward", tune.tuning.INTERPRETER, {"width": 64, "itemsize": 4}, wide=True
    )
    assert (
        len(found) == len({str(config) for config in found})
        and found[0] == tune.tuning.CANDIDATES["rms_norm_backward"](tune.tuning.INTERPRETER, 64, 4)[0]
    )
    near = list(tune.near("rms_norm_backward", config, {"width": 64}))
    assert {other.blocks["BLOCK_R"] for other in near} == {2, 4, 8} and {
        other.blocks["BLOCK_D"] for other in near
    } == {64}
    assert {other.num_warps for other in near} == {1, 2} and {other.num_stages for other in near} == {
        1,
        2,
    } == {other.per_processor for other in near}
    assert {other.per_processor for other in tune.near("swiglu", config, {})} == {1}
