"""What the tests of score share."""

from miniplm.config import ScoreConfig
from miniplm.stages.score import score

# 6 files of the tiny corpus, several batches each, the same on every CPU
SMALL = dict(shard_chunks=7, batch_tokens=100, device="cpu", dtype="float32")


def run_score(data, output, **settings) -> None:
    """Score on the CPU, into small files and in small batches unless the settings say otherwise."""
    score(ScoreConfig(data=str(data), output=str(output), **{**SMALL, **settings}))
