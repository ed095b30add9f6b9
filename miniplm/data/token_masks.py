"""Which tokens of a global batch are trained on: the rule."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from .batches import IGNORE_INDEX, Batch
from .selection import best_first


def keep_best_tokens(batches: Sequence[Batch], scores: np.ndarray, ratio: float) -> list[Batch]:
    """The micro-batches of a global batch with the targets of its best tokens alone; the others are
    IGNORE_INDEX.

    Of the n targets the int(ratio · n) with the highest scores are kept, one at least; ties go to the earlier
    position, and a score that is not finite is never kept. So it does not matter how the global batch is cut.

    Args:
        scores: float32 [T], of all positions of the batches, in order.
        ratio: above 0, at most 1.
    """
    targets = torch.cat([batch.targets for batch in batches])
    counted = (targets != IGNORE_INDEX).numpy()
    ranked = best_first(np.where(counted, scores, np.float32(np.nan)))
    kept = np.zeros(len(scores), bool)
    kept[ranked[: max(1, int(ratio * np.count_nonzero(counted)))]] = True
    targets = targets.masked_fill(torch.from_numpy(~kept), IGNORE_INDEX)
    parts = targets.split([len(batch.targets) for batch in batches])
    return [replace(batch, targets=part) for batch, part in zip(batches, parts, strict=True)]
