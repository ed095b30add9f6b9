"""The public ops of the head: linear_log_prob, difference_score, linear_cross_entropy,
linear_distillation_loss.

What they take and give, their checks, and their registration with torch.library. T tokens, V vocabulary,
d hidden width, B documents. No op holds the logits [T, V] in memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from . import reference_head
from .checks import FLOATS, autocast, check_tensor, contiguous_like, empty_statistic
from .dispatch import OPS, Context, register
from .reference import accumulate_dtype
from .reference_head import IGNORE_INDEX

# Bytes of logits in memory at a time, where a gradient needs them, unless told otherwise.
MAX_LOGITS_BYTES_CPU = 256 << 20
MAX_LOGITS_BYTES_GPU = 1 << 30


class DifferenceScore(NamedTuple):
    """Per document [B]: score = teacher_log_prob − reference_log_prob, each the mean log-probability in nats
    per token over the targets that count (NaN where none does), float32; num_tokens, how many count, int32.
    And per token [T] what linear_log_prob has, which these are means of: teacher_token_log_prob,
    reference_token_log_prob."""

    score: Tensor
    teacher_log_prob: Tensor
    reference_log_prob: Tensor
    num_tokens: Tensor
    teacher_token_log_prob: Tensor
    reference_token_log_prob: Tensor


class DistillationLoss(NamedTuple):
    """loss = (1 − alpha) · cross_entropy + alpha · kl_divergence, each the mean over the targets that count;
    float32 scalars. Only loss carries gradients."""

    loss: Tensor
    cross_entropy: Tensor
    kl_divergence: Tensor


def _check_head(hidden: Tensor, weight: Tensor, targets: Tensor, prefix: str = "") -> None:
    check_tensor(f"{prefix}hidden", hidden, (len(targets), None), FLOATS)
    check_tensor(f"{prefix}weight", weight, (None, hidden.shape[1]), (hidden.dtype,), hidden)
    check_tensor("targets", targets, (len(hidden),), (torch.int64,), hidden)


def _max_logits_bytes(max_logits_bytes: Optional[int], like: Tensor) -> int:
    if max_logits_bytes:
        return max_logits_bytes
    return MAX_LOGITS_BYTES_CPU if like.device.type == "cpu" else MAX_LOGITS_BYTES_GPU


# --- losses that come with their gradients ---


def _fake_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """What stands for the gradients: empty where not needed."""
    return (
        contiguous_like(hidden) if need_hidden else hidden.new_empty(0),
        contiguous_like(weight) if need_weight else weight.new_empty(0),
    )


def _loss_setup(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For an op whose last two results are the gradients of its first result for its first two inputs."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.others, ctx.gradients = inputs[len(tensors) :], output[-2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(name: str) -> Callable[..., tuple[Optional[Tensor], ...]]:
    def backward(ctx: Context, grad: Optional[Tensor], *_: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        results: list[Optional[Tensor]] = [None] * len(ctx.needs_input_grad)
        if grad is None:
            return tuple(results)
        # The first pass scales the gradients in place and gives them away; another one (retain_graph=True)
        # computes them anew.
        gradients = ctx.gradients
        if gradients is None:
            gradients = getattr(OPS, name)(*ctx.saved_tensors, *ctx.others)[-2:]
        ctx.gradients = None
        for i, gradient in enumerate(gradients):
            if ctx.needs_input_grad[i]:
                # A traced graph plans its memory itself.
                results[i] = gradient.mul_(grad) if type(gradient) is Tensor else gradient * grad
        return tuple(results)

    return backward


def _cross_entropy_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    max_logits_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_statistic(hidden), *_fake_gradients(hidden, weight, need_hidden, need_weight)


_CROSS_ENTROPY = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor token_weight, "
    "int ignore_index, bool need_hidden, bool need_weight, int max_logits_bytes) "
    "-> (Tensor, Tensor, Tensor)",
    reference_head.linear_cross_entropy,
    _cross_entropy_fake,
    _loss_backward("linear_cross_entropy"),
    _loss_setup,
)


def _distillation_fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    alpha: float,
    temperature: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    max_logits_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, cross_entropy, divergence = (empty_statistic(student_hidden) for _ in range(3))
    gradients = _fake_gradients(student_hidden, student_weight, need_hidden, need_weight)
    return loss, cross_entropy, divergence, *gradients


_DISTILLATION = register(
    "linear_distillation_loss(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor targets, float alpha, float temperature, int ignore_index, "
    "bool need_hidden, bool need_weight, int max_logits_bytes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_head.linear_distillation_loss,
    _distillation_fake,
    _loss_backward("linear_distillation_loss"),
    _loss_setup,
)


# --- log-probabilities ---


def _log_prob_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, max_logits_bytes: int
) -> Tensor:
    return empty_statistic(hidden, len(hidden))


def _log_prob_setup(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
    hidden, weight, targets, ctx.ignore_index, ctx.max_logits_bytes = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _log_prob_backward(
    ctx: Context, grad: Tensor
) -> tuple[Optional[Tensor], Optional[Tensor], None, None, None]:
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    _, grad_hidden, grad_weight = _CROSS_ENTROPY(
        *ctx.saved_tensors, -grad, ctx.ignore_index, need_hidden, need_weight, ctx.max_logits_bytes
    )
    return (
        grad_hidden if need_hidden else None,
        grad_weight if need_weight else None,
        None,
        None,
        None,
    )


_LOG_PROB = register(
    "linear_log_prob(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, int max_logits_bytes) "
    "-> Tensor",
    reference_head.linear_log_prob,
    _log_prob_fake,
    _log_prob_backward,
    _log_prob_setup,
)


def _difference_score_fake(teacher_hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    _, reference_hidden, _, targets, cu_seqlens = others
    documents = len(cu_seqlens) - 1
    means = (empty_statistic(teacher_hidden, documents) for _ in range(3))
    tokens = (empty_statistic(hidden, len(targets)) for hidden in (teacher_hidden, reference_hidden))
    return *means, cu_seqlens.new_empty(documents), *tokens


_DIFFERENCE_SCORE = register(
    "difference_score(Tensor teacher_hidden, Tensor teacher_weight, Tensor reference_hidden, "
    "Tensor reference_weight, Tensor targets, Tensor cu_seqlens) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_head.difference_score,
    _difference_score_fake,
)


def linear_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden weightᵀ)[target] per token, without the logits in memory.

    Args:
        hidden: [T, d]. weight: [V, d], of hidden's dtype. targets: [T] int64 in [0, V), or -100: the result
            is 0 there.
    Returns: [T] float32, nats.
    """
    hidden, weight = autocast(hidden, weight)
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
    teacher_hidden, teacher_weight, reference_hidden, reference_weight = autocast(
        teacher_hidden, teacher_weight, reference_hidden, reference_weight
    )
    _check_head(teacher_hidden, teacher_weight, targets, "teacher_")
    _check_head(reference_hidden, reference_weight, targets, "reference_")
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,), targets)
    return DifferenceScore(
        *_DIFFERENCE_SCORE(
            teacher_hidden, teacher_weight, reference_hidden, reference_weight, targets, cu_seqlens
        )
    )


# --- losses ---


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
    hidden, weight = autocast(hidden, weight)
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
        temperature: below 1 with float16 the PyTorch reference runs, on a GPU too, where it makes the host
            wait.
        max_logits_bytes: bytes of logits of both models in memory at a time; 256 MiB on the CPU and 1 GiB on
            a GPU if None.
    Returns: DistillationLoss; all 0 where no token counts.
    """
    student_hidden, student_weight, teacher_hidden, teacher_weight = autocast(
        student_hidden, student_weight, teacher_hidden, teacher_weight
    )
    _check_head(student_hidden, student_weight, targets, "student_")
    _check_head(teacher_hidden, teacher_weight, targets, "teacher_")
    need_hidden, need_weight = (
        torch.is_grad_enabled() and x.requires_grad for x in (student_hidden, student_weight)
    )
    loss, cross_entropy, divergence, _, _ = _DISTILLATION(
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
    return DistillationLoss(loss, cross_entropy, divergence)
