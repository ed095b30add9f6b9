"""Random inputs for the kernels' tests: in float64 on the CPU, moved and rounded by `on`."""

from functools import partial

import torch
from miniplm.kernels import reference


def on(device, *tensors, dtype=None):
    """The tensors on the device, those of floating point in the dtype (None: as they are)."""
    return [x.to(device, dtype if x.is_floating_point() else None) for x in tensors]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


# --- documents and heads ---


def bounds(lengths, device="cpu"):
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def random_heads(tokens, heads, key_heads, dim):
    """q, k and v."""
    return [random(tokens, h, dim) for h in (heads, key_heads, key_heads)]


def heads_first(x):
    """A copy of x [T, H, ...] that lies in memory as [H, T, ...]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def rotary_frequencies(dim):
    return 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


# --- heads of language models ---


def random_head(tokens, vocabulary, width=24, ignore_index=-100, scale=0.5):
    """hidden, weight, targets. A fifth of the targets is ignored (the second of five tokens, of one token
    none), both ends of the vocabulary are among the others, and the first is unlikely: a log-probability near
    0 is a difference of logits, and all of it rounding."""
    hidden, weight = random(tokens, width), scale * random(vocabulary, width)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::5], targets[2::5], targets[3::5] = ignore_index, 0, vocabulary - 1
    targets[:1] = (hidden[:1] @ weight.T).argmin(1)
    return hidden, weight, targets


def random_pair(lengths, teacher_vocabulary, reference_vocabulary):
    """The arguments of difference_score: heads of a teacher of width 24 and a reference model of width 8,
    targets that both know, and the bounds of documents."""
    teacher_hidden, teacher_weight, _ = random_head(sum(lengths), teacher_vocabulary, 24)
    reference_hidden, reference_weight, targets = random_head(
        sum(lengths), min(teacher_vocabulary, reference_vocabulary), 8
    )
    more = random(max(0, reference_vocabulary - teacher_vocabulary), 8)
    heads = [teacher_hidden, teacher_weight, reference_hidden, torch.cat((reference_weight, more))]
    return heads, targets, bounds(lengths)


def random_student_and_teacher(tokens, student_vocabulary, teacher_vocabulary):
    """[student_hidden, student_weight, teacher_hidden, teacher_weight] of the widths 24 and 40; targets, a
    fifth of them ignored."""
    shapes = (tokens, 24), (student_vocabulary, 24), (tokens, 40), (teacher_vocabulary, 40)
    targets = torch.randint(0, min(student_vocabulary, teacher_vocabulary), (tokens,))
    targets[1::5] = -100
    return [random(*shape) / 1.5 for shape in shapes], targets


# --- every op of the library ---


def parameter(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=dtype).to(device).requires_grad_()


def op_arguments(dtype=torch.float32, tokens=7, vocabulary=11, device="cpu"):
    """For every op torch.ops.miniplm.<name>, arguments that it takes: {name: arguments}."""
    T, V, D = tokens, vocabulary, 8
    tensor = partial(parameter, dtype=dtype, device=device)
    statistic = partial(torch.rand, dtype=torch.promote_types(dtype, torch.float32), device=device)
    targets = torch.arange(T) % V
    targets[1], targets[2] = V - 1, -100
    targets, cu_seqlens = targets.to(device), bounds([3, T - 3], device)
    q, k, v = tensor(T, 4, D), tensor(T, 2, D), tensor(T, 2, D)
    out, lse = reference.flash_attention(*(x.detach() for x in (q, k, v)), cu_seqlens, T, 0.3)
    positions, inv_freq = on(device, torch.arange(T), torch.rand(D // 2))
    teacher = tensor(T, 5).detach(), tensor(V + 2, 5).detach()
    need = True, True, 1 << 20
    return {
        "rms_norm": (tensor(T, D), tensor(D), 1e-6, dtype),
        "rms_norm_backward": (
            tensor(T, D),
            tensor(T, D),
            tensor(D),
            statistic(T, 1),
            tensor(T, D),
            torch.float16,
        ),
        "add_rms_norm": (tensor(T, D), tensor(T, D), tensor(D), 1e-6, dtype),
        "rotary": (q, k, positions, inv_freq, False),
        "swiglu": (tensor(T, D), tensor(T, D)),
        "swiglu_backward": (tensor(T, D), tensor(T, D), tensor(T, D)),
        "flash_attention": (q, k, v, cu_seqlens, T, 0.3),
        "flash_attention_backward": (torch.randn_like(q), q, k, v, out, lse, cu_seqlens, None, 0.3),
        "quantize_rows": (tensor(T, D).detach(),),
        "linear_log_prob": (tensor(T, D), tensor(V, D), targets, -100, 1 << 20),
        "linear_cross_entropy": (tensor(T, D), tensor(V, D), targets, statistic(T), -100, *need),
        "linear_distillation_loss": (tensor(T, D), tensor(V, D), *teacher, targets, 0.5, 1.0, -100, *need),
        "difference_score": (tensor(T, D).detach(), tensor(V, D).detach(), *teacher, targets, cu_seqlens),
    }
