"""rms_norm and add_rms_norm on Triton: tiles of rows, wide rows, offsets."""

import pytest
import torch
from checks import assert_accurate_everywhere, assert_equal_everywhere, run
from miniplm.kernels import add_rms_norm, rms_norm, tuning
from oracles import plain_add_rms_norm, plain_rms_norm
from random_inputs import on, random

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows(dtype, device):
    """Every program takes several tiles of rows, and the sum for the weight spans them all."""
    x, weight, grad = on(device, random(1027, 33), random(33), 1 + random(1027, 33))
    assert_accurate_everywhere(rms_norm, plain_rms_norm, [x, weight], [grad], dtype)


def test_offsets_beyond_int32(far_apart, device):
    inputs = [far_apart(3, 16), far_apart(3, 16), random(16).to(device, torch.float16)]
    grads = [far_apart(3, 16), far_apart(3, 16)]
    found = run(add_rms_norm, inputs, grads)
    expected = run(add_rms_norm, [x.contiguous() for x in inputs], [g.contiguous() for g in grads])
    assert_equal_everywhere(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 1000, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wide_rows_on_a_gpu(width, dtype, device):
    x, residual = random(301, width), random(301, width)
    if dtype is not torch.float32:
        x, residual = (value.mul(8).round() / 8 for value in (x, residual))
    inputs, grad = on(device, x, residual, random(width)), random(301, width).to(device)
    assert_accurate_everywhere(add_rms_norm, plain_add_rms_norm, inputs, [grad, grad], dtype)


@pytest.mark.parametrize("where", [tuning.INTERPRETER, tuning.Target("cuda", 90, 132)], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_backward"])
def test_blocks_hold_a_row(name, where):
    """What every launch takes for granted."""
    for width in (1, 5, 64, 96, 768, 1000, 1536, 4096, 8192, 16384, 20000):
        for itemsize in (2, 4):
            for config in tuning.CANDIDATES[name](where, width=width, itemsize=itemsize):
                assert width <= config.blocks["BLOCK_D"] < max(32, 2 * width)
                assert config.blocks["BLOCK_R"] >= 1
