"""Equal inputs give equal bits: whatever lay in memory before, and in whatever order a kernel's programs
run."""

import pytest
import torch
from checks import assert_equal_everywhere
from miniplm.kernels import dispatch, reference, reference_head
from random_inputs import op_arguments
from torch.utils._python_dispatch import TorchDispatchMode

EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


class MemoryHeld(TorchDispatchMode):
    """New memory holds this number."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result.fill_(self.number) if function.overloadpacket in EMPTY else result


def turn_programs_around(monkeypatch):
    """Triton's interpreter, which runs the programs of a grid one after the other, begins with the last."""
    from triton.runtime.interpreter import interpreter_builder

    real = interpreter_builder.set_grid_idx

    def set_grid_idx(*position):
        sizes = interpreter_builder.grid_dim
        real(*(size - 1 - i for size, i in zip(sizes, position, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)


ONE_PASS = pytest.param("flash_attention_backward", "one_pass", id="flash_attention_backward-one_pass")


@pytest.mark.parametrize(
    "name, implementation",
    [*((name, way) for name in op_arguments() for way in ("reference", "triton")), ONE_PASS],
    indirect=["implementation"],
)
def test_equal_inputs_give_equal_bits(name, implementation, monkeypatch):
    arguments = op_arguments(tokens=70, vocabulary=150, device=implementation.device)[name]
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    in_torch = getattr(reference_head, name, None) or getattr(reference, name)
    op = dispatch.implementation(name, in_torch, arguments[0])
    assert (op is in_torch) == (implementation.name == "reference")
    with MemoryHeld(3):
        first = op(*arguments)
    if implementation == ("triton", "cpu", torch.float32):
        turn_programs_around(monkeypatch)
    with MemoryHeld(-11):
        second = op(*arguments)
    assert_equal_everywhere(second, first)
