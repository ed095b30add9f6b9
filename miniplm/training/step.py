"""The core of training: losses, optimiser, schedule, one step.

With data/order.py it trains a model on rows of ids; no corpus on disk is needed.

One optimiser step takes a global batch in micro-batches; its loss is the mean over all targets of the global
batch, −(1/n) Σ log p, however it is cut and spread over ranks. With a teacher (Vanilla KD) it is the mean of
(1 − α)·(−log p) + α·KL(teacher ‖ student) over the same targets. Weights, gradients and the optimiser's state
are float32; forward and backward compute in `dtype`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import OptimizerConfig
from ..data.batches import IGNORE_INDEX, Batch
from ..kernels import linear_cross_entropy, linear_distillation_loss
from ..models.base import LanguageModel
from ..runtime.distributed import ALONE, Ranks
from .memory import head_logits_bytes
from .parallel import end_teacher_step, sum_gradients_after, whole

LOSS_COMPONENTS = ("cross_entropy", "kl_divergence")  # of the loss with a teacher


class Teacher(NamedTuple):
    """Whom a student learns from, beside the corpus: its full distribution, at the temperature, is the share
    alpha of the loss."""

    model: LanguageModel  # frozen, in the compute dtype; on several ranks in slices
    alpha: float
    temperature: float


def num_targets(batches: list[Batch]) -> int:
    """How many positions are predicted; call it before the batches are moved to a GPU."""
    return sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)


def summed_loss(model: LanguageModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Σ −log p over the targets of a batch on the model's device, in nats: float32 scalar.

    The float32 weights are cast to `dtype` inside the graph, so that their gradients come back as float32 and
    add up over micro-batches in float32.
    """
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
        return linear_cross_entropy(
            hidden,
            model.head_weight,
            batch.targets,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            max_logits_bytes=_max_logits_bytes(hidden, model),
        )


def distillation_losses(student: LanguageModel, teacher: Teacher, batch: Batch, dtype: torch.dtype) -> Tensor:
    """(loss, cross-entropy, KL divergence), means over the targets of a batch on the models' device, 0
    without any: float32 [3].

    The loss alone carries gradients, and only for the student; they add up in float32 as those of summed_loss
    do.
    """
    with torch.no_grad():  # before the student's pass, whose activations stay in memory
        teacher_hidden = teacher.model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = student(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
        losses = linear_distillation_loss(
            hidden,
            student.head_weight,
            teacher_hidden,
            teacher.model.head_weight,
            batch.targets,
            alpha=teacher.alpha,
            ignore_index=IGNORE_INDEX,
            temperature=teacher.temperature,
            max_logits_bytes=_max_logits_bytes(hidden, student, num_models=2),
        )
        return torch.stack(losses)


def _max_logits_bytes(hidden: Tensor, model: LanguageModel, num_models: int = 1) -> int | None:
    """None, the ops' own budget, on the CPU."""
    if hidden.device.type == "cpu":
        return None
    return head_logits_bytes(model, hidden.itemsize, num_models)


def make_optimizer(model: LanguageModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on all parameters, as published."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Of step 1 … steps: linear up to the peak at step warmup_steps, then a cosine down to
    min_lr_ratio · peak at the last step.

    With warmup_steps ≥ steps the run ends within the warm-up, at steps / warmup_steps of the peak.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    )


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    lr: float,
    max_grad_norm: float,
    dtype: torch.dtype,
    raise_if_interrupted: Callable[[], None] = lambda: None,
    teacher: Teacher | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, ...]:
    """One optimiser step on a global batch; the weights stay as they are where the loss or the gradient norm
    is not finite.

    Args:
        model: on several ranks one of parallel.spread, as the teacher.
        optimizer: that of make_optimizer.
        micro_batches: of this rank; each has as many.
        dtype: of forward and backward; the parameters are float32.
        raise_if_interrupted: called between micro-batches; if it raises, the weights stay as they are. On
            several ranks it raises on all or on none.
    Returns:
        (loss, gradient norm before clipping), with a teacher (loss, gradient norm, cross-entropy, KL
        divergence). Losses are means over all targets of the global batch, in nats; NaN if there are none.
    """
    counts = [num_targets([batch]) for batch in micro_batches]
    count = ranks.sum(sum(counts)) or math.nan
    device = model.head_weight.device
    optimizer.zero_grad()
    total = torch.zeros(3 if teacher else 1, device=device)
    # All are moved now: a copy from memory that is not pinned waits for the device, and between micro-batches
    # that would drain its queue.
    on_device = [batch.to(device) for batch in micro_batches]
    for number, (batch, targets) in enumerate(zip(on_device, counts, strict=True), 1):
        raise_if_interrupted()
        if ranks.world > 1:
            sum_gradients_after(model, is_last=number == len(on_device))
        if teacher:
            losses = distillation_losses(model, teacher, batch, dtype) * (targets / count)
        else:
            losses = summed_loss(model, batch, dtype)[None] / count
        losses[0].backward()
        total += losses.detach()
    if teacher and ranks.world > 1:
        end_teacher_step(teacher.model)
    ranks.add_up(total)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if ranks.world > 1:
        grad_norm = whole(grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Where found_inf is 1 the fused step leaves all as it is: the device decides, the host need not wait
    # before it.
    skip = (~(total[0].isfinite() & grad_norm.isfinite())).float()
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()
    # The one wait for the device, with all of the step in its queue.
    norm, loss, *loss_components = torch.cat([grad_norm[None], total]).tolist()
    return loss, norm, *loss_components


@torch.no_grad()
def eval_loss(
    model: LanguageModel,
    batches: list[Batch],
    dtype: torch.dtype,
    raise_if_interrupted: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean −log p over all targets of the batches of all ranks, in nats; each rank has as many batches.
    `raise_if_interrupted` is called between batches."""
    total = torch.zeros((), dtype=torch.float64, device=model.head_weight.device)
    for batch in batches:
        raise_if_interrupted()
        total += summed_loss(model, batch.to(total.device), dtype)
    return ranks.add_up(total).item() / ranks.sum(num_targets(batches))
