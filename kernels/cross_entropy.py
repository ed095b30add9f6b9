"""linear_cross_entropy in Triton: the loss and both gradients from three matrix products, the logits in
memory a chunk of tokens at a time.

    z = x Wᵀ        loss = Σ_t g_t · nll_t,  nll = log Σ_v exp z_v − z[target]
    dz = g (softmax(z) − onehot)        dx = dz W        dW = dzᵀ x

T tokens, V vocabulary, d hidden width. x [T, d], W [V, d], g [T] a weight per token.

With any offset c per token, E = exp(z − c) and S = Σ_v E, dz = s (E − S·onehot) with s = g / S: the row's
scale s can go to the small operands,

    dx = diag(s) (Ê W)        dW = Êᵀ (diag(s) x)        Ê = E with E[target] − S in the target's place

so that E is written once, by the product that computes the logits, patched in T places, and read by two
library products: three products, and no pass over the logits between them. The offset is the target's own
logit, known from a gather and a dot before the first product: no maximum is needed, and nll = log S. E is
stored in the dtype of x: bfloat16 has float32's exponents, so this holds until E overflows, for nll above 88
nats. The guard: where a chunk has an nll above 60 (or NaN), a flag on the device is set, and the kernels that
follow compute the chunk anew with its log-sum-exp as the offset, one product more. They are launched always
and return at once where the flag is 0, so the host never waits. float16 has not the exponents: it takes that
way always, with E = 2¹⁵ p, and the weights g of a chunk relative to the largest.

FLOPs 6·T·V·d. Bytes: E written once and read twice, 6·T·V for 16 bits; dW, summed in float32 over the chunks,
8·V·d a chunk (chunks.py). Memory: `max_logits_bytes` bytes for E, and dW in float32.
"""

import math

import torch
import triton
import triton.language as tl

from . import chunks, dispatch, tuning
from .logits import exponentials, logsumexp_partials, target_logits
from .reference_head import IGNORE_INDEX
from .tiles import BATCH_SIZES, LN_2, LOG2_E, combine_logsumexp, contiguous_rows, sum_splits

GUARD = tl.constexpr(60.0)  # nats: exp(60) times any gradient stays far from the largest float32
UNIT_FP16 = 2.0**15  # the largest E of float16


@triton.jit(do_not_specialize=BATCH_SIZES)
def _guard_kernel(
    sum_ptr, targets_ptr, flag_ptr, T, splits, stride_target, ignore_index, factor, BLOCK_T: tl.constexpr
):
    r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + r.to(tl.int64) * stride_target, mask=r < T, other=ignore_index)
    nll = tl.log2(sum_splits(sum_ptr, r, T, splits)) * LN_2  # the offset is the target's logit
    trips = (target != ignore_index) & ~(nll * factor < GUARD)  # so written, NaN trips too
    if tl.max(trips.to(tl.int32)) > 0:
        tl.store(flag_ptr, 1)  # whoever does it, writes the same


@triton.jit(do_not_specialize=BATCH_SIZES)
def _offset_kernel(
    max_ptr,
    sum_ptr,
    logit_ptr,
    flag_ptr,
    offset_ptr,
    T,
    splits,
    log_unit,
    MAXIMUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.load(flag_ptr) == 0:
        offset = tl.load(logit_ptr + r, mask=r < T, other=0.0)
    else:
        offset = combine_logsumexp(max_ptr, sum_ptr, r, T, splits, MAXIMUM) - log_unit
    tl.store(offset_ptr + r, offset, mask=r < T)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _total_kernel(
    first_ptr, again_ptr, flag_ptr, total_ptr, T, first_splits, again_splits, BLOCK_T: tl.constexpr
):
    r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.load(flag_ptr) == 0:
        total = sum_splits(first_ptr, r, T, first_splits)
    else:
        total = sum_splits(again_ptr, r, T, again_splits)
    tl.store(total_ptr + r, total, mask=r < T)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _finish_kernel(
    e_ptr,
    total_ptr,
    logit_ptr,
    offset_ptr,
    targets_ptr,
    weight_ptr,
    nll_ptr,
    scale_ptr,
    T,
    V,
    stride_et,
    stride_target,
    stride_weight,
    ignore_index,
    BLOCK_T: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + r.to(tl.int64) * stride_target, mask=r < T, other=ignore_index)
    weight = tl.load(weight_ptr + r.to(tl.int64) * stride_weight, mask=r < T, other=0.0).to(tl.float32)
    counts = target != ignore_index
    offset = tl.load(offset_ptr + r, mask=r < T, other=0.0)
    logit = tl.load(logit_ptr + r, mask=r < T, other=0.0)
    total = tl.load(total_ptr + r, mask=r < T, other=1.0)
    e_target = e_ptr + r.to(tl.int64) * stride_et + target
    inside = counts & (target >= 0) & (target < V)
    nll = offset - logit + tl.log2(total) * LN_2
    exponential = tl.exp2((logit - offset) * LOG2_E)
    if e_ptr.dtype.element_ty == tl.float32:
        # The logit within S, where its rounding is the same; what is stored in 16 bits is rounded further.
        exponential = tl.load(e_target, mask=inside, other=0.0)
        nll = tl.where(exponential > 1e-30, tl.log2(total / exponential) * LN_2, nll)
    tl.store(nll_ptr + r, tl.where(counts, tl.where(nll < 0, 0.0, nll), 0.0), mask=r < T)
    tl.store(scale_ptr + r, tl.where(counts, weight / total, 0.0), mask=r < T)
    tl.store(e_target, (exponential - total).to(e_ptr.dtype.element_ty), mask=inside)


# --- the launches ---


def chunk_memory(x, vocabulary, models, max_logits_bytes):
    """(tokens of a chunk of x [T, d], parts of the vocabulary for dx, memory [models, tokens of a chunk, V]
    for exponentials, rows contiguous)."""
    T, d = x.shape
    width = triton.cdiv(vocabulary, 64) * 64  # rows aligned for descriptors and the products
    bytes_per_token = models * width * x.itemsize
    processors = tuning.target(x.device).processors
    size, parts = chunks.choose(max(1, T), vocabulary, d, bytes_per_token, max_logits_bytes, processors)
    return size, parts, x.new_empty(models, min(size, T), width)[..., :vocabulary]


def product(a, b, parts=1):
    """a [R, V] @ b [V, d] in float32; of so many equal parts of V, one batched product, which are added."""
    if parts > 1:
        a, b = a.unflatten(1, (parts, -1)).transpose(0, 1), b.unflatten(0, (parts, -1))
    if a.dtype == torch.float32 or a.device.type == "cpu":
        result = a.float() @ b.float()
    else:
        result = (torch.mm if parts == 1 else torch.bmm)(a, b, out_dtype=torch.float32)
    return result if parts == 1 else result.sum(0)


def add_product(total, a, b):
    """total += a @ b, total float32."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def guard(flag, sums, targets, ignore_index, factor):
    """Set the flag (int32 on the device) where a target has an nll · factor above GUARD, or NaN; sums: of
    exponentials whose offset is the target's logit, float32 [splits, T]."""
    splits, T = sums.shape
    _guard_kernel[(triton.cdiv(T, 128),)](
        sums, targets, flag, T, splits, targets.stride(0), ignore_index, factor, BLOCK_T=128
    )


def guarded_exponentials(x, w, targets, ignore_index, e, log_unit, temperature=1.0, maximum=False):
    """Write E = exp((z − offset) / temperature) [T, V] to e.

    The offset is the target's logit; where that overflows, and for float16 always, the log-sum-exp (or the
    maximum) less log_unit. Returns (Σ E, the target's logit, the offset), each float32 [T].
    """
    T, grid = len(x), (triton.cdiv(len(x), 128),)
    logit = target_logits(x, w, targets, ignore_index)
    offset, total = torch.empty_like(logit), torch.empty_like(logit)
    first = None  # Σ E per split, with the target's logit as the offset
    flag = x.new_full((1,), int(x.dtype == torch.float16), dtype=torch.int32)
    if x.dtype != torch.float16:
        first = exponentials(x, w, logit, e, temperature=temperature)
        guard(flag, first, targets, ignore_index, max(1.0, temperature))
    # From here on nothing happens where the flag is 0.
    largest, sums = logsumexp_partials(x, w, flag)
    _offset_kernel[grid](
        largest, sums, logit, flag, offset, T, len(sums), log_unit, MAXIMUM=maximum, BLOCK_T=128
    )
    again = exponentials(x, w, offset, e, flag, temperature)
    first = again if first is None else first
    _total_kernel[grid](first, again, flag, total, T, len(first), len(again), BLOCK_T=128)
    return total, logit, offset


def _exponentials_and_scale(x, w, targets, token_weight, ignore_index, e):
    """Write Ê to e [T, V]; returns (nll [T], the row scales s [T]), float32, both 0 where ignored."""
    T, V = e.shape
    log_unit = math.log(UNIT_FP16) if x.dtype == torch.float16 else 0.0
    total, logit, offset = guarded_exponentials(x, w, targets, ignore_index, e, log_unit)
    nll, scale = torch.empty_like(logit), torch.empty_like(logit)
    _finish_kernel[(triton.cdiv(T, 128),)](
        e,
        total,
        logit,
        offset,
        targets,
        token_weight,
        nll,
        scale,
        T,
        V,
        e.stride(0),
        targets.stride(0),
        token_weight.stride(0),
        ignore_index,
        BLOCK_T=128,
    )
    return nll, scale


def _examples(make):
    return [
        (
            make(4096, d, dtype=dtype),
            make(V, d, dtype=dtype),
            make(4096, dtype=torch.int64),
            make(4096, dtype=torch.float32),
            IGNORE_INDEX,
            True,
            True,
            1 << 30,
        )
        for V, d, dtype in [
            (151936, 1024, torch.bfloat16),
            (1001, 1001, torch.bfloat16),
            (151936, 1024, torch.float16),
            (151936, 512, torch.float32),
        ]
    ]


@dispatch.triton("linear_cross_entropy", _examples)
def linear_cross_entropy(
    hidden, weight, targets, token_weight, ignore_index, need_hidden, need_weight, max_logits_bytes
):
    (T, d), V = hidden.shape, len(weight)
    weight = contiguous_rows(weight)
    grad_hidden = hidden.new_empty(T, d) if need_hidden else hidden.new_empty(0)
    grad_weight = None
    nll = hidden.new_empty(T, dtype=torch.float32)
    size, parts, (memory,) = chunk_memory(hidden, V, 1, max_logits_bytes)
    # What lies at ignored tokens must not reach the sums as 0 · NaN.
    hidden = contiguous_rows(torch.where((targets != ignore_index)[:, None], hidden, 0))
    unit = 1.0
    if hidden.dtype == torch.float16:
        unit = UNIT_FP16 / token_weight.abs().amax().clamp(min=1e-30) if T else unit
    for t in range(0, T, size):
        chunk = slice(t, t + size)
        x = hidden[chunk]
        e = memory[: len(x)]
        nll[chunk], scale = _exponentials_and_scale(
            x, weight, targets[chunk], token_weight[chunk], ignore_index, e
        )
        if need_hidden:
            grad_hidden[chunk] = product(e, weight, parts) * scale[:, None]
        if need_weight:
            scaled = (x * (scale * unit)[:, None]).to(x.dtype)
            if t == 0:
                grad_weight = product(e.T, scaled)
            else:
                add_product(grad_weight, e.T, scaled)
    loss = (token_weight * nll).sum()
    if not need_weight:
        return loss, grad_hidden, weight.new_empty(0)
    if not T:
        return loss, grad_hidden, weight.new_zeros(V, d)
    if hidden.dtype == torch.float16:
        grad_weight.div_(unit)
    return loss, grad_hidden, grad_weight.to(weight.dtype)
