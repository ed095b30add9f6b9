"""What a run is made of, and the batches of its steps."""

from collections.abc import Generator
from typing import NamedTuple

import torch

from ..config import TrainConfig
from ..data.batches import Batch, pinned, prefetch
from ..data.corpus import Corpus
from ..data.order import DataOrder, global_batch, share_of_rank, size_for_ranks
from ..data.token_masks import keep_best_tokens
from ..data.token_scores import TokenScores
from ..runtime.distributed import Ranks
from .step import num_targets


class Setup(NamedTuple):
    """What a run is made of, settled before anything is written."""

    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    order: DataOrder
    steps: int
    eval_batches: list[Batch]  # of the evaluation corpus; empty without one
    identity: dict  # all that determines the result
    token_scores: TokenScores | None  # by which the tokens to train on are chosen; None: all are


class GlobalBatch(NamedTuple):
    """What a step is taken on: predictions, and those of them that count, of all ranks; this rank's share."""

    tokens: int
    targets: int
    micro_batches: list[Batch]


def global_batches(
    config: TrainConfig, setup: Setup, ranks: Ranks, first_step: int, micro_batch_tokens: int
) -> Generator[GlobalBatch, None, None]:
    """The batches of the steps from first_step (0, 1, …) on, made in the background. Every rank makes
    all of a global batch, for what counts in it may depend on all of it, and keeps its share."""
    longest, eos = int(setup.order.num_tokens.max()) - 1, setup.corpus.eos_token_id
    size = size_for_ranks(config.batch_tokens + longest, longest, micro_batch_tokens, ranks.world)

    def batch_of(step: int) -> GlobalBatch:
        chunks = setup.order.step(step)
        batches = global_batch(setup.corpus.rows(chunks), eos, size, config.document_mask)
        if setup.token_scores:
            batches = keep_best_tokens(batches, setup.token_scores.of(chunks), config.tokens.ratio)
        tokens = sum(len(batch.targets) for batch in batches)
        share = share_of_rank(batches, eos, ranks.rank, ranks.world)
        return GlobalBatch(tokens, num_targets(batches), list(pinned(share, setup.device)))

    return prefetch(batch_of(step) for step in range(first_step, setup.steps))
