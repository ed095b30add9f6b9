"""The public ops: what they take and give, their checks, and their registration with torch.library.

Every op takes float32, float16 or bfloat16 tensors (float64 too, on the reference path), keeps its statistics
in float32, and returns the dtype of its inputs unless stated. Under autocast, floating-point inputs are cast
to autocast's dtype first. Inputs may be strided; none is changed. A wrong shape, dtype or device raises
ValueError. A target outside the vocabulary raises ValueError on the CPU; on a GPU it gives NaN, because a
check would make the host wait.

T tokens, V vocabulary, d hidden width, H heads, D head dimension, B documents. Document b of a packed batch
is the tokens cu_seqlens[b]:cu_seqlens[b + 1], cu_seqlens [B + 1] int32.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import reference
from .dispatch import register
from .reference import IGNORE_INDEX, accumulate_dtype

MAX_LOGITS_BYTES_CPU, MAX_LOGITS_BYTES_GPU = (
    256 << 20,
    1 << 30,
)  # bytes of logits in memory at a time, where a gradient needs them, unless told otherwise
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class DifferenceScore(NamedTuple):
    """Per document [B]: score = teacher_log_prob − reference_log_prob, each the mean log-probability in nats
    per token over the targets that count (NaN where none does), float32; num_tokens, how many count,
    int32."""

    score: Tensor
    teacher_log_prob: Tensor
    reference_log_prob: Tensor
    num_tokens: Tensor


class DistillationLoss(NamedTuple):
    """loss = (1 − alpha) · cross_entropy + alpha · kl_divergence, each the mean over the targets that count;
    float32 scalars. Only loss carries gradients."""

    loss: Tensor
    cross_entropy: Tensor
    kl_divergence: Tensor


def _check(argument: str, tensor: Tensor, shape: tuple, dtypes: tuple, like: Optional[Tensor] = None):
    """ValueError unless the tensor has the shape (None: any size; a leading ...: any sizes), one of the
    dtypes, and the device of `like`."""
    sizes = tuple(tensor.shape)
    if shape[:1] == (...,):
        shape = sizes[: len(sizes) - len(shape) + 1] + shape[1:]
    if len(sizes) != len(shape) or any(
        want is not None and size != want for size, want in zip(sizes, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{argument} has shape {list(sizes)}; it must be [{wanted}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{argument} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{argument} is on {tensor.device}; it must be on {like.device}, where the other arguments are"
        )


def _autocast(*tensors: Tensor):
    """The tensors in autocast's dtype where autocast is on."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return tensors


def _like(*tensors):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _statistic(like, *sizes):
    return like.new_empty(sizes, dtype=accumulate_dtype(like))


# --- norms ---


def _norm_arguments(weight, *activations):
    """(the result's dtype, the arguments) of a norm: autocast's dtype, else that of 16 bits if an argument
    has it. What is float32 stays so."""
    device = activations[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return dtype, *(x if x.dtype == torch.float32 else x.to(dtype) for x in (weight, *activations))
    return (
        next((x.dtype for x in (*activations, weight) if x.itemsize == 2), activations[0].dtype),
        weight,
        *activations,
    )


def _norm_dtypes(dtype):
    """What a norm takes beside a result of `dtype`."""
    return (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)


def _total_like(x, residual):
    return torch.empty_like(
        x, dtype=torch.promote_types(x.dtype, residual.dtype), memory_format=torch.contiguous_format
    )


def _contiguous_like(x, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


_RMS_NORM_BACKWARD = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_residual, "
    "ScalarType? low_precision_dtype) -> (Tensor, Tensor, Tensor)",
    reference.rms_norm_backward,
    lambda grad, x, weight, rstd, grad_residual, low_precision_dtype: (
        *_like(x),
        _contiguous_like(x, low_precision_dtype) if low_precision_dtype else weight.new_empty(0),
        *_like(weight),
    ),
)


def _rms_norm_backward(ctx, grad, _):
    grad_x, _, grad_weight = _RMS_NORM_BACKWARD(grad, *ctx.saved_tensors, None, None)
    return grad_x, grad_weight, None, None


_RMS_NORM = register(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    reference.rms_norm,
    lambda x, weight, eps, dtype: (_contiguous_like(x, dtype), _statistic(x, *x.shape[:-1], 1)),
    _rms_norm_backward,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2], output[1]),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        x: [..., d]. weight: [d]. Of one dtype, or one of them float32 beside 16 bits; under autocast what is
            float32 stays so.
    Returns: [..., d], of the narrower dtype, under autocast of autocast's.
    """
    dtype, weight, x = _norm_arguments(weight, x)
    _check("x", x, (..., None), FLOATS)
    _check("weight", weight, x.shape[-1:], _norm_dtypes(dtype), x)
    return _RMS_NORM(x, weight, eps, dtype)[0]


def _add_rms_norm_setup(ctx, inputs, output):
    x, residual, weight, _, ctx.dtype = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.set_materialize_grads(
        False
    )  # the last norm of a model leaves the sum unused: no zeros are made and read for it


def _add_rms_norm_backward(ctx, grad, grad_total, _):
    total, weight, rstd = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(total, dtype=ctx.dtype)
    low_precision_dtype = next((dtype for dtype in ctx.dtypes if dtype != total.dtype), None)
    grad_sum, grad_narrow, grad_weight = _RMS_NORM_BACKWARD(
        grad, total, weight, rstd, grad_total, low_precision_dtype
    )
    return (
        *(grad_sum if dtype == total.dtype else grad_narrow for dtype in ctx.dtypes),
        grad_weight,
        None,
        None,
    )


_ADD_RMS_NORM = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype) -> (Tensor, "
    "Tensor, Tensor)",
    reference.add_rms_norm,
    lambda x, residual, weight, eps, dtype: (
        _contiguous_like(x, dtype),
        _total_like(x, residual),
        _statistic(x, *x.shape[:-1], 1),
    ),
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
    dtype, weight, x, residual = _norm_arguments(weight, x, residual)
    _check("x", x, (..., None), FLOATS)
    _check("x", x, x.shape, _norm_dtypes(dtype))
    _check("weight", weight, x.shape[-1:], _norm_dtypes(dtype), x)
    _check("residual", residual, x.shape, _norm_dtypes(dtype), x)
    return _ADD_RMS_NORM(x, residual, weight, eps, dtype)[:2]


# --- rotary, SwiGLU ---


def _rotary_setup(ctx, inputs, output):
    _, _, positions, inv_freq, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq)


def _rotary_backward(ctx, grad_q, grad_k):
    return *_ROTARY(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


_ROTARY = register(
    "rotary(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, bool inverse) -> (Tensor, Tensor)",
    reference.rotary,
    lambda q, k, positions, inv_freq, inverse: _like(q, k),
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
    q, k = _autocast(q, k)
    _check("q", q, (None, None, None), FLOATS)
    tokens, _, dim = q.shape
    if dim % 2:
        raise ValueError(f"q has shape {list(q.shape)}; its last size must be even")
    _check("k", k, (tokens, None, dim), (q.dtype,), q)
    _check("positions", positions, (tokens,), (torch.int64, torch.int32), q)
    _check("inv_freq", inv_freq, (dim // 2,), (torch.float32, torch.float64), q)
    return _ROTARY(q, k, positions, inv_freq, False)


_SWIGLU_BACKWARD = register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    reference.swiglu_backward,
    lambda grad, gate, up: (*_like(gate), gate.new_empty(0) if up is None else _like(up)[0]),
)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad):
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = _SWIGLU_BACKWARD(grad, gate, up)
    return grad_gate, None if up is None else grad_up


_SWIGLU = register(
    "swiglu(Tensor gate, Tensor? up) -> Tensor",
    reference.swiglu,
    lambda gate, up: gate.new_empty(*gate.shape[:-1], gate.shape[-1] // 2) if up is None else _like(gate)[0],
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
        (gate,) = _autocast(gate)
        _check("gate", gate, (..., None), FLOATS)
        if gate.shape[-1] % 2:
            raise ValueError(f"gate has shape {list(gate.shape)}; without up its last size must be even")
        return _SWIGLU(gate, None)
    gate, up = _autocast(gate, up)
    _check("gate", gate, (..., None), FLOATS)
    _check("up", up, gate.shape, (gate.dtype,), gate)
    return _SWIGLU(gate, up)


# --- float8 ---

_QUANTIZE_ROWS = register(
    "quantize_rows(Tensor x) -> (Tensor, Tensor)",
    reference.quantize_rows,
    lambda x: (
        torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format),
        x.new_empty(len(x), 1, dtype=torch.float32),
    ),
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of a matrix in float8, scaled so that its largest magnitude is the largest of e4m3
    (Micikevicius et al. 2022, arXiv 2209.05433).

    Args:
        x: [R, d]. Autocast does not change it, and it gets no gradient: an op for inference.
    Returns: (rows [R, d] float8_e4m3fn, scale [R, 1] float32): rows · scale is x, to within 2⁻⁴ of each
        element or 2⁻¹⁰ of scale. A row with an infinity or a NaN gives NaN.
    """
    _check("x", x, (None, None), FLOATS)
    return _QUANTIZE_ROWS(x)


# --- attention ---

_FLASH_ATTENTION_BACKWARD = register(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor "
    "cu_seqlens, SymInt? max_seqlen, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference.flash_attention_backward,
    lambda grad, q, k, v, *_: _like(q, k, v),
)


def _flash_attention_setup(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _flash_attention_backward(ctx, grad, _):
    return *_FLASH_ATTENTION_BACKWARD(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None, None


_FLASH_ATTENTION = register(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt? max_seqlen, float scale) -> "
    "(Tensor, Tensor)",
    reference.flash_attention,
    lambda q, *_: (*_like(q), _statistic(q, *q.shape[:2])),
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
        max_seqlen: the length of the longest document, or more; None where it is not known (no implementation
            needs it today).
        scale: D ** -0.5 if None.
    Returns: [T, Hq, D].
    """
    q, k, v = _autocast(q, k, v)
    _check("q", q, (None, None, None), FLOATS)
    tokens, heads, dim = q.shape
    _check("k", k, (tokens, None, dim), (q.dtype,), q)
    _check("v", v, k.shape, (q.dtype,), q)
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads; q's {heads} must be a multiple of them")
    _check("cu_seqlens", cu_seqlens, (None,), (torch.int32,), q)
    scale = dim**-0.5 if scale is None else scale
    if scale <= 0:  # the implementations take the maximum of the scores before they scale
        q, scale = (-q, -scale) if scale else (0 * q, 1.0)
    return _FLASH_ATTENTION(q, k, v, cu_seqlens, max_seqlen, scale)[0]


# --- the head: log-probabilities, cross-entropy, distillation ---


def _check_head(hidden, weight, targets, prefix=""):
    _check(f"{prefix}hidden", hidden, (len(targets), None), FLOATS)
    _check(f"{prefix}weight", weight, (None, hidden.shape[1]), (hidden.dtype,), hidden)
    _check("targets", targets, (len(hidden),), (torch.int64,), hidden)


def _max_logits_bytes(max_logits_bytes: Optional[int], like: Tensor) -> int:
    return max_logits_bytes or (MAX_LOGITS_BYTES_CPU if like.device.type == "cpu" else MAX_LOGITS_BYTES_GPU)


def _gradients(need_hidden, need_weight, hidden, weight):
    """What stands for the gradients: empty where not needed."""
    return (
        _like(x)[0] if need else x.new_empty(0) for need, x in ((need_hidden, hidden), (need_weight, weight))
    )


def _loss_setup(ctx, inputs, output):
    """For an op whose last two results are the gradients of its first result for its first two inputs."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.others, ctx.gradients = inputs[len(tensors) :], output[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(name):
    def backward(ctx, grad, *_):
        results = [None] * len(ctx.needs_input_grad)
        if grad is None:
            return tuple(results)
        # The first pass scales the gradients in place and gives them away; another one (retain_graph=True)
        # computes them anew.
        gradients = ctx.gradients or getattr(torch.ops.miniplm, name)(*ctx.saved_tensors, *ctx.others)[-2:]
        ctx.gradients = None
        for i, gradient in enumerate(gradients):
            if ctx.needs_input_grad[i]:  # a traced graph plans its memory itself
                results[i] = gradient.mul_(grad) if type(gradient) is Tensor else gradient * grad
        return tuple(results)

    return backward


_CROSS_ENTROPY = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor token_weight, int "
    "ignore_index, bool need_hidden, bool need_weight,"
    " int max_logits_bytes) -> (Tensor, Tensor, Tensor)",
    reference.linear_cross_entropy,
    lambda hidden, weight, targets, token_weight, ignore_index, need_hidden, need_weight, max_logits_bytes: (
        _statistic(hidden),
        *_gradients(need_hidden, need_weight, hidden, weight),
    ),
    _loss_backward("linear_cross_entropy"),
    _loss_setup,
)


def _log_prob_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.ignore_index, ctx.max_logits_bytes = inputs[3:]


def _log_prob_backward(ctx, grad):
    need = ctx.needs_input_grad[:2]
    _, *gradients = _CROSS_ENTROPY(*ctx.saved_tensors, -grad, ctx.ignore_index, *need, ctx.max_logits_bytes)
    return (
        *(gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=True)),
        None,
        None,
        None,
    )


_LOG_PROB = register(
    "linear_log_prob(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, int max_logits_bytes) "
    "-> Tensor",
    reference.linear_log_prob,
    lambda hidden, weight, targets, ignore_index, max_logits_bytes: _statistic(hidden, len(hidden)),
    _log_prob_backward,
    _log_prob_setup,
)
_DISTILLATION = register(
    "linear_distillation_loss(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor "
    "teacher_weight, Tensor targets,"
    " float alpha, float temperature, int ignore_index, bool need_hidden, bool need_weight, int "
    "max_logits_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.linear_distillation_loss,
    lambda hidden, weight, th, tw, targets, alpha, temperature, ignore, need_hidden, need_weight, *_: (
        *(_statistic(hidden) for _ in range(3)),
        *_gradients(need_hidden, need_weight, hidden, weight),
    ),
    _loss_backward("linear_distillation_loss"),
    _loss_setup,
)
_DIFFERENCE_SCORE = register(
    "difference_score(Tensor teacher_hidden, Tensor teacher_weight, Tensor reference_hidden, Tensor "
    "reference_weight, Tensor targets,"
    " Tensor cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.difference_score,
    lambda hidden, tw, rh, rw, targets, cu_seqlens: (
        *(_statistic(hidden, len(cu_seqlens) - 1) for _ in range(3)),
        cu_seqlens.new_empty(len(cu_seqlens) - 1),
    ),
)


def linear_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden weightᵀ)[target] per token, without the logits in memory.

    Args:
        hidden: [T, d]. weight: [V, d], of hidden's dtype. targets: [T] int64 in [0, V), or -100: the result
            is 0 there.
    Returns: [T] float32, nats.
    """
    hidden, weight = _autocast(hidden, weight)
    _check_head(hidden, weight, targets)
    return _LOG_PROB(hidden, weight, targets, IGNORE_INDEX, _max_logits_bytes(None, hidden))


def difference_score(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
) -> DifferenceScore:
    """MiniPLM's difference score per document (Gu et al. 2025, arXiv 2410.17215): mean log p_teacher − mean
    log p_reference.

    Args:
        teacher_hidden: [T, d]. teacher_weight: [V, d]. reference_hidden: [T, d']. reference_weight: [V', d'].
            Where V ≠ V', both softmaxes run over the first min(V, V') ids.
        targets: [T] int64 in [0, min(V, V')), or -100: the token does not count. cu_seqlens: [B + 1] int32,
            rising from 0 to T.
    Returns: DifferenceScore. It has no derivative.
    """
    teacher_hidden, teacher_weight, reference_hidden, reference_weight = _autocast(
        teacher_hidden, teacher_weight, reference_hidden, reference_weight
    )
    _check_head(teacher_hidden, teacher_weight, targets, "teacher_")
    _check_head(reference_hidden, reference_weight, targets, "reference_")
    _check("cu_seqlens", cu_seqlens, (None,), (torch.int32,), targets)
    return DifferenceScore(
        *_DIFFERENCE_SCORE(
            teacher_hidden, teacher_weight, reference_hidden, reference_weight, targets, cu_seqlens
        )
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    max_logits_bytes: Optional[int] = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden weightᵀ), without the logits in memory.

    The gradients of "mean" and "sum" are computed with the loss, from the same logits; the backward pass of
    "none" computes the logits again. Without gradients it costs what linear_log_prob costs.

    Args:
        hidden: [T, d]. weight: [V, d], of hidden's dtype. targets: [T] int64 in [0, V), or ignore_index: the
            token does not count.
        reduction: "mean" over the targets that count (0 where none does), "sum", or "none" (0 for a token
            that does not count).
        max_logits_bytes: bytes of logits in memory at a time; 256 MiB on the CPU and 1 GiB on a GPU if None.
            The weight's gradient is read and written once per chunk of tokens that fits: where there is
            memory, 2.4 GiB take 8,192 tokens of 151,936 ids.
    Returns: scalar, or [T] for "none"; float32, nats.
    """
    hidden, weight = _autocast(hidden, weight)
    _check_head(hidden, weight, targets)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    max_logits_bytes = _max_logits_bytes(max_logits_bytes, hidden)
    count = (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
    need_hidden, need_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    if reduction != "none" and (need_hidden or need_weight):
        token_weight = hidden.new_ones(len(hidden), dtype=accumulate_dtype(hidden)) / count
        return _CROSS_ENTROPY(
            hidden, weight, targets, token_weight, ignore_index, need_hidden, need_weight, max_logits_bytes
        )[0]
    loss = -_LOG_PROB(hidden, weight, targets, ignore_index, max_logits_bytes)
    return loss if reduction == "none" else loss.sum() / count


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    alpha: float = 0.5,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    max_logits_bytes: Optional[int] = None,
) -> DistillationLoss:
    """Vanilla KD (Hinton et al. 2015, arXiv 1503.02531) against the teacher's full distribution, without
    logits in memory: (1 − alpha) · cross-entropy + alpha · KL(softmax(teacher / temperature) ‖
    softmax(student / temperature)).

    The divergence is not multiplied by temperature²: give alpha accordingly.

    Args:
        student_hidden: [T, d]. student_weight: [V, d]. teacher_hidden: [T, d']. teacher_weight: [V', d'].
            Where V ≠ V', all softmaxes run over the first min(V, V') ids. The teacher gets no gradient.
        targets: [T] int64 in [0, min(V, V')), or ignore_index: the token does not count.
        max_logits_bytes: bytes of logits of both models in memory at a time; 256 MiB on the CPU and 1 GiB on
            a GPU if None.
        temperature: below 1 with float16 the PyTorch reference runs, on a GPU too, where it makes the host
            wait.
    Returns: DistillationLoss; all 0 where no token counts.
    """
    student_hidden, student_weight, teacher_hidden, teacher_weight = _autocast(
        student_hidden, student_weight, teacher_hidden, teacher_weight
    )
    _check_head(student_hidden, student_weight, targets, "student_")
    _check_head(teacher_hidden, teacher_weight, targets, "teacher_")
    need_hidden, need_weight = (
        torch.is_grad_enabled() and x.requires_grad for x in (student_hidden, student_weight)
    )
    results = _DISTILLATION(
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        targets,
        alpha,
        temperature,
        ignore_index,
        need_hidden,
        need_weight,
        _max_logits_bytes(max_logits_bytes, student_hidden),
    )
    return DistillationLoss(*results[:3])
