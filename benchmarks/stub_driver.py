"""Triton's launcher on a stand-in for NVIDIA's driver, cuda_stub.c: every launch is checked and returns at
once, nothing runs. No GPU is needed, but gcc, on Linux.

    run(command)              in a process that finds the stand-in where it looks for the driver, and in it
    stub = activate()         before the first launch; kernels of sm_90 are compiled and launched
    counter(stub, "launches")
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """subprocess.run, with the stand-in in the place of NVIDIA's driver."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("cuda_stub.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-I{include}", "-o", library, source], check=True)
        places = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder, "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **places, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, **options)


def activate() -> ctypes.CDLL:
    """Make the stand-in the driver of this process, which `run` has started, and return it."""
    path = os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1"
    stub = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    import compile_report
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    class Driver(compile_report.NoGPU):
        def __init__(self):
            super().__init__("sm_90")
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_stream(self, device):
            return 0

    driver.set_active(Driver())
    return stub


def counter(stub: ctypes.CDLL, name: str) -> int:
    """launches or descriptors: how many the stand-in has been given."""
    return ctypes.c_int.in_dll(stub, name).value
