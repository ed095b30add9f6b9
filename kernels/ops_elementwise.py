"""The public ops on rows and elements: rms_norm, add_rms_norm, apply_rotary, swiglu, quantize_rows.

What they take and give, their checks, and their registration with torch.library. T tokens, d and f widths,
H heads, D head dimension, R rows.
"""

from typing import Optional

import torch
from torch import Tensor

from . import reference
from .checks import FLOATS, autocast, autocast_dtype, check_tensor, contiguous_like, empty_statistic
from .dispatch import Context, register

# --- norms ---


def _norm_arguments(weight: Tensor, *activations: Tensor) -> tuple[torch.dtype, tuple[Tensor, ...]]:
    """(the result's dtype, (weight, *activations) as the norm takes them). The dtype is autocast's, else that
    of 16 bits if an argument has it; what is float32 stays so."""
    tensors = weight, *activations
    if dtype := autocast_dtype(activations[0]):
        return dtype, tuple(x if x.dtype == torch.float32 else x.to(dtype) for x in tensors)
    for x in (*activations, weight):
        if x.itemsize == 2:
            return x.dtype, tensors
    return activations[0].dtype, tensors


def _norm_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a norm takes beside a result of `dtype`."""
    return (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)


def _rms_norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_residual: Optional[Tensor],
    low_precision_dtype: Optional[torch.dtype],
) -> tuple[Tensor, Tensor, Tensor]:
    low_precision = contiguous_like(x, low_precision_dtype) if low_precision_dtype else weight.new_empty(0)
    return contiguous_like(x), low_precision, contiguous_like(weight)


_RMS_NORM_BACKWARD = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_residual, "
    "ScalarType? low_precision_dtype) -> (Tensor, Tensor, Tensor)",
    reference.rms_norm_backward,
    _rms_norm_backward_fake,
)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return contiguous_like(x, dtype), empty_statistic(x, *x.shape[:-1], 1)


def _rms_norm_setup(
    ctx: Context, inputs: tuple[Tensor, Tensor, float, torch.dtype], output: tuple[Tensor, Tensor]
) -> None:
    x, weight, _, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_x, _, grad_weight = _RMS_NORM_BACKWARD(grad, *ctx.saved_tensors, None, None)
    return grad_x, grad_weight, None, None


_RMS_NORM = register(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    reference.rms_norm,
    _rms_norm_fake,
    _rms_norm_backward,
    _rms_norm_setup,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        x: [..., d]. weight: [d]. Of one dtype, or one of them float32 beside 16 bits; under autocast what is
            float32 stays so.
    Returns: [..., d], of the narrower dtype, under autocast of autocast's.
    """
    dtype, (weight, x) = _norm_arguments(weight, x)
    check_tensor("x", x, (..., None), FLOATS)
    check_tensor("weight", weight, x.shape[-1:], _norm_dtypes(dtype), x)
    return _RMS_NORM(x, weight, eps, dtype)[0]


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = contiguous_like(x, torch.promote_types(x.dtype, residual.dtype))
    return contiguous_like(x, dtype), total, empty_statistic(x, *x.shape[:-1], 1)


def _add_rms_norm_setup(
    ctx: Context,
    inputs: tuple[Tensor, Tensor, Tensor, float, torch.dtype],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, residual, weight, _, ctx.dtype = inputs
    _, total, rstd = output
    ctx.input_dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(total, weight, rstd)
    # The last norm of a model leaves the sum unused: no zeros are made and read for its gradient.
    ctx.set_materialize_grads(False)


def _add_rms_norm_backward(
    ctx: Context, grad: Optional[Tensor], grad_residual: Optional[Tensor], _: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    total, weight, rstd = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(total, dtype=ctx.dtype)
    # The gradient of the sum is that of x and of residual: once more in the dtype of the narrower one.
    low_precision_dtype = next((dtype for dtype in ctx.input_dtypes if dtype != total.dtype), None)
    grad_total, grad_low_precision, grad_weight = _RMS_NORM_BACKWARD(
        grad, total, weight, rstd, grad_residual, low_precision_dtype
    )
    of_x, of_residual = (
        grad_total if dtype == total.dtype else grad_low_precision for dtype in ctx.input_dtypes
    )
    return of_x, of_residual, grad_weight, None, None


_ADD_RMS_NORM = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    reference.add_rms_norm,
    _add_rms_norm_fake,
    _add_rms_norm_backward,
    _add_rms_norm_setup,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The residual stream's step: (rms_norm(x + residual, weight, eps), x + residual).

    Args:
        x, residual: [..., d]. weight: [d]. Of one dtype, or some of 16 bits and the others float32; under
            autocast what is float32 stays so. The sum is float32 if x or residual is, and normed as it is
            then.
    Returns: both [..., d], the first of the narrowest dtype, under autocast of autocast's.
    """
    dtype, (weight, x, residual) = _norm_arguments(weight, x, residual)
    check_tensor("x", x, (..., None), FLOATS)
    check_tensor("x", x, x.shape, _norm_dtypes(dtype))
    check_tensor("weight", weight, x.shape[-1:], _norm_dtypes(dtype), x)
    check_tensor("residual", residual, x.shape, _norm_dtypes(dtype), x)
    normed, total, _ = _ADD_RMS_NORM(x, residual, weight, eps, dtype)
    return normed, total


# --- rotary ---


def _rotary_fake(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return contiguous_like(q), contiguous_like(k)


def _rotary_setup(
    ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]
) -> None:
    _, _, positions, inv_freq, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq)


def _rotary_backward(ctx: Context, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    positions, inv_freq = ctx.saved_tensors
    grad_q, grad_k = _ROTARY(grad_q, grad_k, positions, inv_freq, not ctx.inverse)
    return grad_q, grad_k, None, None, None


_ROTARY = register(
    "rotary(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, bool inverse) -> (Tensor, Tensor)",
    reference.rotary,
    _rotary_fake,
    _rotary_backward,
    _rotary_setup,
)


def apply_rotary(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), rotate-half convention: dimensions i and
    i + D/2 are a pair, rotated by the angle positions · inv_freq[i].

    Args:
        q: [T, Hq, D]. k: [T, Hk, D], of q's dtype. positions: [T] int64 or int32. inv_freq: [D/2] float32 (or
            float64), radians per position; it gets no gradient.
    Returns: (q, k) rotated.
    """
    q, k = autocast(q, k)
    check_tensor("q", q, (None, None, None), FLOATS)
    tokens, _, dim = q.shape
    if dim % 2:
        raise ValueError(f"q has shape {list(q.shape)}; its last size must be even")
    check_tensor("k", k, (tokens, None, dim), (q.dtype,), q)
    check_tensor("positions", positions, (tokens,), (torch.int64, torch.int32), q)
    check_tensor("inv_freq", inv_freq, (dim // 2,), (torch.float32, torch.float64), q)
    return _ROTARY(q, k, positions, inv_freq, False)


# --- SwiGLU ---


def _swiglu_backward_fake(grad: Tensor, gate: Tensor, up: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    return contiguous_like(gate), gate.new_empty(0) if up is None else contiguous_like(up)


_SWIGLU_BACKWARD = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    reference.swiglu_backward,
    _swiglu_backward_fake,
)


def _swiglu_fake(gate: Tensor, up: Optional[Tensor]) -> Tensor:
    if up is None:
        return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // 2)
    return contiguous_like(gate)


def _swiglu_setup(ctx: Context, inputs: tuple[Tensor, Optional[Tensor]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Optional[Tensor]]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = _SWIGLU_BACKWARD(grad, gate, up)
    return grad_gate, None if up is None else grad_up


_SWIGLU = register(
    "swiglu(Tensor gate, Tensor? up) -> Tensor",
    reference.swiglu,
    _swiglu_fake,
    _swiglu_backward,
    _swiglu_setup,
)


def swiglu(gate: Tensor, up: Optional[Tensor] = None) -> Tensor:
    """gate · sigmoid(gate) · up (Shazeer 2020, arXiv 2002.05202).

    Args:
        gate, up: [..., f], of one dtype. Without `up`, gate is [..., 2f] and holds both side by side, gate
            first, as one matrix product leaves them; its gradient is one such tensor.
    Returns: [..., f].
    """
    if up is None:
        (gate,) = autocast(gate)
        check_tensor("gate", gate, (..., None), FLOATS)
        if gate.shape[-1] % 2:
            raise ValueError(f"gate has shape {list(gate.shape)}; without up its last size must be even")
        return _SWIGLU(gate, None)
    gate, up = autocast(gate, up)
    check_tensor("gate", gate, (..., None), FLOATS)
    check_tensor("up", up, gate.shape, (gate.dtype,), gate)
    return _SWIGLU(gate, up)


# --- float8 ---


def _quantize_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return contiguous_like(x, torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


_QUANTIZE_ROWS = register(
    "quantize_rows(Tensor x) -> (Tensor, Tensor)", reference.quantize_rows, _quantize_rows_fake
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of a matrix in float8, scaled so that its largest magnitude is the largest of e4m3
    (Micikevicius et al. 2022, arXiv 2209.05433).

    Args:
        x: [R, d]. Autocast does not change it, and it gets no gradient: an op for inference.
    Returns: (rows [R, d] float8_e4m3fn, scale [R, 1] float32): rows · scale is x, to within 2⁻⁴ of each
        element or 2⁻¹⁰ of scale. A row with an infinity or a NaN gives NaN.
    """
    check_tensor("x", x, (None, None), FLOATS)
    return _QUANTIZE_ROWS(x)
