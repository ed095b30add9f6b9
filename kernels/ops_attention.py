"""The public op flash_attention: what it takes and gives, its checks, its registration with torch.library.

T tokens, H heads, D head dimension, B documents.
"""

from typing import Optional

import torch
from torch import Tensor

from . import reference
from .checks import FLOATS, autocast, check_tensor, contiguous_like, empty_statistic
from .dispatch import Context, register


def _flash_attention_backward_fake(
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
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)


_FLASH_ATTENTION_BACKWARD = register(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, SymInt? max_seqlen, float scale) -> (Tensor, Tensor, Tensor)",
    reference.flash_attention_backward,
    _flash_attention_backward_fake,
)


def _flash_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: Optional[int], scale: float
) -> tuple[Tensor, Tensor]:
    return contiguous_like(q), empty_statistic(q, *q.shape[:2])


def _flash_attention_setup(
    ctx: Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Optional[int], float],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _flash_attention_backward(
    ctx: Context, grad: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    dq, dk, dv = _FLASH_ATTENTION_BACKWARD(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale)
    return dq, dk, dv, None, None, None


_FLASH_ATTENTION = register(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt? max_seqlen, float scale) "
    "-> (Tensor, Tensor)",
    reference.flash_attention,
    _flash_attention_fake,
    _flash_attention_backward,
    _flash_attention_setup,
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Optional[int],
    scale: Optional[float] = None,
) -> Tensor:
    """Causal attention within each packed document, softmax(scale · q kᵀ) v (Dao 2023, arXiv 2307.08691).

    Args:
        q: [T, Hq, D]. k, v: [T, Hk, D], of q's dtype; Hq is a multiple of Hk, and query head h reads key head
            h // (Hq / Hk).
        cu_seqlens: [B + 1] int32, rising from 0 to T (ValueError on the CPU if not, undefined on a GPU);
            documents may be empty.
        max_seqlen: the length of the longest document, or more; None where it is not known. Results are right
            whatever it is; it helps to choose how gradients are computed, and so may change their last bits.
        scale: D ** -0.5 if None.
    Returns: [T, Hq, D].
    """
    q, k, v = autocast(q, k, v)
    check_tensor("q", q, (None, None, None), FLOATS)
    tokens, heads, dim = q.shape
    check_tensor("k", k, (tokens, None, dim), (q.dtype,), q)
    check_tensor("v", v, k.shape, (q.dtype,), q)
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads; q's {heads} must be a multiple of them")
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,), q)
    scale = dim**-0.5 if scale is None else scale
    # The implementations take the maximum of the scores before they scale: a scale must be positive.
    if scale == 0:
        q, scale = 0 * q, 1.0
    elif scale < 0:
        q, scale = -q, -scale
    return _FLASH_ATTENTION(q, k, v, cu_seqlens, max_seqlen, scale)[0]
