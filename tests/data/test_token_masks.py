"""Which tokens of a global batch are trained on, against a loop over them."""

import random

import numpy as np
import pytest
import torch

from miniplm.data.batches import IGNORE_INDEX
from miniplm.data.order import global_batch
from miniplm.data.token_masks import keep_best_tokens

EOS = 0


def by_a_loop(targets, scores, ratio) -> list[bool]:
    """Token by token: kept are those that fewer others beat than there is room for."""
    counted = [place for place, target in enumerate(targets) if target != IGNORE_INDEX]
    room = max(1, int(ratio * len(counted)))
    kept = [False] * len(targets)
    for place in counted:
        beaten_by = sum(
            np.isfinite(scores[other])
            and (scores[other] > scores[place] or (scores[other] == scores[place] and other < place))
            for other in counted
        )
        kept[place] = bool(np.isfinite(scores[place])) and beaten_by < room
    return kept


def rows_and_scores(rng, kind):
    rows = [np.array([rng.randint(0, 6) for _ in range(rng.randint(2, 30))], np.int32) for _ in range(9)]
    total = sum(len(row) - 1 for row in rows)
    choices = {
        "random": lambda: rng.gauss(0, 3),
        "tied": lambda: rng.choice([-1.5, -0.0, 0.0, 2.0]),
        "equal": lambda: 1.0,
        "broken": lambda: rng.choice([rng.gauss(0, 1), float("nan"), float("inf"), float("-inf")]),
    }
    return rows, np.array([choices[kind]() for _ in range(total)], np.float32)


@pytest.mark.parametrize("kind", ["random", "tied", "equal", "broken"])
def test_equals_a_loop_over_tokens_however_the_batch_is_cut(kind):
    rng = random.Random(kind)
    for ratio in (0.01, 0.3, 0.6, 0.99, 1.0):
        rows, scores = rows_and_scores(rng, kind)
        whole = global_batch(rows, EOS, 10_000)
        targets = whole[0].targets.tolist()
        expected = by_a_loop(targets, scores, ratio)
        for micro_batch_tokens in (10_000, 40, 1):
            batches = global_batch(rows, EOS, micro_batch_tokens)
            found = keep_best_tokens(batches, scores, ratio)
            assert [len(batch.targets) for batch in found] == [len(batch.targets) for batch in batches]
            kept = torch.cat([batch.targets for batch in found]).tolist()
            assert kept == [
                target if keep else IGNORE_INDEX for target, keep in zip(targets, expected, strict=True)
            ]
            assert all(
                one.input_ids is two.input_ids and one.cu_seqlens is two.cu_seqlens
                for one, two in zip(found, batches, strict=True)
            )
        assert torch.cat([batch.targets for batch in whole]).tolist() == targets  # theirs are as they were


def test_all_of_them_and_one_at_least():
    rows = [np.array([3, 4, EOS, 5, 6], np.int32)]
    (batch,) = global_batch(rows, EOS, 100)
    scores = np.array([1, 2, np.nan, 3], np.float32)  # the third follows the end of a text
    assert torch.equal(keep_best_tokens([batch], scores, 1.0)[0].targets, batch.targets)
    assert keep_best_tokens([batch], scores, 0.01)[0].targets.tolist() == [*[IGNORE_INDEX] * 3, 6]
    nothing = keep_best_tokens([batch], scores * np.nan, 0.5)[0]
    assert nothing.targets.tolist() == [IGNORE_INDEX] * 4
