import pytest
import torch


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
