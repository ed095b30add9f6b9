"""Every launch of every kernel, on a stand-in for NVIDIA's driver."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

LAUNCHES = """
import ctypes, os, sys
sys.path.insert(0, {folder!r})
stub = ctypes.CDLL(os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
import compile_report, torch
from miniplm.kernels import dispatch, tuning
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime.driver import driver

class NoGPU(compile_report.NoGPU):
    def __init__(self):
        super().__init__("sm_90")
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
    def get_current_stream(self, device):
        return 0

def make(*shape, dtype=torch.bfloat16):  # as many heads, fewer of all else: this memory is real
    sizes = [size if i == 1 and len(shape) != 2 else min(size, 512) for i, size in enumerate(shape)]
    return torch.zeros(sizes, dtype=dtype)

driver.set_active(NoGPU())
tuning.OFFLINE = tuning.Target("cuda", 90, 132)
for op in sorted(dispatch.TRITON):
    for example in dispatch.EXAMPLES[op](make):
        dispatch.TRITON[op](*example)
    print(op, ctypes.c_int.in_dll(stub, "launches").value, ctypes.c_int.in_dll(stub, "descriptors").value)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"),
    reason="builds a stand-in for NVIDIA's driver with gcc on Linux",
)
def test_launches(tmp_path):
    """Every launch of every example is one that Triton's launcher and NVIDIA's driver take: arguments, grids,
    tensor descriptors."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).parent / "cuda_stub.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-I{include}", "-o", tmp_path / "libcuda.so.1", source], check=True
    )
    env = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHES.format(folder=str(BENCHMARKS))],
        capture_output=True,
        text=True,
        env=env,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    launched = [tuple(map(int, line.split()[1:])) for line in result.stdout.splitlines()]
    assert (
        all(later[0] > earlier[0] for earlier, later in pairwise([(0, 0), *launched]))
        and launched[-1][1] > 100
    ), result.stdout
