"""Triton's launcher on a stand-in for NVIDIA's driver: every launch of every kernel, and what it costs the
host."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("gcc"),
        reason="builds a stand-in for NVIDIA's driver with gcc on Linux",
    ),
]

LAUNCHES = """
import sys
sys.path.insert(0, {folder!r})
import stub_driver
stub = stub_driver.activate()
import torch
from miniplm.kernels import dispatch, tuning

def make(*shape, dtype=torch.bfloat16):  # as many heads, fewer of all else: this memory is real
    sizes = [size if i == 1 and len(shape) != 2 else min(size, 512) for i, size in enumerate(shape)]
    return torch.zeros(sizes, dtype=dtype)

tuning.OFFLINE = tuning.Target("cuda", 90, 132)
for op in sorted(dispatch.TRITON):
    for example in dispatch.EXAMPLES[op](make):
        dispatch.TRITON[op](*example)
    print(op, *(stub_driver.counter(stub, name) for name in ("launches", "descriptors")))
"""


def test_launches(module):
    """Every launch of every example is one that Triton's launcher and NVIDIA's driver take: arguments, grids,
    tensor descriptors."""
    command = [sys.executable, "-c", LAUNCHES.format(folder=str(BENCHMARKS))]
    result = module("stub_driver").run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    launched = [tuple(map(int, line.split()[1:])) for line in result.stdout.splitlines()]
    assert (
        all(later[0] > earlier[0] for earlier, later in pairwise([(0, 0), *launched]))
        and launched[-1][1] > 100
    ), result.stdout


def test_host_cost(tmp_path):
    """Microseconds and launches of every public op, forward and backward."""
    from miniplm import kernels

    command = [
        sys.executable,
        BENCHMARKS / "host_cost.py",
        "--repeats",
        "3",
        "--json",
        tmp_path / "report.json",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    records = {record["op"]: record for record in report["records"]}
    ops = {name for name in kernels.__all__ if name.islower()}
    assert records.keys() == ops | {"decoder layer"} and report["repeats"] == 3
    without_gradients = {"quantize_rows", "linear_log_prob", "difference_score"}
    for name, record in records.items():
        assert record["forward_us"] > 1 and record["forward_launches"] >= 1
        if name in without_gradients:
            assert record["backward_us"] is record["backward_launches"] is None
        else:
            assert record["backward_us"] > 1
    launches = {
        name: (record["forward_launches"], record["backward_launches"]) for name, record in records.items()
    }
    assert launches["swiglu"] == (1, 1) and launches["rms_norm"] == (1, 2)
    assert launches["linear_cross_entropy"][1] == 0  # its gradients are there
    parts = ["rms_norm", "add_rms_norm", "apply_rotary", "flash_attention", "swiglu"]  # of a layer
    assert launches["decoder layer"] == tuple(sum(launches[part][i] for part in parts) for i in (0, 1))
    assert all(f"{name:<26}" in result.stdout for name in records)
