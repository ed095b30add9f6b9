"""swiglu in Triton: out = silu(gate) · up with silu(g) = g · σ(g), σ(g) = 1 / (1 + e^−g), forward and
backward.

    dgate = grad · up · σ (1 + gate (1 − σ))        dup = grad · gate · σ

R rows, f their width. A program takes BLOCK_R × BLOCK_F elements; every element is read once and written
once, and the backward pass computes σ again instead of saving it. gate and up are any two matrices with
contiguous rows: two tensors, or the halves of one [R, 2f] tensor, whose gradients are then written as halves
of one.

Bytes moved: forward 3·R·f·itemsize, backward 5·R·f·itemsize; 16 bytes per access where f and the strides are
multiples of 16 elements. Source of the formula: Shazeer 2020, arXiv 2002.05202.
"""

import math

import torch
import triton
import triton.language as tl

from . import dispatch, tuning
from .tiles import BATCH_SIZES, LOG2_E, contiguous_rows


@triton.jit
def _locate(R, f, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """The rows [BLOCK_R, 1], the columns [1, BLOCK_F] and the mask of a program's tile."""
    tiles_f = tl.cdiv(f, BLOCK_F)
    tile_r, tile_f = tl.program_id(0) // tiles_f, tl.program_id(0) % tiles_f
    row = tile_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return row, column, (row < R) & (column < f)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, R, f, stride_gr, stride_ur, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    row, column, mask = _locate(R, f, BLOCK_R, BLOCK_F)
    gate = tl.load(gate_ptr + row * stride_gr + column, mask=mask).to(tl.float32)  # [BLOCK_R, BLOCK_F]
    up = tl.load(up_ptr + row * stride_ur + column, mask=mask).to(tl.float32)
    out = gate / (1 + tl.exp2(gate * -LOG2_E)) * up
    tl.store(out_ptr + row * f + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    R,
    f,
    stride_or,
    stride_gr,
    stride_ur,
    stride_dr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, column, mask = _locate(R, f, BLOCK_R, BLOCK_F)
    grad = tl.load(grad_ptr + row * stride_or + column, mask=mask).to(tl.float32)  # [BLOCK_R, BLOCK_F]
    gate = tl.load(gate_ptr + row * stride_gr + column, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + row * stride_ur + column, mask=mask).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp2(gate * -LOG2_E))
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * gate * sigmoid
    dtype = grad_gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * stride_dr + column, grad_gate.to(dtype), mask=mask)
    tl.store(grad_up_ptr + row * stride_dr + column, grad_up.to(dtype), mask=mask)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., f] as [R, f] with contiguous rows; copied only where its strides leave no other way."""
    return contiguous_rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def _halves(x: torch.Tensor):
    width = x.shape[-1] // 2
    return x[..., :width], x[..., width:]


def _launch(kernel, name: str, tensors, strides):
    """Run a kernel over the shape of the first tensor, [R, f]."""
    rows, width = tensors[0].shape

    def run(config):
        programs = triton.cdiv(rows, config.blocks["BLOCK_R"]) * triton.cdiv(width, config.blocks["BLOCK_F"])
        kernel[(programs,)](*tensors, rows, width, *strides, **config.options)

    if rows and width:
        tuning.launch(name, run, tensors[0].device, itemsize=tensors[0].itemsize)


def _examples(make):
    return [
        (make(4096, 2112), make(4096, 2112)),
        (make(4096, 2 * 2112), None),
        (make(4096, 1408, dtype=torch.float32), make(4096, 1408, dtype=torch.float32)),
    ]


def _backward_examples(make):
    examples = []
    for gate, up in _examples(make):
        width = gate.shape[1] if up is not None else gate.shape[1] // 2
        examples.append((make(4096, width, dtype=gate.dtype), gate, up))
    return examples


@dispatch.triton("swiglu", _examples)
def swiglu(gate, up):
    gate, up = _halves(gate) if up is None else (gate, up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up = _rows(gate), _rows(up)
    _launch(_forward_kernel, "swiglu", (gate, up, out.view(gate.shape)), (gate.stride(0), up.stride(0)))
    return out


@dispatch.triton("swiglu_backward", _backward_examples)
def swiglu_backward(grad, gate, up):
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if up is None:
        grad_up = gate.new_empty(0)
        gate, up = _halves(gate)
        results = _halves(_rows(grad_gate))
    else:
        grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
        results = _rows(grad_gate), _rows(grad_up)
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    strides = grad.stride(0), gate.stride(0), up.stride(0), results[0].stride(0)
    _launch(_backward_kernel, "swiglu_backward", (grad, gate, up, *results), strides)
    return grad_gate, grad_up
