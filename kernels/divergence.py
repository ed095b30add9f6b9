"""The divergence of distillation computed anew: from both models' logits, not their stored exponentials.

    KL = Σ_v r_v (log r_v − log q_v),  q = softmax(z / τ), r = softmax(z' / τ)

T tokens, V vocabulary, d and d' the widths of student and teacher; z = x Wᵀ the student's logits, z' the
teacher's. For a chunk in which the exponentials that distillation.py stores have underflowed where the
teacher holds an id possible; _divergence_kernel is launched always, and returns at once where the flag is 0.
A program walks over the vocabulary for a block of tokens, both logits in registers a tile at a time.

FLOPs 2·T·V·(d + d'), hardly ever. Bytes: both heads once per block of tokens (from the L2 cache).
"""

import triton
import triton.language as tl

from . import tuning
from .tiles import BATCH_SIZES, LN_2, LOG2_E, dot_step


@triton.jit(do_not_specialize=BATCH_SIZES)
def _divergence_kernel(
    x,
    w,
    teacher_x,
    teacher_w,
    total_ptr,
    offset_ptr,
    teacher_total_ptr,
    teacher_offset_ptr,
    targets_ptr,
    kl_ptr,
    flag_ptr,
    T,
    V,
    d,
    teacher_d,
    stride_xt,
    stride_wv,
    stride_teacher_xt,
    stride_teacher_wv,
    stride_target,
    ignore_index,
    temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if tl.load(flag_ptr) == 0:
        return
    t = tl.program_id(0) * BLOCK_T
    r = t + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + r.to(tl.int64) * stride_target, mask=r < T, other=ignore_index)
    scale = 1 / temperature * LOG2_E  # logarithms to base 2 from here on
    offset = tl.load(offset_ptr + r, mask=r < T, other=0.0)
    teacher_offset = tl.load(teacher_offset_ptr + r, mask=r < T, other=0.0)
    log_sum_q = tl.log2(tl.load(total_ptr + r, mask=r < T, other=1.0)) + offset * scale
    log_sum_r = tl.log2(tl.load(teacher_total_ptr + r, mask=r < T, other=1.0)) + teacher_offset * scale
    divergence = tl.zeros([BLOCK_T], tl.float32)
    mass = tl.zeros([BLOCK_T], tl.float32)  # of the teacher: 1, but for the rounding of large logits
    for v in range(0, V, BLOCK_V):
        logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, d, BLOCK_D):
            logits = dot_step(
                x, w, t, v, k, T, V, d, stride_xt, stride_wv, logits, BLOCK_T, BLOCK_V, BLOCK_D, False
            )
        teacher_logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, teacher_d, BLOCK_D):
            teacher_logits = dot_step(
                teacher_x,
                teacher_w,
                t,
                v,
                k,
                T,
                V,
                teacher_d,
                stride_teacher_xt,
                stride_teacher_wv,
                teacher_logits,
                BLOCK_T,
                BLOCK_V,
                BLOCK_D,
                False,
            )
        log_q = logits * scale - log_sum_q[:, None]
        log_r = teacher_logits * scale - log_sum_r[:, None]
        teacher = tl.where((v + tl.arange(0, BLOCK_V) < V)[None, :], tl.exp2(log_r), 0.0)
        divergence += tl.sum(teacher * (log_r - log_q), 1)
        mass += tl.sum(teacher, 1)
    tl.store(kl_ptr + r, tl.where(target != ignore_index, divergence / mass * LN_2, 0.0), mask=r < T)


def recompute_divergence(hidden, heads, statistics, targets, kl, flag, ignore_index, temperature):
    """Overwrite kl [T] where the flag (int32 on the device) is not 0.

    Args:
        hidden, heads: (x [T, d], x' [T, d']) and (W [V, d], W' [V, d']) of student and teacher, rows
            contiguous.
        statistics: (Σ E, offset) of the student, then of the teacher, float32 [T] each, as of
            guarded_exponentials.
    """
    (x, teacher_x), (w, teacher_w) = hidden, heads

    def run(config):
        _divergence_kernel[(triton.cdiv(len(x), config.blocks["BLOCK_T"]),)](
            x,
            w,
            teacher_x,
            teacher_w,
            *statistics,
            targets,
            kl,
            flag,
            len(x),
            len(w),
            x.shape[1],
            teacher_x.shape[1],
            *(matrix.stride(0) for matrix in (x, w, teacher_x, teacher_w, targets)),
            ignore_index,
            temperature,
            **config.options,
        )

    tuning.launch("divergence", run, kl.device, itemsize=x.itemsize)
