"""linear_distillation_loss in Triton: Vanilla KD, both heads, four matrix products and one pass, the logits
in memory a chunk of tokens at a time.

    loss = (1 − α) · mean(−log p[target]) + α · mean(KL(r ‖ q)),
    p = softmax(z), q = softmax(z / τ), r = softmax(z' / τ)
    d loss / d z = G / n,   G = (1 − α) (p − onehot) + α/τ (q − r)        dx = G W / n        dW = Gᵀ x / n

T tokens, V vocabulary, n targets that count; z = x Wᵀ the student's logits, z' the teacher's.

The products of the logits leave E = exp((z − c) / τ) and E' likewise, with the target's logit as the offset c
and the guard of cross_entropy.py, in the dtype of x, and their sums S, S' in float32. Then, with q = E / S
and r = E' / S',

    p = E^τ / Σ E^τ        KL = Σ r (log E' − log E) − log S' + log S

and one pass over both (_combine_kernel, a program per token) writes G where E was. float16 stores 2¹⁵ E with
the maximum as offset, and 2¹⁵ G. Where E underflows (87 nats below c, in float16 27 below the maximum) and
the teacher holds that possible, a flag on the device is set, and divergence.py computes KL anew from both
models' logits.

KL is that of E as stored: in 16 bits each token's is off by up to the rounding of the dtype, 2⁻⁹ nats in
bfloat16, at random. All else, the gradients among it, takes its sums from what was in float32.

FLOPs 2·T·V·d' + 6·T·V·d for the widths d of student and d' of teacher. Bytes for 16 bits: E and E' written
(4·T·V), both read and G written (6·T·V; E and E' once more where τ ≠ 1), G read twice (4·T·V). Memory:
`max_logits_bytes` bytes for E and E', and dW in float32.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import dispatch, reference_head, tuning
from .cross_entropy import UNIT_FP16, add_product, chunk_memory, guarded_exponentials, product
from .divergence import recompute_divergence
from .reference_head import IGNORE_INDEX
from .tiles import BATCH_SIZES, LN_2, contiguous_rows, log2_of_16_bits

TINY = tl.constexpr(1.2e-38)  # the smallest normal number: an E below has underflowed
# KL is computed anew where the teacher's probability on what underflowed is above this share.
LOST = tl.constexpr(1e-8)
LOST_16 = tl.constexpr(1e-6)  # where E is stored in 16 bits


@triton.jit(do_not_specialize=BATCH_SIZES)
def _combine_kernel(
    e_ptr,
    teacher_ptr,
    total_ptr,
    teacher_total_ptr,
    logit_ptr,
    offset_ptr,
    targets_ptr,
    ce_ptr,
    kl_ptr,
    flag_ptr,
    V,
    stride_et,
    stride_target,
    ignore_index,
    alpha,
    temperature,
    unit,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    NATIVE_LOG: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + t * stride_target)
    e_ptr += t * stride_et
    teacher_ptr += t * stride_et
    if target == ignore_index:
        if GRADIENT:
            for v in range(0, V, BLOCK_V):
                c = v + tl.arange(0, BLOCK_V)
                tl.store(e_ptr + c, tl.zeros([BLOCK_V], e_ptr.dtype.element_ty), mask=c < V)
        tl.store(ce_ptr + t, 0.0)
        tl.store(kl_ptr + t, 0.0)
    else:
        total, teacher_total = tl.load(total_ptr + t), tl.load(teacher_total_ptr + t)  # S and S', times unit
        one = 1 / unit  # a power of two
        p_total = total * one
        if TEMPERED:
            sums = tl.zeros([BLOCK_V], tl.float32)
            for v in range(0, V, BLOCK_V):
                c = v + tl.arange(0, BLOCK_V)
                e = tl.load(e_ptr + c, mask=c < V, other=0.0).to(tl.float32)
                sums += _power(e * one, temperature, NATIVE_LOG)
            p_total = tl.sum(sums)
        inside = (target >= 0) & (target < V)
        e_target = tl.load(e_ptr + target, mask=inside, other=0.0).to(tl.float32) * one
        tl.debug_barrier()  # it is overwritten below

        divergence = tl.zeros([BLOCK_V], tl.float32)
        lost = tl.zeros([BLOCK_V], tl.float32)
        p_scale = (1 - alpha) * unit / p_total
        q_scale = alpha / temperature * unit / total
        r_scale = alpha / temperature * unit / teacher_total
        for v in range(0, V, BLOCK_V):
            c = v + tl.arange(0, BLOCK_V)
            e = tl.load(e_ptr + c, mask=c < V, other=1.0).to(tl.float32)
            e_teacher = tl.load(teacher_ptr + c, mask=c < V, other=0.0).to(tl.float32)
            log_teacher = log2_of_16_bits(tl.where(e_teacher < TINY, TINY, e_teacher), NATIVE_LOG)
            log_e = log2_of_16_bits(tl.where(e < TINY, TINY, e), NATIVE_LOG)
            divergence += e_teacher * (log_teacher - log_e)
            lost += tl.where(e < TINY, e_teacher, 0.0)
            if GRADIENT:
                p = _power(e * one, temperature, NATIVE_LOG) if TEMPERED else e * one
                onehot = tl.where(c == target, (1 - alpha) * unit, 0.0)
                gradient = p_scale * p + q_scale * e - r_scale * e_teacher - onehot
                tl.store(e_ptr + c, gradient.to(e_ptr.dtype.element_ty), mask=c < V)
        if tl.sum(lost) > teacher_total * (LOST if e_ptr.dtype.element_ty == tl.float32 else LOST_16):
            tl.store(flag_ptr, 1)  # whoever does it, writes the same
        logit = tl.load(logit_ptr + t)
        offset = tl.load(offset_ptr + t) + temperature * tl.log2(unit) * LN_2
        ce = offset - logit + tl.log2(p_total) * LN_2
        if e_ptr.dtype.element_ty == tl.float32:
            # With the logit as rounded within S; what is stored in 16 bits is rounded further.
            ce = tl.where(e_target > 1e-30, (tl.log2(p_total) - temperature * tl.log2(e_target)) * LN_2, ce)
        tl.store(ce_ptr + t, tl.where(ce < 0, 0.0, ce))
        kl = tl.sum(divergence) / teacher_total - tl.log2(teacher_total) + tl.log2(total)
        tl.store(kl_ptr + t, kl * LN_2)


@triton.jit
def _power(x, exponent, NATIVE_LOG: tl.constexpr):
    return tl.where(x > 0, tl.exp2(exponent * log2_of_16_bits(x, NATIVE_LOG)), x)


def _examples(make):
    def example(V, teacher_V, temperature, need, dtype=torch.bfloat16):
        return (
            make(4096, 768, dtype=dtype),
            make(V, 768, dtype=dtype),
            make(4096, 2048, dtype=dtype),
            make(teacher_V, 2048, dtype=dtype),
            make(4096, dtype=torch.int64),
            0.5,
            temperature,
            IGNORE_INDEX,
            need,
            need,
            1 << 30,
        )

    return [
        example(151936, 151936, 1.0, True),
        example(151936, 152064, 2.0, True),
        example(151936, 151936, 1.0, False),
        example(1001, 1001, 1.0, True, torch.float16),
        example(1001, 1001, 2.0, True, torch.float32),
    ]


class _Options(NamedTuple):
    """What is the same for all chunks."""

    ignore_index: int
    alpha: float
    temperature: float
    unit: float  # by which E is stored larger
    gradient: bool


def _combine_chunk(hidden, heads, targets, logits, losses, options: _Options):
    """Write each token's losses, and G over E.

    Args:
        hidden: x [T, d] and x' [T, d'] of the chunk. heads: W [V, d] and W' [V, d'].
        logits: memory [2, T, V] for E, which becomes G, and E'.
        losses: cross-entropy [T] and KL [T], float32, 0 where ignored.
    """
    (e, teacher_e), (ce, kl) = logits, losses
    log_unit = options.temperature * math.log(options.unit)
    (total, logit, offset), (teacher_total, _, teacher_offset) = (
        guarded_exponentials(
            x, head, targets, options.ignore_index, z, log_unit, options.temperature, maximum=True
        )
        for x, head, z in zip(hidden, heads, logits, strict=True)
    )
    flag = e.new_zeros(1, dtype=torch.int32)
    _combine_kernel[(len(e),)](
        e,
        teacher_e,
        total,
        teacher_total,
        logit,
        offset,
        targets,
        ce,
        kl,
        flag,
        e.shape[1],
        e.stride(0),
        targets.stride(0),
        options.ignore_index,
        options.alpha,
        options.temperature,
        options.unit,
        TEMPERED=options.temperature != 1,
        GRADIENT=options.gradient,
        NATIVE_LOG=tuning.target(e.device).backend == "cuda" and e.itemsize == 2,
        BLOCK_V=2048,
        num_warps=8,
    )
    statistics = total, offset, teacher_total, teacher_offset
    recompute_divergence(
        hidden, heads, statistics, targets, kl, flag, options.ignore_index, options.temperature
    )


@dispatch.triton("linear_distillation_loss", _examples)
def linear_distillation_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    targets,
    alpha,
    temperature,
    ignore_index,
    need_hidden,
    need_weight,
    max_logits_bytes,
):
    inputs = student_hidden, student_weight, teacher_hidden, teacher_weight, targets
    dtype = student_hidden.dtype
    if dtype == torch.float16 and temperature < 1:
        # E at such a temperature has too few exponents left for p = E^temperature.
        return reference_head.linear_distillation_loss(
            *inputs, alpha, temperature, ignore_index, need_hidden, need_weight, max_logits_bytes
        )
    T, d = student_hidden.shape
    V = min(len(student_weight), len(teacher_weight))
    heads = contiguous_rows(student_weight[:V]), contiguous_rows(teacher_weight[:V])
    grad_hidden = student_hidden.new_empty(T, d) if need_hidden else student_hidden.new_empty(0)
    grad_weight = None
    losses = [student_hidden.new_empty(T, dtype=torch.float32) for _ in range(2)]
    counts = targets != ignore_index
    count = counts.sum().clamp(min=1)
    unit = UNIT_FP16 if dtype == torch.float16 else 1.0
    options = _Options(ignore_index, alpha, temperature, unit, need_hidden or need_weight)
    size, parts, memory = chunk_memory(student_hidden, V, 2, max_logits_bytes)
    # What lies at ignored tokens must not reach the sums as 0 · NaN.
    hidden = [contiguous_rows(torch.where(counts[:, None], x, 0)) for x in (student_hidden, teacher_hidden)]
    for t in range(0, T, size):
        chunk = slice(t, t + size)
        x, y = [states[chunk] for states in hidden], targets[chunk]
        logits = memory[:, : len(y)]
        _combine_chunk(x, heads, y, logits, [loss[chunk] for loss in losses], options)
        if need_hidden:
            grad_hidden[chunk] = product(logits[0], heads[0], parts) / (unit * count)
        if need_weight and grad_weight is None:
            grad_weight = product(logits[0].T, x[0])
        elif need_weight:
            add_product(grad_weight, logits[0].T, x[0])
    cross_entropy, divergence = (x.sum() / count for x in losses)  # results must not share memory
    loss = (1 - alpha) * cross_entropy + alpha * divergence
    if not need_weight:
        return loss, cross_entropy, divergence, grad_hidden, student_weight.new_empty(0)
    result = student_weight.new_empty(student_weight.shape)
    result[V if T else 0 :] = 0  # ids that the teacher does not have
    if grad_weight is not None:
        torch.div(grad_weight, unit * count, out=result[:V])
    return loss, cross_entropy, divergence, grad_hidden, result
