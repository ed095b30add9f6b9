"""quantize_rows in Triton: every row of a matrix in float8 (e4m3), with a scale of its own.

    scale = max_d |x| / 448        rows = x · (448 / max_d |x|), rounded to the nearest e4m3, ties to even

R rows, d their width. A program holds whole rows in registers: R·d·(itemsize + 1) bytes and 4·R of scales are
moved, once. The rounding is integer arithmetic on the float32's bits, some ten operations an element, which
the memory leaves time for (18 in bfloat16 on an H200, by count): the same bits on every GPU, also on those
without float8, and in the interpreter, whose own conversion to float8 loses carries.
"""

import torch
import triton
import triton.language as tl

from . import dispatch, tuning
from .reference import E4M3_LARGEST, E4M3_SMALLEST_ROW
from .tiles import BATCH_SIZES, contiguous_rows

LARGEST, SMALLEST_ROW = tl.constexpr(E4M3_LARGEST), tl.constexpr(E4M3_SMALLEST_ROW)


@triton.jit
def _e4m3(x):
    """The bytes of float32 x in e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; what rounds to more
    than 448 becomes NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # To three bits of mantissa, ties to even, and the bias from 127 to 7.
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    # Below 2^-6 e4m3 counts in steps of 2^-9, as float32 does from 2^14 on.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    return (sign | tl.where(magnitude < (121 << 23), subnormal, tl.minimum(normal, 0x7F))).to(tl.uint8)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _quantize_kernel(
    x_ptr, rows_ptr, scale_ptr, R, d, stride_x, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < R)[:, None] & (column < d)
    x = tl.load(x_ptr + row[:, None] * stride_x + column, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_D]
    x = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST_ROW)  # [BLOCK_R]
    # As PyTorch computes 448 / largest, so that the bytes are those of the reference.
    inverse = tl.div_rn(1.0, largest) * LARGEST
    tl.store(rows_ptr + row[:, None] * d + column, _e4m3(x * inverse[:, None]), mask=mask)
    tl.store(scale_ptr + row, tl.div_rn(largest, LARGEST), mask=row < R)


@dispatch.triton(
    "quantize_rows",
    lambda make: [
        (make(4096, 2048),),
        (make(4096, 5504),),
        (make(4096, 768, dtype=torch.float32),),
        (make(4096, 16384, dtype=torch.float32),),
    ],
)
def quantize_rows(x):
    x = contiguous_rows(x)
    height, width = x.shape
    rows = torch.empty(height, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(height, 1, dtype=torch.float32, device=x.device)

    def run(config):
        _quantize_kernel[(triton.cdiv(height, config.blocks["BLOCK_R"]),)](
            x, rows.view(torch.uint8), scale, height, width, x.stride(0), **config.options
        )

    if height:
        tuning.launch("quantize_rows", run, x.device, width=width, itemsize=x.itemsize)
    return rows, scale
