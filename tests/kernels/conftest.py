import pytest
import torch


@pytest.fixture(autouse=True)
def strict_torch():
    """New memory is full of NaN (integers: the largest), operations that may differ from run to run raise, and the seed is fixed."""
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
