"""Every op in plain PyTorch: the mathematics, the CPU path, and (in float64) the truth of the tests.

Statistics, softmaxes and sums are in float32, or in float64 for float64 inputs. No function holds a [T, V]
tensor: logits exist in tiles of TILE_BYTES where no gradient is needed, else in chunks of tokens within a
bound on bytes. On a GPU these functions work, but make the host wait for it (documents are walked one by one,
targets that count are picked out).

T tokens, V vocabulary, d hidden width, H heads, D head dimension, B documents.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
CHUNK_TOKENS = 512  # rows of logits at a time: enough for the matrix product, few enough for the cache
TILE_BYTES = 4 << 20  # of logits in a tile: it stays in the cache between its product and its softmax
BLOCK_BYTES = 1 << 20  # of logits that pass through a softmax at a time
E4M3_LARGEST = 448.0  # the largest number of float8 e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)
E4M3_SMALLEST_ROW = 1e-12  # a row whose largest magnitude is below it is scaled as if it were that


def accumulate_dtype(x):
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


# --- norms, rotary, SwiGLU ---


def rms_norm(x, weight, eps, dtype):
    """x / rms(x) · weight with rms(x) = √(mean x² + eps). Returns (that, in dtype; 1 / rms [..., 1])."""
    x32 = x.to(accumulate_dtype(x))
    rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x32 * rstd).mul_(weight).to(dtype).contiguous(), rstd


def rms_norm_backward(grad, x, weight, rstd, grad_residual, low_precision_dtype):
    """With r = rstd, dx = r · g·w − x · r³/d · Σ_d g·w·x and dw = Σ g·x·r; grad_residual, if given, is added
    to dx.

    Returns (dx, dx again in the dtype `low_precision_dtype`, empty if None, dw).
    """
    dtype, width = rstd.dtype, x.shape[-1]
    grad32, x32, rstd = grad.reshape(-1, width).to(dtype), x.reshape(-1, width).to(dtype), rstd.reshape(-1, 1)
    product = torch.mul(x32, rstd).mul_(grad32)
    grad_weight = product.sum(0)
    projection = (product @ weight.to(dtype))[:, None].mul_(rstd.square()).div_(-width)
    dx = torch.mul(grad32, weight, out=product).mul_(rstd).addcmul_(x32, projection).view(x.shape)
    if grad_residual is not None:
        dx += grad_residual
    return (
        dx.to(x.dtype),
        dx.to(low_precision_dtype, copy=True) if low_precision_dtype else weight.new_empty(0),
        grad_weight.to(weight.dtype),
    )


def add_rms_norm(x, residual, weight, eps, dtype):
    """(rms_norm(x + residual) in dtype, x + residual, 1 / rms)."""
    total = x + residual
    normed, rstd = rms_norm(total, weight, eps, dtype)
    return normed, total.contiguous(), rstd


def rotary(q, k, positions, inv_freq, inverse):
    """Rotate the pairs (x_i, x_{i + D/2}) by the angle positions · inv_freq_i, or back by it if `inverse`."""
    dtype, half = accumulate_dtype(q), len(inv_freq)
    angles = positions.to(dtype)[:, None, None] * inv_freq.to(dtype)
    cos, sin = torch.cat((angles, angles), -1).cos_(), angles.sin()
    sign = -1 if inverse else 1

    def rotate(x):
        x32 = x.to(dtype)
        rotated = torch.mul(x32, cos).contiguous()
        rotated[..., :half].addcmul_(x32[..., half:], sin, value=-sign)
        rotated[..., half:].addcmul_(x32[..., :half], sin, value=sign)
        return rotated.to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate, up):
    """gate · sigmoid(gate) · up; without up, of the two halves of gate."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    dtype = accumulate_dtype(gate)
    return F.silu(gate.to(dtype)).mul_(up).to(gate.dtype).contiguous()


def swiglu_backward(grad, gate, up):
    """dgate = grad · up · silu'(gate), dup = grad · silu(gate); without up, both side by side, and an empty
    second result."""
    if up is None:
        return torch.cat(swiglu_backward(grad, *gate.chunk(2, -1)), -1), gate.new_empty(0)
    dtype = accumulate_dtype(gate)
    grad32, gate32 = grad.to(dtype), gate.to(dtype)
    grad_gate = grad32 * up
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate32, grad_input=grad_gate)
    return grad_gate.to(gate.dtype).contiguous(), F.silu(gate32).mul_(grad32).to(up.dtype).contiguous()


# --- float8 ---


def quantize_rows(x):
    """(x · 448 / largest, rounded to e4m3 [R, d]; largest / 448 [R, 1] float32) with the largest magnitude of
    each row of x [R, d]."""
    largest = x.abs().amax(1, keepdim=True).float().clamp_(min=E4M3_SMALLEST_ROW)
    return (x.float() * (E4M3_LARGEST / largest)).to(torch.float8_e4m3fn).contiguous(), largest / E4M3_LARGEST


# --- attention ---


def _bounds(cu_seqlens, tokens):
    """cu_seqlens as a list, checked."""
    bounds = cu_seqlens.tolist()
    if (
        not bounds
        or bounds[0] != 0
        or bounds[-1] != tokens
        or any(start > end for start, end in pairwise(bounds))
    ):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {tokens}; got {bounds[:8]}{' …' if len(bounds) > 8 else ''}"
        )
    return bounds


def _runs(cu_seqlens, tokens, max_seqlen):
    """The packed documents as [(start, end, documents)]: runs of documents of equal length. Empty documents
    are left out."""
    runs = []
    for start, end in pairwise(_bounds(cu_seqlens, tokens)):
        if max_seqlen is not None and end - start > max_seqlen:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, but a document has {end - start} tokens; it must be at least "
                f"the longest"
            )
        if runs and (end - start) * runs[-1][2] == start - runs[-1][0]:
            runs[-1] = (runs[-1][0], end, runs[-1][2] + 1)
        elif end > start:
            runs.append((start, end, 1))
    return runs


def _documents(x, run):
    """The run's part of x [T, H, D] as [documents, H, length, D], each row of D contiguous: PyTorch's kernel
    takes that for granted."""
    start, end, documents = run
    part = x[start:end].unflatten(0, (documents, -1)).transpose(1, 2)
    return part if part.stride(-1) == 1 else part.contiguous()


def _packed(parts, like):
    """Join [documents, H, length, D] parts into one [T, H, D]. No copy where there is one part."""
    parts = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return (torch.cat(parts) if len(parts) != 1 else parts[0]) if parts else torch.empty_like(like)


def flash_attention(q, k, v, cu_seqlens, max_seqlen, scale):
    """softmax(scale · q kᵀ) v, causal within each document; query head h reads key head h // (Hq / Hk).

    Returns (out [T, Hq, D], log-sum-exp of the scaled scores [T, Hq]).
    """
    runs = _runs(cu_seqlens, len(q), max_seqlen)
    forward = _attend_cpu if q.device.type == "cpu" else _attend
    results = [forward(*(_documents(x, run) for x in (q, k, v)), scale) for run in runs]
    lse = torch.empty(q.shape[:2], dtype=accumulate_dtype(q), device=q.device)
    for run, (_, run_lse) in zip(runs, results, strict=True):
        lse[run[0] : run[1]] = run_lse.transpose(1, 2).flatten(0, 1)
    return _packed([out for out, _ in results], q).contiguous(), lse


def flash_attention_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale):
    """Gradients of flash_attention for q, k and v."""
    runs = _runs(cu_seqlens, len(q), max_seqlen)
    backward = _attend_backward_cpu if q.device.type == "cpu" else _attend_backward
    results = [
        backward(
            *(_documents(x, run) for x in (grad, q, k, v, out)),
            _documents(lse[..., None], run).squeeze(-1),
            scale,
        )
        for run in runs
    ]
    return tuple(
        _packed(list(parts), x).contiguous()
        for parts, x in zip(zip(*results, strict=True) if runs else ((),) * 3, (q, k, v), strict=True)
    )


def _attend_cpu(q, k, v, scale):
    """Documents of equal length, [documents, H, length, D]: PyTorch's own tiled kernel. (Before torch 2.9 it
    takes equal heads only.)"""
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)


def _attend_backward_cpu(grad, q, k, v, out, lse, scale):
    k_, v_ = _per_query_head(k, q), _per_query_head(v, q)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k_, v_, out, lse, 0.0, True, scale=scale
    )
    return dq, _per_key_head(dk, k), _per_key_head(dv, v)


def _attend(q, k, v, scale):
    """_attend_cpu by the formula, on any device."""
    scores = _scores(q, k, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ _per_query_head(v, q).to(lse.dtype)).to(q.dtype), lse


def _attend_backward(grad, q, k, v, out, lse, scale):
    """With P the softmax and Δ = Σ_D grad · out:  dv = Pᵀ grad,  dS = scale · P ∘ (grad vᵀ − Δ),  dq = dS k,
    dk = dSᵀ q."""
    dtype = lse.dtype
    grad = grad.to(dtype)
    weights = (_scores(q, k, scale) - lse[..., None]).exp()
    d_scores = (
        weights * (grad @ _per_query_head(v, q).to(dtype).mT - (grad * out).sum(-1, keepdim=True)) * scale
    )
    dq, dk, dv = d_scores @ _per_query_head(k, q).to(dtype), d_scores.mT @ q.to(dtype), weights.mT @ grad
    return dq.to(q.dtype), _per_key_head(dk, k).to(k.dtype), _per_key_head(dv, v).to(v.dtype)


def _scores(q, k, scale):
    """The scaled scores of every query against the keys up to its own position, −inf beyond."""
    dtype = accumulate_dtype(q)
    scores = q.to(dtype) @ _per_query_head(k, q).to(dtype).mT * scale
    return scores.masked_fill(
        torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf
    )


def _per_query_head(x, q):
    """The key or value heads, one per query head."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _per_key_head(x, k):
    """The adjoint of _per_query_head: the sum over the query heads of each key head."""
    return x if x.shape[1] == k.shape[1] else x.unflatten(1, (k.shape[1], -1)).sum(2)


# --- the head: log-probabilities, cross-entropy, distillation ---


def _counted(targets, vocabulary, ignore_index):
    """The rows whose target counts, and their targets, both [N] int64. The range is not checked on a GPU,
    where it would cost a wait."""
    rows = (targets != ignore_index).nonzero().squeeze(1)
    targets = targets[rows]
    if targets.device.type == "cpu" and len(targets):
        low, high = map(int, targets.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"targets must be in [0, {vocabulary}), or {ignore_index} to be ignored; got "
                f"{low if low < 0 else high}"
            )
    return rows, targets


def _take(x, rows):
    return x if len(rows) == len(x) else x[rows]


def _put(x, rows, like):
    """The inverse of _take: the rows of x in a tensor shaped like `like`, zero elsewhere."""
    return x if len(rows) == len(like) else torch.zeros_like(like).index_copy_(0, rows, x)


def linear_log_prob(hidden, weight, targets, ignore_index, max_logits_bytes):
    """log softmax(hidden weightᵀ)[target] per token [T], 0 where ignored.

    The logits z pass by in tiles of the vocabulary; per token m = max z and S = Σ exp(z − m) are kept up to
    date.
    """
    rows, targets = _counted(targets, len(weight), ignore_index)
    counted, dtype = _take(hidden, rows), accumulate_dtype(hidden)
    largest = torch.full((len(rows),), torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
    total, target_logit = torch.zeros_like(largest), torch.zeros_like(largest)
    tokens = min(CHUNK_TOKENS, max(1, len(rows)))
    width = max(1, min(TILE_BYTES, max_logits_bytes) // (tokens * dtype.itemsize))
    tile = torch.empty(tokens * min(width, len(weight)), dtype=dtype, device=hidden.device)
    for v in range(0, len(weight), width):
        columns = weight[v : v + width].to(dtype)
        for t in range(0, len(rows), tokens):
            x, m, s, z = (tensor[t : t + tokens] for tensor in (counted, largest, total, target_logit))
            logits = torch.mm(x.to(dtype), columns.T, out=tile[: len(x) * len(columns)].view(len(x), -1))
            column = targets[t : t + tokens] - v
            here = logits.gather(1, column.clamp(0, len(columns) - 1)[:, None]).squeeze(1)
            z.copy_(torch.where((column >= 0) & (column < len(columns)), here, z))
            new = torch.maximum(m, logits.amax(1))
            s.mul_(m.sub_(new).exp_()).add_(logits.sub_(new[:, None]).exp_().sum(1))
            m.copy_(new)
    return _put(
        target_logit - largest - total.log(),
        rows,
        torch.empty(len(hidden), dtype=dtype, device=hidden.device),
    )


def difference_score(teacher_hidden, teacher_weight, reference_hidden, reference_weight, targets, cu_seqlens):
    """Per document the mean log-probability of teacher and reference over the targets that count:
    (teacher − reference, teacher, reference, how many count)."""
    vocabulary = min(len(teacher_weight), len(reference_weight))
    offsets = torch.tensor(_bounds(cu_seqlens, len(targets)), device=targets.device)

    def per_document(values):  # summed in float64; 0 for an empty document
        return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0)

    count = per_document(targets != IGNORE_INDEX)

    def mean(hidden, weight):
        log_prob = linear_log_prob(hidden, weight[:vocabulary], targets, IGNORE_INDEX, TILE_BYTES)
        return (per_document(log_prob) / count).to(accumulate_dtype(teacher_hidden))

    teacher, reference = mean(teacher_hidden, teacher_weight), mean(reference_hidden, reference_weight)
    return teacher - reference, teacher, reference, count.int()


def _chunks(hidden, vocabulary, copies, max_logits_bytes):
    """Yields (a slice of the tokens, memory [copies, its tokens, V] for logits within max_logits_bytes). One
    token at least."""
    dtype, count = accumulate_dtype(hidden), len(hidden)
    size = max(
        1, min(CHUNK_TOKENS, count, max_logits_bytes // (copies * max(1, vocabulary) * dtype.itemsize))
    )
    memory = torch.empty(copies, size, vocabulary, dtype=dtype, device=hidden.device)
    for t in range(0, count, size):
        yield slice(t, t + size), memory[:, : count - t]


def _blocks(logits):
    """Slices of rows that stay in the cache during a softmax."""
    size = max(1, BLOCK_BYTES // (logits.shape[1] * logits.itemsize))
    return [slice(t, t + size) for t in range(0, len(logits), size)]


def _vocabulary_tiles(weight, dtype):
    """(slice, weight[slice] in dtype): one tile if it has that dtype already, else tiles, so that no whole
    copy exists."""
    step = max(1, len(weight) if weight.dtype == dtype else TILE_BYTES // (weight.shape[1] * dtype.itemsize))
    for v in range(0, len(weight), step):
        yield slice(v, v + step), weight[v : v + step].to(dtype)


def _set_logits(logits, x, weight):
    """logits = x weightᵀ, computed in the dtype of logits."""
    for columns, tile in _vocabulary_tiles(weight, logits.dtype):
        torch.mm(x.to(logits.dtype), tile.T, out=logits[:, columns])


def _add_gradients(grad_logits, x, weight, scale, grad_hidden, grad_weight):
    """Add the gradients of one chunk: grad_hidden += scale · grad_logits weight, grad_weight += grad_logitsᵀ
    (scale · x). None: not needed."""
    scaled = x * scale
    for columns, tile in _vocabulary_tiles(weight, x.dtype):
        if grad_hidden is not None:
            grad_hidden += (grad_logits[:, columns] @ tile).mul_(scale)
        if grad_weight is not None:
            grad_weight[columns].addmm_(grad_logits[:, columns].T, scaled)


def linear_cross_entropy(
    hidden, weight, targets, token_weight, ignore_index, need_hidden, need_weight, max_logits_bytes
):
    """(Σ_t token_weight_t · −log p_t, its gradient for hidden, its gradient for weight); a gradient not
    needed is empty.

    With E = exp(z − max z) and S = Σ E over a row of logits z, dz = token_weight / S · (E − S · onehot): the
    row's scale goes to the small operand of both products.
    """
    rows, targets = _counted(targets, len(weight), ignore_index)
    counted, dtype = _take(hidden, rows), accumulate_dtype(hidden)
    token_weight = _take(token_weight, rows).to(dtype)
    grad_hidden = torch.zeros(counted.shape, dtype=dtype, device=hidden.device) if need_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
    negative_log_prob = torch.empty_like(token_weight)
    for chunk, (logits,) in _chunks(counted, len(weight), 1, max_logits_bytes):
        x, y = counted[chunk].to(dtype), targets[chunk, None]
        _set_logits(logits, x, weight)
        total = torch.empty(len(x), 1, dtype=dtype, device=x.device)
        for block in _blocks(logits):
            z, target = logits[block], y[block]
            largest, target_logit = z.amax(1, keepdim=True), z.gather(1, target)
            s = torch.sum(z.sub_(largest).exp_(), 1, keepdim=True, out=total[block])
            negative_log_prob[chunk][block] = (largest + s.log() - target_logit).squeeze(1)
            z.scatter_add_(1, target, -s)
        _add_gradients(
            logits,
            x,
            weight,
            token_weight[chunk, None] / total,
            grad_hidden[chunk] if need_hidden else None,
            grad_weight,
        )
    loss = (token_weight * negative_log_prob).sum()
    return loss, *_gradients(grad_hidden, rows, hidden, grad_weight, weight)


def _gradients(grad_hidden, rows, hidden, grad_weight, weight):
    """The results for the two gradients: in the inputs' dtypes, in all rows; empty where not needed."""
    grad_hidden = (
        hidden.new_empty(0) if grad_hidden is None else _put(grad_hidden.to(hidden.dtype), rows, hidden)
    )
    return grad_hidden, weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype)


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
    """(loss, cross-entropy, KL, gradient of loss for student_hidden, for student_weight), means over the
    targets that count.

    With p = softmax(student logits), and at the temperature τ q the student's and r the teacher's:
    d loss / d logits = (1 − α) (p − onehot) + α/τ (q − r).
    """
    vocabulary = min(len(student_weight), len(teacher_weight))
    student_head, teacher_head = student_weight[:vocabulary], teacher_weight[:vocabulary]
    rows, targets = _counted(targets, vocabulary, ignore_index)
    student, teacher, dtype = (
        _take(student_hidden, rows),
        _take(teacher_hidden, rows),
        accumulate_dtype(student_hidden),
    )
    grad_hidden = torch.zeros(student.shape, dtype=dtype, device=student.device) if need_hidden else None
    grad_weight = (
        torch.zeros(student_weight.shape, dtype=dtype, device=student.device) if need_weight else None
    )
    cross_entropy = torch.empty(len(rows), dtype=dtype, device=student.device)
    divergence = torch.empty_like(cross_entropy)
    for chunk, (logits, teacher_logits) in _chunks(student, vocabulary, 2, max_logits_bytes):
        x, y = student[chunk].to(dtype), targets[chunk, None]
        _set_logits(logits, x, student_head)
        _set_logits(teacher_logits, teacher[chunk], teacher_head)
        for block in _blocks(logits):
            z, target = logits[block], y[block]
            log_p = z.log_softmax(1)
            log_q = log_p if temperature == 1 else z.div_(temperature).log_softmax(1)
            log_r = teacher_logits[block].div_(temperature).log_softmax(1)
            r = log_r.exp()
            cross_entropy[chunk][block] = -log_p.gather(1, target).squeeze(1)
            divergence[chunk][block] = log_r.sub_(log_q).mul_(r).sum(1)
            torch.sub(log_q.exp(), r, out=z).mul_(alpha / temperature).add_(log_p.exp_(), alpha=1 - alpha)
            z.scatter_add_(1, target, torch.full_like(target, alpha - 1, dtype=dtype))
        _add_gradients(
            logits,
            x,
            student_head,
            1 / len(rows),
            grad_hidden[chunk] if need_hidden else None,
            grad_weight[:vocabulary] if need_weight else None,
        )
    cross_entropy, divergence = (sums.sum() / max(1, len(rows)) for sums in (cross_entropy, divergence))
    loss = (1 - alpha) * cross_entropy + alpha * divergence
    return (
        loss,
        cross_entropy,
        divergence,
        *_gradients(grad_hidden, rows, student_hidden, grad_weight, student_weight),
    )
