"""Every op's cases run on both of its implementations: a test that takes the fixture `implementation` runs on
the PyTorch reference and on the Triton kernels."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "products: the op multiplies matrices (not in bfloat16 in the interpreter)"
    )
    config.addinivalue_line("markers", "large: takes too long in Triton's interpreter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What Triton's interpreter cannot do (its products in bfloat16 are garbage), or not in time, waits for a
    GPU."""
    for item in items:
        if Path(__file__).parent not in item.path.parents or not hasattr(item, "callspec"):
            continue
        parameters = item.callspec.params
        in_bfloat16 = parameters.get("dtype") is torch.bfloat16 and item.get_closest_marker("products")
        if parameters.get("implementation") in ("triton", "one_pass") and (
            in_bfloat16 or item.get_closest_marker("large")
        ):
            item.add_marker(pytest.mark.gpu)


class Implementation(NamedTuple):
    """What the public ops run on."""

    name: str  # reference or triton, as in MINIPLM_KERNELS
    device: str  # of the tensors to give it
    finest: torch.dtype  # the most exact dtype that it takes


@pytest.fixture(params=["reference", "triton"])
def implementation(request, monkeypatch):
    """The public ops run on the reference on the CPU; then on the Triton kernels, on a GPU or in Triton's
    interpreter on the CPU. "one_pass", which tests may ask for: on Triton, the gradients of attention in one
    pass, whatever the lengths."""
    monkeypatch.setenv("MINIPLM_KERNELS", "triton" if request.param == "one_pass" else request.param)
    if request.param == "reference":
        return Implementation("reference", "cpu", torch.float64)
    pytest.importorskip("triton")
    if request.param == "one_pass":
        from miniplm.kernels import tuning

        one = [tuning.Config({"PASSES": 1})]
        monkeypatch.setitem(tuning.CANDIDATES, "attention_passes", lambda *_, **__: one)
    return Implementation("triton", "cuda" if torch.cuda.is_available() else "cpu", torch.float32)


@pytest.fixture(autouse=True)
def strict_torch():
    """New memory is full of NaN (integers: the largest), operations that may differ from run to run raise,
    and the seed is fixed."""
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def large_tiles(implementation, monkeypatch):
    """On Triton the logits are cut into few large tiles in the interpreter, which takes its time per tile."""
    if implementation.name == "triton" and implementation.device == "cpu":
        from miniplm.kernels import tuning

        config = tuning.Config({"BLOCK_T": 16, "BLOCK_V": 1024, "BLOCK_D": 64})
        for name in ("exponentials", "logsumexp"):
            monkeypatch.setitem(tuning.CANDIDATES, name, lambda *_, **__: [config])


@pytest.fixture
def device():
    """Where the Triton kernels run: a GPU, or Triton's interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_ops(monkeypatch):
    """The public ops run on their Triton kernels."""
    monkeypatch.setenv("MINIPLM_KERNELS", "triton")


@pytest.fixture
def far_apart(device, tmp_path):
    """far_apart(rows, width): a random float16 matrix whose rows are 2³⁰ elements apart, so that the third
    lies beyond int32's offsets. On the CPU a file of holes stands for the memory between them."""

    def make(rows, width):
        size, step = (rows - 1 << 30) + width, 1 << 30
        if device == "cpu":
            path = tmp_path / f"holes{len(list(tmp_path.iterdir()))}"
            with open(path, "wb") as file:
                file.truncate(2 * size)
            memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
        else:
            memory = torch.zeros(size, dtype=torch.float16, device=device)
        return memory.as_strided((rows, width), (step, 1)).copy_(torch.randn(rows, width))

    return make
