"""apply_rotary on Triton: offsets."""

import pytest
import torch
from checks import assert_equal_everywhere
from miniplm.kernels import apply_rotary

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("heads_far_apart", [False, True])
def test_offsets_beyond_int32(heads_far_apart, far_apart, device):
    if heads_far_apart:
        q, k = (far_apart(3, 3 * 16).unflatten(1, (3, 16)).transpose(0, 1) for _ in range(2))
    else:
        q, k = far_apart(3, 32).unflatten(1, (2, 16)), far_apart(3, 16)[:, None]
    positions, inv_freq = torch.arange(3, device=device), torch.rand(8, device=device)
    expected = apply_rotary(q.contiguous(), k.contiguous(), positions, inv_freq)
    assert_equal_everywhere(apply_rotary(q, k, positions, inv_freq), expected)
