"""No tensor of the size of the logits exists, and the process does not grow by more than max_logits_bytes."""

import subprocess
import sys

import pytest
import torch
from miniplm.kernels import reference_head
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T, V, WIDTH = 1500, 5003, 16


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.bytes = max(
            [
                self.bytes,
                *(x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor)),
            ]
        )
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_tensor(dtype):
    hidden, weight, targets = (
        torch.randn(T, WIDTH, dtype=dtype),
        torch.randn(V, WIDTH, dtype=dtype),
        torch.randint(0, V, (T,)),
    )
    cu_seqlens, logits, max_logits_bytes = torch.tensor([0, 700, T], dtype=torch.int32), 4 * T * V, 1 << 20
    calls = {
        "log_prob": (
            lambda: reference_head.linear_log_prob(hidden, weight, targets, -100, 1 << 30),
            reference_head.TILE_BYTES,
        ),
        "score": (
            lambda: reference_head.difference_score(hidden, weight, hidden, weight, targets, cu_seqlens),
            reference_head.TILE_BYTES,
        ),
        "loss": (
            lambda: reference_head.linear_cross_entropy(
                hidden, weight, targets, torch.ones(T), -100, True, True, max_logits_bytes
            ),
            max_logits_bytes,
        ),
        "distillation": (
            lambda: reference_head.linear_distillation_loss(
                hidden, weight, hidden, weight, targets, 0.5, 1.0, -100, True, True, max_logits_bytes
            ),
            max_logits_bytes,
        ),
    }
    for name, (call, bound) in calls.items():
        with LargestTensor() as largest:
            call()
        assert bound / 2 < largest.bytes <= bound < logits, name


PROGRAM = """
import resource, torch
from miniplm.kernels import linear_cross_entropy, linear_log_prob, linear_distillation_loss
torch.set_num_threads(1)
T, V, WIDTH = 512, 151_936, 8  # the logits: 297 MiB
hidden, weight = (torch.randn(rows, WIDTH, requires_grad=True) for rows in (T, V))
targets = torch.randint(0, V, (T,))
small = torch.randn(64, WIDTH)
linear_log_prob(small, weight, targets[:64]).sum().backward()  # what a first call loads
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB
before = peak()
with torch.no_grad():
    linear_log_prob(hidden, weight, targets)
print("log_prob", peak() - before)
linear_cross_entropy(hidden, weight, targets, max_logits_bytes=64 << 20).backward()
print("loss", peak() - before)
linear_cross_entropy(hidden, weight, targets, reduction="none", max_logits_bytes=64 << 20).sum().backward()
print("losses", peak() - before)
linear_distillation_loss(hidden, weight, hidden, weight, targets, max_logits_bytes=64 << 20).loss.backward()
print("distillation", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_the_process():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    peaks = {name: float(growth) for name, growth in map(str.split, result.stdout.splitlines())}
    assert peaks["log_prob"] < 24
    assert max(peaks.values()) < 64 + 40, (
        peaks
    )  # max_logits_bytes, and both gradients (4.7 MiB each) a few times over
