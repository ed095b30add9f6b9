"""The ops of the head in plain PyTorch: log-probabilities, difference score, cross-entropy, distillation.

As in reference.py: the mathematics, the CPU path, and in float64 the truth of the tests. No function holds a
[T, V] tensor: logits exist in tiles of TILE_BYTES where no gradient is needed, else in chunks of tokens
within a bound on bytes. On a GPU these functions make the host wait: targets that count are picked out.

T tokens, N of them counted, V vocabulary, d hidden width, B documents.
"""

from collections.abc import Iterator
from typing import Union

import torch
from torch import Tensor

from .reference import accumulate_dtype, checked_bounds

IGNORE_INDEX = -100
CHUNK_TOKENS = 512  # rows of logits at a time: enough for the matrix product, few enough for the cache
TILE_BYTES = 4 << 20  # of logits in a tile: it stays in the cache between its product and its softmax
BLOCK_BYTES = 1 << 20  # of logits that pass through a softmax at a time


# --- the targets that count ---


def _counted(targets: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
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


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x if len(rows) == len(x) else x[rows]


def _put(x: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of _take: the rows of x in a tensor shaped like `like`, zero elsewhere."""
    return x if len(rows) == len(like) else torch.zeros_like(like).index_copy_(0, rows, x)


# --- log-probabilities ---


def linear_log_prob(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, max_logits_bytes: int
) -> Tensor:
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
            logits = tile[: len(x) * len(columns)].view(len(x), -1)
            torch.mm(x.to(dtype), columns.T, out=logits)
            column = targets[t : t + tokens] - v
            here = logits.gather(1, column.clamp(0, len(columns) - 1)[:, None]).squeeze(1)
            z.copy_(torch.where((column >= 0) & (column < len(columns)), here, z))
            new = torch.maximum(m, logits.amax(1))
            s.mul_(m.sub_(new).exp_()).add_(logits.sub_(new[:, None]).exp_().sum(1))
            m.copy_(new)
    log_prob = target_logit - largest - total.log()
    return _put(log_prob, rows, torch.empty(len(hidden), dtype=dtype, device=hidden.device))


def difference_score(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, ...]:
    """Per document the mean log-probability of teacher and reference over the targets that count:
    (teacher − reference, teacher, reference, how many count); and both per token, [T]."""
    vocabulary = min(len(teacher_weight), len(reference_weight))
    offsets = torch.tensor(checked_bounds(cu_seqlens, len(targets)), device=targets.device)

    def per_document(values: Tensor) -> Tensor:  # summed in float64; 0 for an empty document
        return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0)

    count = per_document(targets != IGNORE_INDEX)

    heads = (teacher_hidden, teacher_weight[:vocabulary]), (reference_hidden, reference_weight[:vocabulary])
    tokens = [linear_log_prob(*head, targets, IGNORE_INDEX, TILE_BYTES) for head in heads]
    dtype = accumulate_dtype(teacher_hidden)
    teacher, reference = ((per_document(log_prob) / count).to(dtype) for log_prob in tokens)
    return teacher - reference, teacher, reference, count.int(), *tokens


# --- what the losses share ---


def _chunks(
    hidden: Tensor, vocabulary: int, copies: int, max_logits_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (a slice of the tokens, memory [copies, its tokens, V] for logits within max_logits_bytes). One
    token at least."""
    dtype, count = accumulate_dtype(hidden), len(hidden)
    bytes_per_token = copies * max(1, vocabulary) * dtype.itemsize
    size = max(1, min(CHUNK_TOKENS, count, max_logits_bytes // bytes_per_token))
    memory = torch.empty(copies, size, vocabulary, dtype=dtype, device=hidden.device)
    for t in range(0, count, size):
        yield slice(t, t + size), memory[:, : count - t]


def _blocks(logits: Tensor) -> list[slice]:
    """Slices of rows that stay in the cache during a softmax."""
    size = max(1, BLOCK_BYTES // (logits.shape[1] * logits.itemsize))
    return [slice(t, t + size) for t in range(0, len(logits), size)]


def _vocabulary_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(slice, weight[slice] in dtype): one tile if it has that dtype already, else tiles, so that no whole
    copy exists."""
    step = len(weight) if weight.dtype == dtype else TILE_BYTES // (weight.shape[1] * dtype.itemsize)
    step = max(1, step)
    for v in range(0, len(weight), step):
        yield slice(v, v + step), weight[v : v + step].to(dtype)


def _set_logits(logits: Tensor, x: Tensor, weight: Tensor) -> None:
    """logits = x weightᵀ, computed in the dtype of logits."""
    for columns, tile in _vocabulary_tiles(weight, logits.dtype):
        torch.mm(x.to(logits.dtype), tile.T, out=logits[:, columns])


class _Gradients:
    """The sums for the two gradients, and the results they end as; what is not needed is None."""

    def __init__(self, hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool):
        """hidden: [N, d], the rows that count."""
        dtype = accumulate_dtype(hidden)
        self.hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        self.weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None

    def add(
        self, chunk: slice, grad_logits: Tensor, x: Tensor, weight: Tensor, scale: Union[Tensor, float]
    ) -> None:
        """Add those of one chunk: hidden += scale · grad_logits weight, weight += grad_logitsᵀ (scale · x).
        Of the weight the first rows take part, those of the `weight` given."""
        scaled = x * scale
        for columns, tile in _vocabulary_tiles(weight, x.dtype):
            if self.hidden is not None:
                self.hidden[chunk].add_((grad_logits[:, columns] @ tile).mul_(scale))
            if self.weight is not None:
                self.weight[: len(weight)][columns].addmm_(grad_logits[:, columns].T, scaled)

    def results(self, rows: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """In the inputs' dtypes, in all rows of hidden; empty where not needed."""
        grad_hidden, grad_weight = hidden.new_empty(0), weight.new_empty(0)
        if self.hidden is not None:
            grad_hidden = _put(self.hidden.to(hidden.dtype), rows, hidden)
        if self.weight is not None:
            grad_weight = self.weight.to(weight.dtype)
        return grad_hidden, grad_weight


# --- losses ---


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    max_logits_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ_t token_weight_t · −log p_t, its gradient for hidden, its gradient for weight); a gradient not
    needed is empty.

    With E = exp(z − max z) and S = Σ E over a row of logits z, dz = token_weight / S · (E − S · onehot): the
    row's scale goes to the small operand of both products.
    """
    rows, targets = _counted(targets, len(weight), ignore_index)
    counted, dtype = _take(hidden, rows), accumulate_dtype(hidden)
    token_weight = _take(token_weight, rows).to(dtype)
    gradients = _Gradients(counted, weight, need_hidden, need_weight)
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
        gradients.add(chunk, logits, x, weight, token_weight[chunk, None] / total)
    loss = (token_weight * negative_log_prob).sum()
    return loss, *gradients.results(rows, hidden, weight)


def _distill_block(
    z: Tensor, teacher_z: Tensor, target: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, KL) of each row of the logits z and teacher_z [N, V], target [N, 1]; z becomes the
    gradient of (1 − α) · cross-entropy + α · KL, teacher_z is lost."""
    log_p = z.log_softmax(1)
    log_q = log_p if temperature == 1 else z.div_(temperature).log_softmax(1)
    log_r = teacher_z.div_(temperature).log_softmax(1)
    r = log_r.exp()
    cross_entropy = -log_p.gather(1, target).squeeze(1)
    divergence = log_r.sub_(log_q).mul_(r).sum(1)
    torch.sub(log_q.exp(), r, out=z).mul_(alpha / temperature).add_(log_p.exp_(), alpha=1 - alpha)
    z.scatter_add_(1, target, torch.full_like(target, alpha - 1, dtype=z.dtype))
    return cross_entropy, divergence


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
    max_logits_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, KL, gradient of loss for student_hidden, for student_weight), means over the
    targets that count.

    With p = softmax(student logits), and at the temperature τ q the student's and r the teacher's:
    d loss / d logits = (1 − α) (p − onehot) + α/τ (q − r).
    """
    vocabulary = min(len(student_weight), len(teacher_weight))
    student_head, teacher_head = student_weight[:vocabulary], teacher_weight[:vocabulary]
    rows, targets = _counted(targets, vocabulary, ignore_index)
    student, teacher = _take(student_hidden, rows), _take(teacher_hidden, rows)
    gradients = _Gradients(student, student_weight, need_hidden, need_weight)
    cross_entropy = torch.empty(len(rows), dtype=accumulate_dtype(student), device=student.device)
    divergence = torch.empty_like(cross_entropy)
    for chunk, (logits, teacher_logits) in _chunks(student, vocabulary, 2, max_logits_bytes):
        x, y = student[chunk].to(logits.dtype), targets[chunk, None]
        _set_logits(logits, x, student_head)
        _set_logits(teacher_logits, teacher[chunk], teacher_head)
        for block in _blocks(logits):
            cross_entropy[chunk][block], divergence[chunk][block] = _distill_block(
                logits[block], teacher_logits[block], y[block], alpha, temperature
            )
        gradients.add(chunk, logits, x, student_head, 1 / len(rows))
    cross_entropy, divergence = (sums.sum() / max(1, len(rows)) for sums in (cross_entropy, divergence))
    loss = (1 - alpha) * cross_entropy + alpha * divergence
    return loss, cross_entropy, divergence, *gradients.results(rows, student_hidden, student_weight)
