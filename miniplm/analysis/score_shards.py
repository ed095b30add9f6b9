"""The models of score, and the files that they write."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from ..data.batches import Batch, pinned, prefetch
from ..data.scores import shard_path, write_shard, writing_shard
from ..data.selection import rank_agreement
from ..data.token_scores import token_path, write_tokens
from ..models.float8 import to_float8
from ..models.loading import load_model
from ..runtime.artifacts import recorded
from ..runtime.errors import UserError
from ..runtime.profiling import trace
from ..training.cost import corpus_flops
from .score_plan import ScorePlan
from .scoring import Models, score_batch, score_batches

AGREEMENT_CHUNKS = 1024  # on which a lower precision is compared
# On the CPU at most an eighth of the corpus, so that comparing costs less than bfloat16 saves; 64 at least.
MIN_AGREEMENT_CHUNKS, MAX_AGREEMENT_SHARE = 64, 1 / 8
MIN_EQUAL_SELECTIONS = 0.995  # beyond which bfloat16 is taken for float32


class Scorer:
    """Scores files of a plan in this process. `plan`, `vocab_size` (the ids that the softmax covers) and
    `agreement` (how well a lower precision agrees with the higher one) are known once the models are
    loaded."""

    def __init__(self, plan: ScorePlan):
        self.plan, self._models, self.vocab_size, self.agreement = load(plan)

    def flops(self) -> dict[str, int]:
        """What scoring all files takes, by role."""
        return corpus_flops(self._models, self.plan.corpus, self.plan.config.document_mask, self.plan.chunks)

    def score(self, numbers: Sequence[int], advance: Callable[[int], None]) -> dict[int, list[str]]:
        """As score_shards."""
        return score_shards(self.plan, numbers, self._models, self.vocab_size, advance)


def load(plan: ScorePlan) -> tuple[ScorePlan, Models, int, dict[str, Any] | None]:
    """(the plan, the models by role, the number of ids that the softmax covers, how well a lower precision
    agrees with the higher one). Where bfloat16 does not agree well enough for auto, all is float32, and there
    is no agreement to tell."""
    fp8 = plan.config.precision is not None
    if not fp8 and not (plan.device.type == "cpu" and plan.dtype == torch.bfloat16):
        return plan, *_load_models(plan, plan.dtype), None
    models, vocab_size = _load_models(plan, plan.dtype if fp8 else torch.float32)
    before = _sample_scores(models, vocab_size, plan)
    if fp8:
        for model in models.values():
            to_float8(model)
    else:
        del models
        models, _ = _load_models(plan, torch.bfloat16)
    agreement = rank_agreement(before, _sample_scores(models, vocab_size, plan))
    equal = agreement["equal_selections"] or 0.0
    begun = recorded(plan.output).get("identity", {}).get("dtype") == plan.identity["dtype"]
    if fp8 or plan.config.dtype != "auto" or begun or equal > MIN_EQUAL_SELECTIONS:
        return plan, models, vocab_size, agreement
    reason = (
        f"bfloat16 selects or drops {equal:.1%} of {agreement['rows']:,} chunks alike, more than "
        f"{MIN_EQUAL_SELECTIONS:.1%} are needed"
    )
    identity = {**plan.identity, "dtype": "float32"}
    plan = replace(plan, dtype=torch.float32, identity=identity, reason=reason)
    return plan, *_load_models(plan, plan.dtype), None


def _load_models(plan: ScorePlan, dtype: torch.dtype) -> tuple[Models, int]:
    """(the models by role, the number of ids that the softmax covers)."""
    config = plan.config
    models = {
        role: load_model(name, dtype, plan.device, config.trust_remote_code)
        for role, name in plan.folders.items()
    }
    heads = [len(model.head_weight) for model in models.values()]
    vocab_size = min([*heads, config.vocab_size or heads[0]])
    # Where the tokenizer's own highest id fits, there is no need to look for the corpus's.
    needed = max(plan.tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        needed = plan.corpus.highest_id + 1
    if needed > vocab_size:
        raise UserError(
            f"corpus {config.data} has ids up to {needed - 1}, the softmax covers only {vocab_size}: "
            "give models with a larger head, or a larger vocab_size"
        )
    return models, vocab_size


def score_shards(
    plan: ScorePlan,
    numbers: Iterable[int],
    models: Models,
    vocab_size: int,
    advance: Callable[[int], None],
) -> dict[int, list[str]]:
    """Write the score files with these numbers, and their hashes beside them, which are returned too: by
    number, that of the score file and, with tokens, that of the tokens.

    Args:
        advance: is told the positions that were scored, as they are.
    """
    written: dict[int, list[str]] = {}
    batches = (
        (number, batch)
        for number in numbers
        for batch in pinned(_batches(plan, plan.shards[number]), plan.device)
    )
    with torch.inference_mode(), trace(plan.config.profile) as profiler_step:
        for number, group in groupby(prefetch(batches), key=itemgetter(0)):
            parts = []
            for _, batch in group:
                try:
                    parts.append(score_batch(models, batch.to(plan.device), vocab_size, plan.config.tokens))
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"out of GPU memory: lower batch_tokens (now {plan.batch_tokens:,}) for a new output "
                        f"folder"
                    ) from error
                advance(len(batch.input_ids))
                profiler_step()
            values = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
            written[number] = _write(plan, number, values)
    return written


def _write(plan: ScorePlan, number: int, values: dict[str, np.ndarray]) -> list[str]:
    """Write the files of a shard and return their hashes."""
    output, rows = plan.output, plan.shards[number]
    with writing_shard(output, number) as hashes:
        if plan.config.tokens:
            tokens = {role: values[f"{role}_tokens"] for role in plan.names}
            positions = plan.corpus.num_tokens[rows] - 1
            hashes[token_path(output, number).name] = write_tokens(output, number, rows, positions, tokens)
        name = shard_path(output, number).name
        hashes[name] = write_shard(output, number, rows, plan.columns, values)
    return [hashes.pop(name), *hashes.values()]


def _batches(plan: ScorePlan, chunks: np.ndarray) -> Iterator[Batch]:
    return score_batches(plan.corpus, chunks, plan.batch_tokens, plan.config.document_mask)


@torch.inference_mode()
def _sample_scores(models: Models, vocab_size: int, plan: ScorePlan) -> np.ndarray:
    """The last column of a sample of chunks that are spread over the corpus: float64."""
    parts, size = [], AGREEMENT_CHUNKS
    if not plan.config.precision:
        size = max(MIN_AGREEMENT_CHUNKS, min(size, int(MAX_AGREEMENT_SHARE * len(plan.chunks))))
    places = np.unique(np.linspace(0, len(plan.chunks) - 1, size).astype(np.int64))
    for batch in _batches(plan, plan.chunks[places]):
        parts.append(score_batch(models, batch.to(plan.device), vocab_size)[plan.columns[-1]])
    return torch.cat(parts).double().cpu().numpy()
