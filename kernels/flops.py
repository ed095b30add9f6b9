"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: their matrix products.

Two FLOPs for each multiplication with its addition, as torch counts; norms, rotary embedding, SwiGLU and
softmaxes are none. In the head all targets count, also those to be ignored, as they do in plain PyTorch.
Attention counts the pairs of a query and a key that it sees, where torch counts whole squares. What an
implementation computes twice to save memory counts once, but for the scores in attention's backward pass,
which every flash attention computes anew (torch counts them there too).

T tokens, V vocabulary, d hidden width, H heads, D head dimension.
"""

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import OPS


def visible_pairs(tokens: int, cu_seqlens: Tensor) -> int:
    """Pairs of a query and a key up to it, over the documents of `tokens` tokens. On a GPU the host waits.

    Where the bounds have no values (meta and fake tensors), the documents are taken to be of equal length:
    right for the rows of a batch, too few for any others.
    """
    if cu_seqlens.is_meta or isinstance(cu_seqlens, (FakeTensor, FunctionalTensor)):
        documents = max(1, len(cu_seqlens) - 1)
        return tokens * (tokens + documents) // (2 * documents)
    return sum(length * (length + 1) // 2 for length in cu_seqlens.diff().tolist())


@register_flop_formula(OPS.flash_attention, get_raw=True)
def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> int:
    """Two products: q kᵀ and p v."""
    tokens, heads, dim = q.shape
    return 2 * 2 * heads * dim * visible_pairs(tokens, cu_seqlens)


@register_flop_formula(OPS.flash_attention_backward, get_raw=True)
def flash_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """Five products: the scores anew, and the gradients of p, v, q and k."""
    tokens, heads, dim = q.shape
    return 5 * 2 * heads * dim * visible_pairs(tokens, cu_seqlens)


@register_flop_formula(OPS.linear_log_prob, get_raw=True)
def linear_log_prob(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """The logits; its backward pass is a linear_cross_entropy, which computes them again."""
    return _logits(hidden, len(weight))


@register_flop_formula(OPS.difference_score, get_raw=True)
def difference_score(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """The logits of both, over the ids that both have."""
    vocabulary = min(len(teacher_weight), len(reference_weight))
    return _logits(teacher_hidden, vocabulary) + _logits(reference_hidden, vocabulary)


@register_flop_formula(OPS.linear_cross_entropy, get_raw=True)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    """The logits, and a product of the same size for each gradient that is needed."""
    return (1 + need_hidden + need_weight) * _logits(hidden, len(weight))


@register_flop_formula(OPS.linear_distillation_loss, get_raw=True)
def linear_distillation_loss(
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
    *_: Any,
    **__: Any,
) -> int:
    """Of the student as linear_cross_entropy, of the teacher the logits; over the ids that both have."""
    vocabulary = min(len(student_weight), len(teacher_weight))
    student = (1 + need_hidden + need_weight) * _logits(student_hidden, vocabulary)
    return student + _logits(teacher_hidden, vocabulary)


def _logits(hidden: Tensor, vocabulary: int) -> int:
    tokens, width = hidden.shape
    return 2 * tokens * width * vocabulary
