"""rms_norm and add_rms_norm in Triton, forward and backward.

    s = x (+ residual)        r = 1 / √(mean_d s² + eps)        out = s · r · w

    with n = s · r and g the gradient of out:        ds = r · (g·w − n · mean_d(g·w·n)) (+ gradient of s)
    dw = Σ_rows g · n

R rows, d their width, w [d]. A program holds whole rows in registers, several where they are narrow, so each
input is read once and each output written once:

    rms_norm        2·R·d elements (s; out)
    add_rms_norm    4·R·d (x, residual; s, out)
    backward        3·R·d (g, s; ds), 4·R·d with the gradient of s

and 4·R bytes of r. s may be float32 beside 16-bit g, w and out; the backward pass then writes ds in both
types if both are asked for. The backward grid just fills the GPU: a program walks over every programs-th tile
of rows and keeps its own sum for dw, written once as a row of [programs, d] float32; a second kernel adds
those rows in a fixed order. So equal inputs give equal bits on one GPU. Rows of more than 32 KiB of s leave
no registers for the sum: a kernel of its own reads g and s once more for it.

Rows may be [A, H, d] with a stride for A and one for H: heads within the output of a fused projection are
normed where they lie. Source of the formula: Zhang & Sennrich 2019, arXiv 1910.07467. The float32 partial
sums of dw per program are as in quack and Liger.
"""

import torch
import triton
import triton.language as tl

from . import dispatch, tuning
from .tiles import BATCH_SIZES


@triton.jit
def _locate(tile, R, H, d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows as number [BLOCK_R], and as (a, h) of [A, H, d], each [BLOCK_R, 1]; the columns [1, BLOCK_D];
    the mask."""
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    a, h = row // H, row % H
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < R)[:, None] & (column < d)
    return row.to(tl.int64), a.to(tl.int64)[:, None], h.to(tl.int64)[:, None], column, mask


@triton.jit
def _load(ptr, a, h, column, stride_a, stride_h, mask):
    """The elements [a, h, column] of a tensor [A, H, d], in float32, 0 where masked."""
    return tl.load(ptr + a * stride_a + h * stride_h + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, row, column, d, mask):
    """Write to the elements [row, column] of a contiguous [R, d], in its dtype."""
    tl.store(ptr + row[:, None] * d + column, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rstd_ptr,
    R,
    H,
    d,
    eps,
    stride_xa,
    stride_xh,
    stride_ra,
    stride_rh,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, a, h, column, mask = _locate(tl.program_id(0), R, H, d, BLOCK_R, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < d, other=0.0).to(tl.float32)  # [1, BLOCK_D]
    total = _load(x_ptr, a, h, column, stride_xa, stride_xh, mask)  # [BLOCK_R, BLOCK_D]
    if ADD:
        total += _load(residual_ptr, a, h, column, stride_ra, stride_rh, mask)
        rounded = total.to(total_ptr.dtype.element_ty)  # what is normed is what is kept
        _store(total_ptr, rounded, row, column, d, mask)
        total = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(total * total, 1) / d + eps)  # [BLOCK_R]
    _store(out_ptr, total * rstd[:, None] * weight, row, column, d, mask)
    tl.store(rstd_ptr + row, rstd, mask=row < R)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_residual_ptr,
    dx_ptr,
    dx_low_precision_ptr,
    partial_ptr,
    R,
    H,
    d,
    stride_ga,
    stride_gh,
    stride_xa,
    stride_xh,
    stride_ra,
    stride_rh,
    ADD: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)[None, :]
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        row, a, h, _, mask = _locate(tile, R, H, d, BLOCK_R, BLOCK_D)
        grad = _load(grad_ptr, a, h, column, stride_ga, stride_gh, mask)  # [BLOCK_R, BLOCK_D]
        x = _load(x_ptr, a, h, column, stride_xa, stride_xh, mask)
        if ADD:
            dx = _load(grad_residual_ptr, a, h, column, stride_ra, stride_rh, mask)
        else:
            dx = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < R, other=0.0)[:, None]
        # [1, BLOCK_D], each time from the L1 cache: registers are short.
        weight = tl.load(weight_ptr + column, mask=column < d, other=0.0).to(tl.float32)
        normed, weighted = x * rstd, grad * weight
        dx += rstd * (weighted - normed * (tl.sum(normed * weighted, 1, keep_dims=True) / d))
        if SUM:
            grad_weight += grad * normed
        _store(dx_ptr, dx, row, column, d, mask)
        if LOW_PRECISION:
            _store(dx_low_precision_ptr, dx, row, column, d, mask)
    if SUM:
        partial = tl.sum(grad_weight, 0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * d + column, partial, mask=column < d)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _weight_kernel(
    grad_ptr,
    x_ptr,
    rstd_ptr,
    partial_ptr,
    R,
    H,
    d,
    stride_ga,
    stride_gh,
    stride_xa,
    stride_xh,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The partial sums of dw for rows that are too wide to keep beside them: program (c, p) adds columns
    block c of every P-th tile of rows."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(R, BLOCK_R), tl.num_programs(1)):
        row, a, h, _, _ = _locate(tile, R, H, d, BLOCK_R, BLOCK_D)
        mask = (row < R)[:, None] & (column < d)
        grad = _load(grad_ptr, a, h, column, stride_ga, stride_gh, mask)  # [BLOCK_R, BLOCK_D]
        x = _load(x_ptr, a, h, column, stride_xa, stride_xh, mask)
        grad_weight += grad * (x * tl.load(rstd_ptr + row, mask=row < R, other=0.0)[:, None])
    partial = tl.sum(grad_weight, 0, keep_dims=True)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * d + column, partial, mask=column < d)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _sum_kernel(partial_ptr, out_ptr, P, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [d] = Σ over the rows of partial [P, d]."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(0, P, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)[:, None]
        mask = (row < P) & (column < d)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64) * d + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < d)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., d] as [A, H, d] with contiguous rows; copied only where its strides leave no other way."""
    if x.dim() != 3:
        x = x.reshape(x.numel() // max(1, x.shape[-1]), 1, x.shape[-1])
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _forward(x, residual, weight, eps, dtype):
    """(out, total, rstd); total is None without a residual."""
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    total = None
    if residual is not None:
        wide = torch.promote_types(x.dtype, residual.dtype)
        total = torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)
    itemsize = (x if total is None else total).itemsize
    x, weight = _rows(x), weight.contiguous()
    other = x if residual is None else _rows(residual)
    heads, width = x.shape[1:]
    rows = x.shape[0] * heads

    def run(config):
        _forward_kernel[(triton.cdiv(rows, config.blocks["BLOCK_R"]),)](
            x,
            other,
            weight,
            out,
            total if total is not None else out,
            rstd,
            rows,
            heads,
            width,
            eps,
            *x.stride()[:2],
            *other.stride()[:2],
            ADD=total is not None,
            **config.options,
        )

    if rows:
        tuning.launch("rms_norm", run, x.device, width=width, itemsize=itemsize)
    return out, total, rstd


def _examples(make):
    def example(rows, width, x, weight):
        dtype = torch.bfloat16 if torch.bfloat16 in (x, weight) else x
        return make(rows, width, dtype=x), make(width, dtype=weight), 1e-6, dtype

    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        example(65536, 128, bf16, bf16),
        example(4096, 768, bf16, bf16),
        example(4096, 768, fp32, bf16),
        example(4096, 768, bf16, fp32),
        (make(4096, 768, dtype=fp32), make(768, dtype=fp32), 1e-6, bf16),
        example(4096, 16384, bf16, bf16),
        example(4096, 16384, fp32, fp32),
    ]


@dispatch.triton("rms_norm", _examples)
def rms_norm(x, weight, eps, dtype):
    out, _, rstd = _forward(x, None, weight, eps, dtype)
    return out, rstd


def _add_examples(make):
    return [(make(*x.shape), x, weight, eps, dtype) for x, weight, eps, dtype in _examples(make)[1:6]]


@dispatch.triton("add_rms_norm", _add_examples)
def add_rms_norm(x, residual, weight, eps, dtype):
    return _forward(x, residual, weight, eps, dtype)


def _backward_examples(make):
    for x, weight, _, dtype in _examples(make):
        rstd = make(x.shape[0], 1, dtype=torch.float32)
        grad, grad_residual = make(*x.shape, dtype=dtype), make(*x.shape, dtype=x.dtype)
        yield grad, x, weight, rstd, None, None
        yield grad, x, weight, rstd, grad_residual, dtype if x.dtype != dtype else None


@dispatch.triton("rms_norm_backward", _backward_examples)
def rms_norm_backward(grad, x, weight, rstd, grad_residual, low_precision_dtype):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dx_low_precision = weight.new_empty(0)
    if low_precision_dtype is not None:
        dx_low_precision = torch.empty_like(dx, dtype=low_precision_dtype)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad, x, weight, rstd = _rows(grad), _rows(x), weight.contiguous(), rstd.contiguous()
    other = grad if grad_residual is None else _rows(grad_residual)
    heads, width = x.shape[1:]
    rows, processors = x.shape[0] * heads, tuning.target(x.device).processors

    def run(config):
        programs = min(processors * config.per_processor, triton.cdiv(rows, config.blocks["BLOCK_R"]))
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        if programs:
            _backward_kernel[(programs,)](
                grad,
                x,
                weight,
                rstd,
                other,
                dx,
                dx_low_precision if low_precision_dtype is not None else dx,
                partial,
                rows,
                heads,
                width,
                *grad.stride()[:2],
                *x.stride()[:2],
                *other.stride()[:2],
                ADD=grad_residual is not None,
                LOW_PRECISION=low_precision_dtype is not None,
                **config.options,
            )
            if not config.blocks["SUM"]:
                _weight_kernel[(triton.cdiv(width, 256), programs)](
                    grad,
                    x,
                    rstd,
                    partial,
                    rows,
                    heads,
                    width,
                    *grad.stride()[:2],
                    *x.stride()[:2],
                    BLOCK_R=8,
                    BLOCK_D=256,
                )
        _sum_kernel[(triton.cdiv(width, 32),)](partial, grad_weight, programs, width, BLOCK_P=128, BLOCK_D=32)

    tuning.launch("rms_norm_backward", run, x.device, width=width, itemsize=x.itemsize)
    return dx, dx_low_precision, grad_weight
