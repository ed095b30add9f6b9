"""No kernel reads beyond its inputs: each input ends where memory that may not be read begins. (In Triton's
interpreter; elsewhere nothing would show it.)"""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import ctypes, itertools, math, mmap, torch
from miniplm.kernels import attention_backward_single, dispatch

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE

def fenced(x):
    pages = math.ceil(x.nbytes / PAGE) * PAGE
    start = libc.mmap(None, pages + PAGE, 3, 0x22, -1, 0)  # private, anonymous
    assert libc.mprotect(start + pages, PAGE, 0) == 0
    memory = (ctypes.c_byte * x.nbytes).from_address(start + pages - x.nbytes)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)

def new(*sizes, dtype=torch.float32):
    return fenced(torch.randn(sizes).to(dtype))

def examples(T, d, V, D, heads, lengths, dtype):
    x, w, norm, gate = new(T, d, dtype=dtype), new(V, d, dtype=dtype), new(d), new(T, 2 * d, dtype=dtype)
    ids = fenced(torch.randint(V, (T,)))
    bounds = fenced(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))
    q, k, statistic = new(T, heads, D, dtype=dtype), new(T, 1, D, dtype=dtype), new(T, heads)
    teacher = new(T, d + 3, dtype=dtype), new(V + 2, d + 3, dtype=dtype)
    for ignored in (-100, 3):  # an ignored target may also be an id
        yield "linear_log_prob", (x, w, ids, ignored, 1)
        yield "linear_cross_entropy", (x, w, ids, new(T), ignored, True, True, 1 << 20)
        yield "linear_distillation_loss", (x, w, *teacher, ids, 0.5, 1.0, ignored, True, True, 1 << 20)
    yield "difference_score", (x, w, *teacher, ids, bounds)
    yield "rms_norm", (x, norm, 1e-6, dtype)
    yield "add_rms_norm", (x, new(T, d), norm, 1e-6, dtype)
    yield "rms_norm_backward", (x, x, norm, new(T, 1), x, None)
    yield "swiglu", (gate, None)
    yield "swiglu_backward", (x, gate, None)
    yield "quantize_rows", (x,)
    yield "rotary", (q, k, fenced(torch.arange(T)), new(D // 2), False)
    yield "flash_attention", (q, k, k, bounds, max(lengths), 0.3)
    yield "flash_attention_backward", (q, q, k, k, q, statistic, bounds, max(lengths), 0.3)

seen = set()
for lengths in ((9,), (5, 0, 28), (1,)):
    for sizes in ((16, 67, 16, 2), (33, 5, 24, 3)):
        for dtype in (torch.float32, torch.float16):
            for op, arguments in examples(sum(lengths), *sizes, lengths, dtype):
                print(op, lengths, sizes, dtype, flush=True)
                dispatch.TRITON[op](*arguments)
                if op == "flash_attention_backward":
                    attention_backward_single.one_pass(*arguments[:-2], arguments[-1])
                seen.add(op)
assert seen == set(dispatch.TRITON), set(dispatch.TRITON) - seen
print("done")
"""


@pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux",
    reason="for Triton's interpreter, with Linux's system calls",
)
def test_no_reads_beyond_the_inputs():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "MINIPLM_KERNELS": "triton"},
    )
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["done"], f"{lines[-1:]}: exit status {done.returncode}\n{done.stderr[-2000:]}"
