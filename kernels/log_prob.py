"""linear_log_prob and difference_score in Triton: log-probabilities of one model or two, without logits in
memory.

    z = x Wᵀ        log p = z[target] − log Σ_v exp z_v
    score_b = mean_b log p_teacher − mean_b log p_reference

T tokens, V vocabulary, d hidden width, B documents. x [T, d], W [V, d].

1. logits.py: the log-sum-exp of every token, in splits of the vocabulary, [splits, T] float32; and the logit
   of its target.
2. _log_prob_kernel or _difference_kernel joins the splits in a fixed order, a program per block of tokens or
   per document; for the score it subtracts the models and takes the mean.

FLOPs 2·T·V·d a model, all in step 1; step 2 reads 8·T·splits bytes a model.
A target outside the vocabulary that is not ignore_index gives NaN: the host does not wait to look.
"""

import torch
import triton
import triton.language as tl

from . import dispatch
from .logits import logsumexp_partials, target_logits
from .reference_head import IGNORE_INDEX
from .tiles import BATCH_SIZES, at_most_zero, combine_logsumexp


@triton.jit(do_not_specialize=BATCH_SIZES)
def _log_prob_kernel(
    max_ptr,
    sum_ptr,
    logit_ptr,
    targets_ptr,
    out_ptr,
    T,
    splits,
    stride_target,
    ignore_index,
    BLOCK_T: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + r.to(tl.int64) * stride_target, mask=r < T, other=ignore_index)
    logit = tl.load(logit_ptr + r, mask=r < T, other=0.0)
    log_prob = at_most_zero(logit - combine_logsumexp(max_ptr, sum_ptr, r, T, splits))
    tl.store(out_ptr + r, tl.where(target != ignore_index, log_prob, 0.0), mask=r < T)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _difference_kernel(
    teacher_max,
    teacher_sum,
    teacher_logit,
    reference_max,
    reference_sum,
    reference_logit,
    targets_ptr,
    cu_seqlens_ptr,
    score_ptr,
    teacher_ptr,
    reference_ptr,
    count_ptr,
    T,
    teacher_splits,
    reference_splits,
    stride_target,
    stride_cu,
    ignore_index,
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0)
    end = tl.load(cu_seqlens_ptr + (b + 1) * stride_cu)
    teacher = tl.zeros([BLOCK_T], tl.float32)
    reference = tl.zeros([BLOCK_T], tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    for t in range(tl.load(cu_seqlens_ptr + b * stride_cu), end, BLOCK_T):
        r = t + tl.arange(0, BLOCK_T)
        target = tl.load(targets_ptr + r.to(tl.int64) * stride_target, mask=r < end, other=ignore_index)
        counts = target != ignore_index
        logit = tl.load(teacher_logit + r, mask=counts, other=0.0)
        log_prob = logit - combine_logsumexp(teacher_max, teacher_sum, r, T, teacher_splits)
        teacher += tl.where(counts, at_most_zero(log_prob), 0.0)
        logit = tl.load(reference_logit + r, mask=counts, other=0.0)
        log_prob = logit - combine_logsumexp(reference_max, reference_sum, r, T, reference_splits)
        reference += tl.where(counts, at_most_zero(log_prob), 0.0)
        count += counts.to(tl.int32)
    n = tl.sum(count)
    divisor = tl.where(n > 0, n.to(tl.float32), float("nan"))
    teacher_mean, reference_mean = tl.sum(teacher) / divisor, tl.sum(reference) / divisor
    tl.store(score_ptr + b, teacher_mean - reference_mean)
    tl.store(teacher_ptr + b, teacher_mean)
    tl.store(reference_ptr + b, reference_mean)
    tl.store(count_ptr + b, n)


def _log_prob_examples(make):
    return [
        (
            make(4096, d, dtype=dtype),
            make(151936, d, dtype=dtype),
            make(4096, dtype=torch.int64),
            IGNORE_INDEX,
            0,
        )
        for d, dtype in [
            (1024, torch.bfloat16),
            (1001, torch.bfloat16),
            (1024, torch.float16),
            (1024, torch.float32),
        ]
    ]


@dispatch.triton("linear_log_prob", _log_prob_examples)
def linear_log_prob(hidden, weight, targets, ignore_index, max_logits_bytes=None):
    T = len(hidden)
    out = hidden.new_empty(T, dtype=torch.float32)
    if T:
        largest, total = logsumexp_partials(hidden, weight)
        _log_prob_kernel[(triton.cdiv(T, 128),)](
            largest,
            total,
            target_logits(hidden, weight, targets, ignore_index),
            targets,
            out,
            T,
            len(largest),
            targets.stride(0),
            ignore_index,
            BLOCK_T=128,
        )
    return out


def _difference_examples(make):
    return [
        (
            make(4096, 2048),
            make(151936, 2048),
            make(4096, 512),
            make(151936, 512),
            make(4096, dtype=torch.int64),
            make(5, dtype=torch.int32),
        )
    ]


@dispatch.triton("difference_score", _difference_examples)
def difference_score(teacher_hidden, teacher_weight, reference_hidden, reference_weight, targets, cu_seqlens):
    T, B = len(targets), len(cu_seqlens) - 1
    score, teacher, reference = (teacher_hidden.new_empty(B, dtype=torch.float32) for _ in range(3))
    count = cu_seqlens.new_empty(B)
    if B:
        V = min(len(teacher_weight), len(reference_weight))
        heads = [(teacher_hidden, teacher_weight[:V]), (reference_hidden, reference_weight[:V])]
        partials = [
            (*logsumexp_partials(*head), target_logits(*head, targets, IGNORE_INDEX))
            if T
            else [score.new_empty(0)] * 3
            for head in heads
        ]
        _difference_kernel[(B,)](
            *partials[0],
            *partials[1],
            targets,
            cu_seqlens,
            score,
            teacher,
            reference,
            count,
            T,
            len(partials[0][0]),
            len(partials[1][0]),
            targets.stride(0),
            cu_seqlens.stride(0),
            IGNORE_INDEX,
            BLOCK_T=128,
        )
    return score, teacher, reference, count
