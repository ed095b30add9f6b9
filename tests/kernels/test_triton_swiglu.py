"""swiglu on Triton: what is read where it lies, and offsets."""

import sys

import pytest
import torch
from checks import assert_equal_everywhere, run
from miniplm.kernels import swiglu

pytestmark = pytest.mark.usefixtures("triton_ops")


def test_halves_are_read_where_they_lie(device, monkeypatch):
    """As views of one tensor, neither half is copied."""
    module = sys.modules["miniplm.kernels.swiglu"]  # the package's attribute of that name is the function
    seen, launch = [], module._launch

    def remember_tensors(kernel, name, tensors, strides):
        seen.append(tensors)
        launch(kernel, name, tensors, strides)

    monkeypatch.setattr(module, "_launch", remember_tensors)
    both = torch.randn(2, 9, 62, device=device)
    swiglu(*both.chunk(2, -1)), swiglu(both)
    for gate, up, _ in seen:
        assert gate.data_ptr() == both.data_ptr() and up.data_ptr() == both.data_ptr() + 31 * 4
    assert len(seen) == 2


def test_offsets_beyond_int32(far_apart):
    both, grad = far_apart(3, 32), far_apart(3, 16)
    expected = run(swiglu, [both.contiguous()], [grad.contiguous()])
    assert_equal_everywhere(run(swiglu, [both], [grad]), expected)
