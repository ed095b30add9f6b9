"""What the tests of score share."""

import pytest
import torch

from miniplm.config import ScoreConfig
from miniplm.stages.score import score

# 6 files of the tiny corpus, several batches each, the same on every CPU
SMALL = dict(shard_chunks=7, batch_tokens=100, device="cpu", dtype="float32")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
needs_scaled_rows = pytest.mark.skipif(
    not torch.cuda.is_available() and TORCH < (2, 13), reason="on a CPU, torch 2.13 multiplies scaled rows"
)


def run_score(data, output, **settings) -> None:
    """Score on the CPU, into small files and in small batches unless the settings say otherwise."""
    score(ScoreConfig(data=str(data), output=str(output), **{**SMALL, **settings}))
