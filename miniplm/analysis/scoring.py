"""Scores of chunks: the mean log-probability of a chunk's unmasked tokens under each model, and their
difference (Gu et al., arXiv 2410.17215)."""

from collections.abc import Iterator

import numpy as np
import torch

from ..data.batches import IGNORE_INDEX, Batch, pack, split_by_tokens
from ..data.corpus import Corpus
from ..kernels import difference_score, linear_log_prob
from ..models.base import LanguageModel

Models = dict[str, LanguageModel]  # by role


def score_batches(
    corpus: Corpus, chunks: range | np.ndarray, batch_tokens: int, document_mask: bool
) -> Iterator[Batch]:
    """The chunks of a corpus with these numbers, in order, packed into batches of up to batch_tokens
    positions, one chunk at least."""
    chunks = np.asarray(chunks, np.int64)
    for group in split_by_tokens(corpus.num_tokens[chunks], batch_tokens):
        yield pack(corpus.rows(chunks[group]), corpus.eos_token_id, document_mask)


def score_batch(
    models: Models, batch: Batch, vocab_size: int, tokens: bool = False
) -> dict[str, torch.Tensor]:
    """The columns of the score files for the R rows of a batch, each [R] on the models' device.

    Args:
        models: {"teacher": LanguageModel, "reference": LanguageModel} or one of the two.
        vocab_size: the softmax covers the first so many ids.
        tokens: give what the means are of, too.
    Returns:
        num_tokens (unmasked positions), teacher_log_prob, reference_log_prob (means over those, nats), score
        (their difference, with both models only). A row without an unmasked position gets NaN. With tokens
        also teacher_tokens, reference_tokens: the log-probabilities of all positions as files hold them,
        float16 [T].
    """
    hidden = {
        role: model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen) for role, model in models.items()
    }
    heads = {role: model.head_weight[:vocab_size] for role, model in models.items()}
    if len(models) == 2:
        scores = difference_score(
            hidden["teacher"],
            heads["teacher"],
            hidden["reference"],
            heads["reference"],
            batch.targets,
            batch.row_cu_seqlens,
        )._asdict()
        log_probs = {role: scores.pop(f"{role}_token_log_prob") for role in models}
    else:
        (role,) = models
        log_probs = {role: linear_log_prob(hidden[role], heads[role], batch.targets)}
        offsets = batch.row_cu_seqlens.long()
        total, count = (
            torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0)
            for values in (log_probs[role], batch.targets != IGNORE_INDEX)
        )
        scores = {"num_tokens": count, f"{role}_log_prob": total / count}
    if tokens:
        scores |= {f"{role}_tokens": _as_stored(log_probs[role], batch.targets) for role in models}
    return scores


def _as_stored(log_prob: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T] as data/token_scores.py keeps them: float16, NaN where there is none."""
    there = (targets != IGNORE_INDEX) & log_prob.isfinite()
    lowest = torch.finfo(torch.float16).min
    return log_prob.clamp(min=lowest).half().masked_fill(~there, torch.nan)
