"""apply_rotary in Triton: both halves of every head of q and k turned by the angle of their token's position,
in one launch.

    a = position · inv_freq_i
    (x_i, x_{i + D/2}) → (x_i cos a − x_{i + D/2} sin a,  x_{i + D/2} cos a + x_i sin a)

T tokens, Hq and Hk heads of q and k, D head dimension. The inverse turns by −a; it is also the backward pass.

A program computes the cosines and sines of BLOCK_T tokens once, in float32 registers, and applies them to
BLOCK_H heads one after the other; heads 0 … Hq − 1 are q's, the others k's. q and k are read where they lie
(any strides of token and head, as views of a fused projection have them) and written contiguous.

Bytes moved: 2·T·(Hq + Hk)·D·itemsize and a few per token.
The angle is one float32 product, as in the reference. Its sine and cosine are those of the accurate libraries
(libdevice's sinf and cosf on NVIDIA, ocml's on AMD; no fast-math approximation): for large angles they reduce
the argument with as many digits of 2/π as it takes, and so they are right at any position.
Source of the formula: Su et al. 2021, arXiv 2104.09864; the pairing of i with i + D/2 is transformers'.
"""

import torch
import triton
import triton.language as tl

from . import dispatch, tuning
from .tiles import BATCH_SIZES


@triton.jit
def _turn(x_ptr, out_ptr, cos, sin, mask, HALF: tl.constexpr):
    """Turn the pairs at the pointers x_ptr and x_ptr + HALF, both [BLOCK_T, BLOCK_F]."""
    dtype = out_ptr.dtype.element_ty
    first = tl.load(x_ptr, mask=mask).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask=mask).to(tl.float32)
    tl.store(out_ptr, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out_ptr + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _rotary_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    inv_freq_ptr,
    q_out_ptr,
    k_out_ptr,
    T,
    Hq,
    Hk,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    groups = tl.cdiv(Hq + Hk, BLOCK_H)  # of heads; a program's number is (block of tokens, group)
    block, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    token = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    position = tl.load(positions_ptr + token, mask=token < T, other=0).to(tl.float32)
    token = token[:, None]
    pair = tl.arange(0, BLOCK_F)[None, :]
    mask = (token < T) & (pair < HALF)
    inv_freq = tl.load(inv_freq_ptr + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    angle = position[:, None] * inv_freq  # [BLOCK_T, BLOCK_F]
    sin, cos = tl.sin(angle), tl.cos(angle)
    if INVERSE:
        sin = -sin
    first = group * BLOCK_H
    for head in range(first, tl.minimum(first + BLOCK_H, Hq + Hk)):
        if head < Hq:
            x = token * stride_qt + tl.cast(head, tl.int64) * stride_qh + pair
            out = (token * Hq + head) * (2 * HALF) + pair
            _turn(q_ptr + x, q_out_ptr + out, cos, sin, mask, HALF)
        else:
            key_head = head - Hq
            x = token * stride_kt + tl.cast(key_head, tl.int64) * stride_kh + pair
            out = (token * Hk + key_head) * (2 * HALF) + pair
            _turn(k_ptr + x, k_out_ptr + out, cos, sin, mask, HALF)


def _contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], copied only if its heads are not contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()


def _examples(make):
    positions = make(4096, dtype=torch.int64)
    return [
        (
            make(4096, heads, dim, dtype=dtype),
            make(4096, 4, dim, dtype=dtype),
            positions,
            make(dim // 2, dtype=torch.float32),
            inverse,
        )
        for heads, dim, dtype, inverse in [
            (12, 64, torch.bfloat16, False),
            (12, 64, torch.bfloat16, True),
            (16, 96, torch.bfloat16, False),
            (16, 128, torch.bfloat16, False),
            (16, 128, torch.float32, False),
        ]
    ]


@dispatch.triton("rotary", _examples)
def rotary(q, k, positions, inv_freq, inverse):
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    q, k = _contiguous_heads(q), _contiguous_heads(k)
    positions, inv_freq = positions.contiguous(), inv_freq.contiguous()
    tokens, heads, dim = q.shape
    key_heads = k.shape[1]

    def run(config):
        blocks = triton.cdiv(tokens, config.blocks["BLOCK_T"])
        groups = triton.cdiv(heads + key_heads, config.blocks["BLOCK_H"])
        _rotary_kernel[(blocks * groups,)](
            q,
            k,
            positions,
            inv_freq,
            q_out,
            k_out,
            tokens,
            heads,
            key_heads,
            *q.stride()[:2],
            *k.stride()[:2],
            INVERSE=inverse,
            HALF=dim // 2,
            BLOCK_F=triton.next_power_of_2(dim // 2),
            **config.options,
        )

    if tokens and dim and heads + key_heads:
        tuning.launch("rotary", run, q.device, dim=dim, itemsize=q.itemsize)
    return q_out, k_out
