"""Every op in plain PyTorch: the mathematics, the CPU path, and (in float64) the truth of the tests.

Here rows and elements, and attention; the head is in reference_head.py. Statistics, softmaxes and sums are in
float32, or in float64 for float64 inputs. On a GPU these functions work, but attention makes the host wait
for it: documents are walked one by one.

T tokens, d hidden width, H heads, D head dimension, B documents.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_LARGEST = 448.0  # the largest number of float8 e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)
E4M3_SMALLEST_ROW = 1e-12  # a row whose largest magnitude is below it is scaled as if it were that


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


# --- norms, rotary, SwiGLU ---


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / rms(x) · weight with rms(x) = √(mean x² + eps). Returns (that, in dtype; 1 / rms [..., 1])."""
    x32 = x.to(accumulate_dtype(x))
    rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x32 * rstd).mul_(weight).to(dtype).contiguous(), rstd


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_residual: Optional[Tensor],
    low_precision_dtype: Optional[torch.dtype],
) -> tuple[Tensor, Tensor, Tensor]:
    """With r = rstd, dx = r · g·w − x · r³/d · Σ_d g·w·x and dw = Σ g·x·r; grad_residual, if given, is added
    to dx.

    Returns (dx, dx again in the dtype `low_precision_dtype`, empty if None, dw).
    """
    dtype, width = rstd.dtype, x.shape[-1]
    grad32, x32, rstd = grad.reshape(-1, width).to(dtype), x.reshape(-1, width).to(dtype), rstd.reshape(-1, 1)
    product = torch.mul(x32, rstd).mul_(grad32)
    grad_weight = product.sum(0)
    projection = (product @ weight.to(dtype))[:, None].mul_(rstd.square()).div_(-width)
    dx = torch.mul(grad32, weight, out=product).mul_(rstd).addcmul_(x32, projection).view(x.shape)
    if grad_residual is not None:
        dx += grad_residual
    dx_low_precision = weight.new_empty(0)
    if low_precision_dtype is not None:
        dx_low_precision = dx.to(low_precision_dtype, copy=True)
    return dx.to(x.dtype), dx_low_precision, grad_weight.to(weight.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(rms_norm(x + residual) in dtype, x + residual, 1 / rms)."""
    total = x + residual
    normed, rstd = rms_norm(total, weight, eps, dtype)
    return normed, total.contiguous(), rstd


def rotary(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x_i, x_{i + D/2}) by the angle positions · inv_freq_i, or back by it if `inverse`."""
    dtype, half = accumulate_dtype(q), len(inv_freq)
    angles = positions.to(dtype)[:, None, None] * inv_freq.to(dtype)
    cos, sin = torch.cat((angles, angles), -1).cos_(), angles.sin()
    sign = -1 if inverse else 1

    def rotate(x: Tensor) -> Tensor:
        x32 = x.to(dtype)
        rotated = torch.mul(x32, cos).contiguous()
        rotated[..., :half].addcmul_(x32[..., half:], sin, value=-sign)
        rotated[..., half:].addcmul_(x32[..., :half], sin, value=sign)
        return rotated.to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Optional[Tensor]) -> Tensor:
    """gate · sigmoid(gate) · up; without up, of the two halves of gate."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    dtype = accumulate_dtype(gate)
    return F.silu(gate.to(dtype)).mul_(up).to(gate.dtype).contiguous()


def swiglu_backward(grad: Tensor, gate: Tensor, up: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """dgate = grad · up · silu'(gate), dup = grad · silu(gate); without up, both side by side, and an empty
    second result."""
    if up is None:
        first, second = gate.chunk(2, -1)
        return torch.cat(swiglu_backward(grad, first, second), -1), gate.new_empty(0)
    dtype = accumulate_dtype(gate)
    grad32, gate32 = grad.to(dtype), gate.to(dtype)
    grad_gate = grad32 * up
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate32, grad_input=grad_gate)
    grad_up = F.silu(gate32).mul_(grad32)
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()


# --- float8 ---


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x · 448 / largest, rounded to e4m3 [R, d]; largest / 448 [R, 1] float32) with the largest magnitude of
    each row of x [R, d]."""
    largest = x.abs().amax(1, keepdim=True).float().clamp_(min=E4M3_SMALLEST_ROW)
    rows = (x.float() * (E4M3_LARGEST / largest)).to(torch.float8_e4m3fn)
    return rows.contiguous(), largest / E4M3_LARGEST


# --- attention ---


def checked_bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """cu_seqlens as a list; ValueError unless it rises from 0 to tokens."""
    bounds = cu_seqlens.tolist()
    rising = all(start <= end for start, end in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or not rising:
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {tokens}; got {bounds[:8]}{' …' if len(bounds) > 8 else ''}"
        )
    return bounds


def _runs(cu_seqlens: Tensor, tokens: int, max_seqlen: Optional[int]) -> list[tuple[int, int, int]]:
    """The packed documents as [(start, end, documents)]: runs of documents of equal length. Empty documents
    are left out."""
    runs: list[tuple[int, int, int]] = []
    for start, end in pairwise(checked_bounds(cu_seqlens, tokens)):
        length = end - start
        if max_seqlen is not None and length > max_seqlen:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, but a document has {length} tokens; it must be at least the "
                f"longest"
            )
        if length == 0:
            continue
        first, last, documents = runs[-1] if runs else (start, start, 0)
        if documents and length * documents == last - first:
            runs[-1] = first, end, documents + 1
        else:
            runs.append((start, end, 1))
    return runs


def _documents(x: Tensor, run: tuple[int, int, int]) -> Tensor:
    """The run's part of x [T, H, D] as [documents, H, length, D], each row of D contiguous: PyTorch's kernel
    takes that for granted."""
    start, end, documents = run
    part = x[start:end].unflatten(0, (documents, -1)).transpose(1, 2)
    return part if part.stride(-1) == 1 else part.contiguous()


def _packed(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Join [documents, H, length, D] parts into one [T, H, D], contiguous. No copy where there is one
    part."""
    if not parts:
        return torch.empty_like(like).contiguous()
    packed = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return (packed[0] if len(packed) == 1 else torch.cat(packed)).contiguous()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: Optional[int], scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, causal within each document; query head h reads key head h // (Hq / Hk).

    Returns (out [T, Hq, D], log-sum-exp of the scaled scores [T, Hq]).
    """
    forward = _attend_cpu if q.device.type == "cpu" else _attend
    lse = torch.empty(q.shape[:2], dtype=accumulate_dtype(q), device=q.device)
    outs = []
    for run in _runs(cu_seqlens, len(q), max_seqlen):
        start, end, _ = run
        out, run_lse = forward(_documents(q, run), _documents(k, run), _documents(v, run), scale)
        outs.append(out)
        lse[start:end] = run_lse.transpose(1, 2).flatten(0, 1)
    return _packed(outs, q), lse


def flash_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Optional[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of flash_attention for q, k and v."""
    backward = _attend_backward_cpu if q.device.type == "cpu" else _attend_backward
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for run in _runs(cu_seqlens, len(q), max_seqlen):
        run_grad, run_q, run_k, run_v, run_out = (_documents(x, run) for x in (grad, q, k, v, out))
        run_lse = _documents(lse[..., None], run).squeeze(-1)
        gradients = backward(run_grad, run_q, run_k, run_v, run_out, run_lse, scale)
        for part, gradient in zip(parts, gradients, strict=True):
            part.append(gradient)
    dq, dk, dv = parts
    return _packed(dq, q), _packed(dk, k), _packed(dv, v)


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Documents of equal length, [documents, H, length, D]: PyTorch's own tiled kernel. (Before torch 2.9 it
    takes equal heads only.)"""
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)


def _attend_backward_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    k_, v_ = _per_query_head(k, q), _per_query_head(v, q)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k_, v_, out, lse, 0.0, True, scale=scale
    )
    return dq, _per_key_head(dk, k), _per_key_head(dv, v)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """_attend_cpu by the formula, on any device."""
    scores = _scores(q, k, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights @ _per_query_head(v, q).to(lse.dtype)).to(q.dtype), lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the softmax and Δ = Σ_D grad · out:  dv = Pᵀ grad,  dS = scale · P ∘ (grad vᵀ − Δ),  dq = dS k,
    dk = dSᵀ q."""
    dtype = lse.dtype
    grad = grad.to(dtype)
    weights = (_scores(q, k, scale) - lse[..., None]).exp()
    d_weights = grad @ _per_query_head(v, q).to(dtype).mT
    delta = (grad * out).sum(-1, keepdim=True)
    d_scores = weights * (d_weights - delta) * scale
    dq = d_scores @ _per_query_head(k, q).to(dtype)
    dk = d_scores.mT @ q.to(dtype)
    dv = weights.mT @ grad
    return dq.to(q.dtype), _per_key_head(dk, k).to(k.dtype), _per_key_head(dv, v).to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The scaled scores of every query against the keys up to its own position, −inf beyond."""
    dtype = accumulate_dtype(q)
    scores = q.to(dtype) @ _per_query_head(k, q).to(dtype).mT * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """The key or value heads, one per query head."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """The adjoint of _per_query_head: the sum over the query heads of each key head."""
    return x if x.shape[1] == k.shape[1] else x.unflatten(1, (k.shape[1], -1)).sum(2)
