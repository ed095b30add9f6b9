"""The ops in plain PyTorch, as one would write them without thought for memory: what the tests compare with.
In float64 they are the truth, in the inputs' dtype the error that is allowed for."""

import torch
import torch.nn.functional as F
from miniplm.kernels import DistillationLoss
from torch.nn.attention import SDPBackend, sdpa_kernel

IGNORE_INDEX = -100


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- rows and elements ---


def plain_rms_norm(x, weight, eps=1e-6):
    """As in transformers: the statistics in float32 at least."""
    wide = _at_least_float32(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype)


def plain_add_rms_norm(x, residual, weight):
    return plain_rms_norm(x + residual, weight), x + residual


def plain_rotary(q, k, positions, inv_freq):
    """As in transformers, the angles in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    angles = positions.to(wide)[:, None] * inv_freq.to(wide)
    cos, sin = (torch.cat((part, part), -1)[:, None].to(q.dtype) for part in (angles.cos(), angles.sin()))

    def half_turn(x):
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


def plain_swiglu(gate, up):
    return F.silu(gate) * up


# --- attention ---


def plain_attention(q, k, v, lengths, scale):
    """One document at a time: in float64 by the formula, with the whole matrix of scores; else PyTorch's own
    attention."""
    parts = []
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for queries, keys, values in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        if q.dtype == torch.float64:
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        else:
            queries, keys, values = (x.transpose(0, 1)[None] for x in (queries, keys, values))
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
                out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
            parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


# --- the head ---


def plain_log_prob(hidden, weight, targets):
    """From the whole matrix of logits, the softmax in float32 at least."""
    log_probs = _at_least_float32(hidden @ weight.T).log_softmax(-1)
    found = log_probs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(targets == IGNORE_INDEX, 0.0, found)


def plain_difference_score(
    teacher_hidden, teacher_weight, reference_hidden, reference_weight, targets, lengths
):
    """[the teacher's mean log-probability of each document, the reference model's]."""
    vocabulary = min(len(teacher_weight), len(reference_weight))
    result = []
    for hidden, weight in ((teacher_hidden, teacher_weight), (reference_hidden, reference_weight)):
        log_prob = plain_log_prob(hidden, weight[:vocabulary], targets)
        documents = zip(log_prob.split(lengths), targets.split(lengths), strict=True)
        result.append(torch.stack([part[counted != IGNORE_INDEX].mean() for part, counted in documents]))
    return result


def plain_cross_entropy(hidden, weight, targets, reduction="mean", ignore_index=IGNORE_INDEX):
    logits = _at_least_float32(hidden @ weight.T)
    return F.cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)


def plain_distillation(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    targets,
    alpha=0.5,
    ignore_index=IGNORE_INDEX,
    temperature=1.0,
):
    vocabulary = min(len(student_weight), len(teacher_weight))
    student = _at_least_float32(student_hidden @ student_weight[:vocabulary].T)
    teacher = _at_least_float32(teacher_hidden @ teacher_weight[:vocabulary].T).detach()
    cross_entropy = F.cross_entropy(student, targets, ignore_index=ignore_index)
    counted = targets != ignore_index
    divergence = F.kl_div(
        (student / temperature).log_softmax(-1)[counted],
        (teacher / temperature).log_softmax(-1)[counted],
        reduction="batchmean",
        log_target=True,
    )
    return DistillationLoss((1 - alpha) * cross_entropy + alpha * divergence, cross_entropy, divergence)
