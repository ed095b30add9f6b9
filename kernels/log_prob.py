"""linear_log_prob and difference_score in Triton: log-probabilities of one model or two, without logits in
memory.

    z = x Wᵀ        log p = −log Σ_v exp (z_v − z[target])
    score_b = mean_b log p_teacher − mean_b log p_reference

T tokens, V vocabulary, d hidden width, B documents. x [T, d], W [V, d].

1. logits.py: the logit of every token's target, a gather and a dot; then, with that as the offset, Σ exp of
   every token, in splits of the vocabulary, [splits, T] float32. No maximum is needed, which would come
   before all exponentials of a tile.
2. That overflows for an nll above 88 nats. Where one is above LARGEST (or NaN), a flag on the device is set,
   and the log-sum-exp is computed with the maximum of every token, one product more; it is launched always,
   and returns at once where the flag is 0.
3. _log_prob_kernel joins the splits in a fixed order. A token whose nll is below LARGEST takes the first way
   whatever the others do: its bits do not depend on them.
4. For the score _mean_kernel takes the means, a program per document, and subtracts the models. What it has
   read, [T] of each model, comes out beside.

FLOPs 2·T·V·d a model, all in step 1. Bytes beside the product's: 12·T·splits.
A target outside the vocabulary that is not ignore_index gives NaN: the host does not wait to look.
"""

import torch
import triton
import triton.language as tl

from . import dispatch
from .cross_entropy import GUARD, guard
from .logits import exponentials, logsumexp_partials, target_logits
from .reference_head import IGNORE_INDEX
from .tiles import BATCH_SIZES, LN_2, at_most_zero, combine_logsumexp, contiguous_rows, sum_splits

LARGEST = tl.constexpr(85.0)  # nats: the sum stays below the largest float32


@triton.jit(do_not_specialize=BATCH_SIZES)
def _log_prob_kernel(
    first_ptr,
    max_ptr,
    again_ptr,
    flag_ptr,
    logit_ptr,
    targets_ptr,
    out_ptr,
    T,
    first_splits,
    again_splits,
    stride_target,
    ignore_index,
    BLOCK_T: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + r.to(tl.int64) * stride_target, mask=r < T, other=ignore_index)
    nll = tl.log2(sum_splits(first_ptr, r, T, first_splits)) * LN_2
    log_prob = -nll
    if tl.load(flag_ptr) != 0:
        logit = tl.load(logit_ptr + r, mask=r < T, other=0.0)
        with_maximum = logit - combine_logsumexp(max_ptr, again_ptr, r, T, again_splits)
        log_prob = tl.where(nll < LARGEST, log_prob, with_maximum)
    tl.store(out_ptr + r, tl.where(target != ignore_index, at_most_zero(log_prob), 0.0), mask=r < T)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mean_kernel(
    teacher_log_prob_ptr,
    reference_log_prob_ptr,
    targets_ptr,
    cu_seqlens_ptr,
    score_ptr,
    teacher_ptr,
    reference_ptr,
    count_ptr,
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
        teacher += tl.load(teacher_log_prob_ptr + r, mask=counts, other=0.0)
        reference += tl.load(reference_log_prob_ptr + r, mask=counts, other=0.0)
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
        x, w = contiguous_rows(hidden), contiguous_rows(weight)
        logit = target_logits(x, w, targets, ignore_index)
        first = exponentials(x, w, logit, None)
        flag = targets.new_zeros(1, dtype=torch.int32)
        guard(flag, first, targets, ignore_index, GUARD.value / LARGEST.value)
        largest, again = logsumexp_partials(x, w, flag)
        _log_prob_kernel[(triton.cdiv(T, 128),)](
            first,
            largest,
            again,
            flag,
            logit,
            targets,
            out,
            T,
            len(first),
            len(again),
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
    B = len(cu_seqlens) - 1
    score, teacher, reference = (teacher_hidden.new_empty(B, dtype=torch.float32) for _ in range(3))
    count = cu_seqlens.new_empty(B)
    V = min(len(teacher_weight), len(reference_weight))
    heads = (teacher_hidden, teacher_weight[:V]), (reference_hidden, reference_weight[:V])
    log_probs = [linear_log_prob(*head, targets, IGNORE_INDEX) for head in heads]
    if B:
        _mean_kernel[(B,)](
            *log_probs,
            targets,
            cu_seqlens,
            score,
            teacher,
            reference,
            count,
            targets.stride(0),
            cu_seqlens.stride(0),
            IGNORE_INDEX,
            BLOCK_T=128,
        )
    return score, teacher, reference, count, *log_probs
