"""Every op in plain PyTorch: the mathematics, the CPU path, and (in float64) the truth of the tests.

Statistics, softmaxes and sums are in float32, or in float64 for float64 inputs. No function makes a [T, V] tensor: logits
exist in chunks of rows, or in tiles, of a stated number of bytes.

T tokens, V vocabulary, d hidden width, H heads, D head dimension, B documents.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

TILE_BYTES = 2 << 20  # of logits in scoring: a tile stays in the cache between the matrix product and the passes of the softmax
TILE_TOKENS = 512


def accumulate_dtype(x):
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


# --- norms, rotary, SwiGLU -------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """y = x / rms(x) · weight with rms(x) = √(mean x² + eps). Returns (y, 1 / rms [..., 1])."""
    x32 = x.to(accumulate_dtype(x))
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return ((x32 * rstd) * weight).to(x.dtype), rstd


def rms_norm_backward(grad, x, weight, rstd, grad_x):
    """Gradients of rms_norm; grad_x, if given, is added to that of x. With x̂ = x·rstd and w = weight:

    dx = rstd · (g·w − x̂ · mean(g·w·x̂)),  dw = Σ g·x̂
    """
    grad32 = grad.to(rstd.dtype)
    normed = x.to(rstd.dtype) * rstd
    grad_weight = (grad32 * normed).flatten(0, -2).sum(0).to(weight.dtype)
    grad32 = grad32 * weight
    dx = (grad32 - normed * (grad32 * normed).mean(-1, keepdim=True)) * rstd
    if grad_x is not None:
        dx = dx + grad_x
    return dx.to(x.dtype), grad_weight


def add_rms_norm(x, residual, weight, eps):
    """(rms_norm(x + residual), x + residual, 1 / rms)."""
    total = x + residual
    normed, rstd = rms_norm(total, weight, eps)
    return normed, total, rstd


def rotary(q, k, positions, inv_freq, inverse):
    """Rotate the pairs (x_i, x_{i + D/2}) by the angle positions · inv_freq_i, or back by it if `inverse`."""
    dtype = accumulate_dtype(q)
    angles = positions.to(dtype)[:, None, None] * inv_freq.to(dtype)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin

    def rotate(x):
        first, second = x.to(dtype).chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate, up):
    """silu(gate) · up."""
    dtype = accumulate_dtype(gate)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def swiglu_backward(grad, gate, up):
    """With s = sigmoid(gate): dgate = grad · up · s · (1 + gate · (1 − s)),  dup = grad · gate · s."""
    dtype = accumulate_dtype(gate)
    grad32, gate32 = grad.to(dtype), gate.to(dtype)
    grad_gate = torch.ops.aten.silu_backward(grad32 * up, gate32)
    return grad_gate.to(gate.dtype), (grad32 * F.silu(gate32)).to(up.dtype)


# --- attention -------------------------------------------------------------------------------------------------------


def _runs(cu_seqlens, tokens):
    """Split the packed tokens into runs of documents of equal length: yields (start, end, documents), none empty."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}; got {bounds[:8]}{' …' if len(bounds) > 8 else ''}")
    run = None
    for start, end in pairwise(bounds):
        if start == end:
            continue
        if run and end - start == (run[1] - run[0]) // run[2]:
            run = (run[0], end, run[2] + 1)
            continue
        if run:
            yield run
        run = (start, end, 1)
    if run:
        yield run


def _documents(x, run):
    """[T, H, D] → [documents, H, length, D], a view where x is contiguous."""
    start, end, documents = run
    return x[start:end].unflatten(0, (documents, -1)).transpose(1, 2)


def flash_attention(q, k, v, cu_seqlens, max_seqlen, scale):
    """softmax(scale · q kᵀ) v, causal within each document; query head h reads key head h // (H_q / H_k).

    Returns (out [T, H_q, D], log-sum-exp of the scaled scores [H_q, T]).
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=accumulate_dtype(q), device=q.device)
    for run in _runs(cu_seqlens, q.shape[0]):
        forward = _attend_cpu if q.device.type == "cpu" else _attend
        run_out, run_lse = forward(*(_documents(x, run) for x in (q, k, v)), scale)
        _documents(out, run).copy_(run_out)
        lse[:, run[0] : run[1]] = run_lse.transpose(0, 1).flatten(1)
    return out, lse


def flash_attention_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale):
    """Gradients of flash_attention for q, k and v."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for run in _runs(cu_seqlens, q.shape[0]):
        run_lse = lse[:, run[0] : run[1]].unflatten(1, (run[2], -1)).transpose(0, 1)
        backward = _attend_backward_cpu if q.device.type == "cpu" else _attend_backward
        found = backward(*(_documents(x, run) for x in (grad, q, k, v, out)), run_lse, scale)
        for whole, part in zip(grads, found, strict=True):
            _documents(whole, run).copy_(part)
    return tuple(grads)


def _attend_cpu(q, k, v, scale):
    """One batch of documents of equal length, [documents, H, length, D]: PyTorch's own tiled kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)


def _attend_backward_cpu(grad, q, k, v, out, lse, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)


def _attend(q, k, v, scale):
    """_attend_cpu by the formula, for any device."""
    scores = _scores(q, k, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ _per_query_head(v, q).to(lse.dtype)).to(q.dtype), lse


def _attend_backward(grad, q, k, v, out, lse, scale):
    """With P the softmax and Δ = Σ_D grad · out:  dv = Pᵀ grad,  dS = P ∘ (grad vᵀ − Δ),  dq = scale · dS k,  dk = scale · dSᵀ q."""
    grad, out = grad.to(lse.dtype), out.to(lse.dtype)
    weights = (_scores(q, k, scale) - lse[..., None]).exp()
    d_scores = weights * (grad @ _per_query_head(v, q).to(lse.dtype).mT - (grad * out).sum(-1, keepdim=True)) * scale
    per_key_head = (k.shape[1], -1)
    dq = d_scores @ _per_query_head(k, q).to(lse.dtype)
    dk = (d_scores.mT @ q.to(lse.dtype)).unflatten(1, per_key_head).sum(2)
    dv = (weights.mT @ grad).unflatten(1, per_key_head).sum(2)
    return dq, dk, dv


def _per_query_head(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q, k, scale):
    """The scaled scores of every query against the keys up to its own position, −inf beyond."""
    dtype = accumulate_dtype(q)
    scores = (q.to(dtype) @ _per_query_head(k, q).to(dtype).mT) * scale
    length = q.shape[2]
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), -torch.inf)


# --- the head: log-probabilities, cross-entropy, distillation ---------------------------------------------------------


def _counted(targets, vocabulary, ignore_index):
    """The rows whose target counts ([N] int64) and their targets. Targets on a GPU are not range-checked here: that would wait for it."""
    rows = (targets != ignore_index).nonzero().squeeze(1)
    targets = targets[rows]
    if targets.device.type == "cpu" and len(targets):
        low, high = targets.aminmax()
        if low < 0 or high >= vocabulary:
            wrong = int(low if low < 0 else high)
            raise ValueError(f"targets must be in [0, {vocabulary}) or {ignore_index} (ignored); got {wrong}")
    return rows, targets


def _take(hidden, rows):
    return hidden if len(rows) == len(hidden) else hidden[rows]


def linear_log_prob(hidden, weight, targets, ignore_index, budget=None):
    """log softmax(hidden weightᵀ)[target] per token [T], 0 where ignored.

    The logits pass by in tiles; per token the largest logit m and S = Σ exp(z − m) are kept up to date.
    """
    dtype = accumulate_dtype(hidden)
    result = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    rows, targets = _counted(targets, len(weight), ignore_index)
    hidden = _take(hidden, rows)
    count, vocabulary = len(hidden), len(weight)
    largest = torch.full((count,), torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
    total = torch.zeros_like(largest)
    target_logit = torch.zeros_like(largest)
    tile_tokens = max(1, min(TILE_TOKENS, count))
    tile_vocabulary = max(1, TILE_BYTES // (tile_tokens * dtype.itemsize))
    for v in range(0, vocabulary, tile_vocabulary):
        columns = weight[v : v + tile_vocabulary].to(dtype)
        for t in range(0, count, tile_tokens):
            here = slice(t, t + tile_tokens)
            logits = hidden[here].to(dtype) @ columns.T
            local = targets[here] - v
            inside = (local >= 0) & (local < len(columns))
            picked = logits.gather(1, local.clamp(0, len(columns) - 1)[:, None]).squeeze(1)
            target_logit[here] = torch.where(inside, picked, target_logit[here])
            new = torch.maximum(largest[here], logits.amax(1))
            total[here] = total[here] * (largest[here] - new).exp() + logits.sub_(new[:, None]).exp_().sum(1)
            largest[here] = new
    result[rows] = target_logit - largest - total.log()
    return result


def difference_score(teacher_hidden, teacher_weight, reference_hidden, reference_weight, targets, cu_seqlens):
    """Per document: (teacher − reference, teacher, reference) mean log-probability over the targets that count, and their number."""
    vocabulary = min(len(teacher_weight), len(reference_weight))
    counts = _sum_per_document((targets != -100).double(), cu_seqlens)
    means = [
        (_sum_per_document(linear_log_prob(hidden, weight[:vocabulary], targets, -100).double(), cu_seqlens) / counts)
        for hidden, weight in ((teacher_hidden, teacher_weight), (reference_hidden, reference_weight))
    ]
    dtype = accumulate_dtype(teacher_hidden)
    return (means[0] - means[1]).to(dtype), means[0].to(dtype), means[1].to(dtype), counts.int()


def _sum_per_document(values, cu_seqlens):
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)


def _logits(hidden, weight, dtype):
    return hidden.to(dtype) @ weight.to(dtype).T


def linear_cross_entropy(hidden, weight, targets, token_weight, ignore_index, need_hidden, need_weight, budget):
    """(Σ_t token_weight_t · −log p_t, its gradient for hidden, its gradient for weight); a gradient not needed is empty.

    With E = exp(z − max z) and S = Σ E of a row of logits z, dz = token_weight · (E / S − onehot), so the rows' scale
    token_weight / S goes to the small operand of both products and the logits are passed over once.
    """
    dtype = accumulate_dtype(hidden)
    rows, targets = _counted(targets, len(weight), ignore_index)
    counted, token_weight = _take(hidden, rows), token_weight[rows].to(dtype)
    grad_hidden = torch.zeros_like(counted) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else weight.new_empty(0)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    chunk = max(1, budget // (len(weight) * dtype.itemsize))
    for t in range(0, len(counted), chunk):
        x, y, g = counted[t : t + chunk].to(dtype), targets[t : t + chunk, None], token_weight[t : t + chunk]
        logits = _logits(x, weight, dtype)
        largest = logits.amax(1, keepdim=True)
        target_logit = logits.gather(1, y)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        loss += (g * (largest + total.log() - target_logit).squeeze(1)).sum()
        logits.scatter_add_(1, y, -total)
        scale = g[:, None] / total
        if need_hidden:
            grad_hidden[t : t + chunk] = (logits @ weight.to(dtype)) * scale
        if need_weight:
            grad_weight.addmm_(logits.T, x * scale)
    if need_hidden and len(counted) != len(hidden):
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
    return loss, grad_hidden, grad_weight.to(weight.dtype)


def linear_distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, targets, alpha, temperature, ignore_index,
                             need_hidden, need_weight, budget):
    """(loss, cross-entropy, KL, gradient of loss for student_hidden, for student_weight), means over the targets that count."""
    dtype = accumulate_dtype(student_hidden)
    vocabulary = min(len(student_weight), len(teacher_weight))
    rows, targets = _counted(targets, vocabulary, ignore_index)
    student, teacher = _take(student_hidden, rows), _take(teacher_hidden, rows)
    grad_hidden = torch.zeros_like(student) if need_hidden else student_hidden.new_empty(0)
    grad_weight = torch.zeros(student_weight.shape, dtype=dtype, device=student_weight.device) if need_weight else student_weight.new_empty(0)
    cross_entropy = torch.zeros((), dtype=dtype, device=student.device)
    divergence = torch.zeros_like(cross_entropy)
    chunk = max(1, budget // (4 * vocabulary * dtype.itemsize))
    scale = 1 / max(1, len(rows))
    head = student_weight[:vocabulary]
    for t in range(0, len(student), chunk):
        x, y = student[t : t + chunk].to(dtype), targets[t : t + chunk, None]
        logits = _logits(x, head, dtype)
        log_teacher = (_logits(teacher[t : t + chunk], teacher_weight[:vocabulary], dtype) / temperature).log_softmax(1)
        log_student = logits.log_softmax(1)
        cross_entropy -= log_student.gather(1, y).sum() * scale
        p_student = log_student.exp()
        log_student = (logits / temperature).log_softmax(1)
        p_teacher = log_teacher.exp()
        divergence += (p_teacher * (log_teacher - log_student)).sum() * scale
        if need_hidden or need_weight:
            p_student.scatter_add_(1, y, torch.full_like(y, -1, dtype=dtype))
            grad = p_student.mul_((1 - alpha) * scale).add_(log_student.exp_().sub_(p_teacher), alpha=alpha * scale / temperature)
            if need_hidden:
                grad_hidden[t : t + chunk] = grad @ head.to(dtype)
            if need_weight:
                grad_weight[:vocabulary].addmm_(grad.T, x)
    if need_hidden and len(student) != len(student_hidden):
        grad_hidden = torch.zeros_like(student_hidden).index_copy_(0, rows, grad_hidden)
    loss = (1 - alpha) * cross_entropy + alpha * divergence
    return loss, cross_entropy, divergence, grad_hidden, grad_weight.to(student_weight.dtype)
