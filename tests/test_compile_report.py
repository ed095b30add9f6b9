"""What Triton makes of the kernels for GPUs that are not there (benchmarks/compile_report.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
REPORT = Path(__file__).parents[1] / "benchmarks" / "compile_report.py"


def run(*arguments, **options):
    return subprocess.run([sys.executable, str(REPORT), *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


@pytest.mark.slow
def test_hopper(tmp_path):
    """For sm_90: every kernel of the package compiles, in every configuration, without a spill, in 227 KB, and multiplies with wgmma."""
    file = tmp_path / "report.json"
    result = run("--arch", "sm_90", "--json", str(file))
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    from miniplm.kernels import dispatch

    assert {row["op"] for row in rows} == set(dispatch.TRITON)
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= 227 * 1024 and not row["broken"], row
        assert f"{row['kernel']}  " in result.stdout
    heads = [row for row in rows if row["kernel"] == "logits._logits_kernel" and row["variant"]["dtype"] in ("bf16", "fp16")]
    assert heads and all(row["matrix"] > 0 for row in heads)
    assert any(row["tma"] > 0 for row in heads)


BAD = '''
import torch, triton, triton.language as tl
from miniplm.kernels import dispatch, log_prob, tuning

@triton.jit
def _spill_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + r[:, None] * BLOCK + r[None, :])
    tl.store(out_ptr + r[:, None] * BLOCK + r[None, :], tl.dot(x, x) + tl.dot(x.T, x) + tl.dot(x, x.T))

@triton.jit
def _lonely_kernel(x_ptr):
    tl.store(x_ptr, 0.0)

log_prob._spill_kernel, log_prob._lonely_kernel = _spill_kernel, _lonely_kernel
dispatch.TRITON.clear(), dispatch.EXAMPLES.clear()

@dispatch.triton("swiglu", lambda make: [(make(4, 4), make(4, 4))])
def swiglu(gate, up):
    _spill_kernel[(1,)](gate, up, BLOCK=256, num_warps=4)

@dispatch.triton("rms_norm", lambda make: [(make(4, 4),)])
def rms_norm(x):
    raise RuntimeError("no such thing")
'''


def test_broken_limits(tmp_path):
    """Spills, too much shared memory, a launcher that fails, and a kernel that nothing launches are all found."""
    (tmp_path / "bad.py").write_text(BAD)
    code = f"""
import sys
sys.path[:0] = [{str(REPORT.parent)!r}, {str(tmp_path)!r}]
import compile_report, bad
rows = compile_report.compile_op("sm_90", "swiglu") + compile_report.compile_op("sm_90", "rms_norm")
print([row["broken"] for row in rows])
print(sorted(name for name in compile_report.all_kernels() if name.startswith(("bad.", "log_prob._log"))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    broken, kernels = result.stdout.splitlines()
    assert "spills" in broken and "shared memory above 232448" in broken and "RuntimeError: no such thing" in broken
    assert kernels == "['bad._lonely_kernel', 'bad._spill_kernel', 'log_prob._log_prob_kernel']"
