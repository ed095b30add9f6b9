"""The order of a corpus's rows against its definition."""

import numpy as np
import pytest

from miniplm.data.order import DataOrder, global_batch, share_of_rank, size_for_ranks
from miniplm.runtime.errors import UserError
from miniplm.training.step import num_targets


def stream(num_tokens, seed, shuffle, epochs):
    """(row, first prediction) over the epochs, one by one."""
    at = 0
    for epoch in range(epochs):
        rows = [row for row, n in enumerate(num_tokens) if n > 1]
        if shuffle:
            rows = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
        for row in rows:
            yield row, at
            at += int(num_tokens[row]) - 1


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "rows, longest, batch_tokens", [(200, 40, 100), (57, 1025, 1024), (5, 12, 500), (1, 9, 8), (300, 3, 7)]
)
def test_steps_cut_the_stream_of_epochs_by_tokens(rows, longest, batch_tokens, shuffle):
    num_tokens = np.random.default_rng(rows).integers(0, longest + 1, rows)  # 0 and 1 give no prediction
    num_tokens[-1] = longest
    order = DataOrder(num_tokens, batch_tokens, seed=3, shuffle=shuffle)
    steps = 2 * order.steps_per_epoch + 3
    epochs = -(-steps * batch_tokens // order.epoch_tokens)
    expected = [[] for _ in range(steps)]
    for row, start in stream(num_tokens, 3, shuffle, epochs):
        if start < steps * batch_tokens:
            expected[start // batch_tokens].append(row)
    got = [order.step(step).tolist() for step in range(steps)]
    assert got == expected
    assert all(got)  # no step is empty
    seen = np.cumsum([sum(num_tokens[row] - 1 for row in part) for part in got])
    assert (abs(seen - batch_tokens * np.arange(1, steps + 1)) < longest).all()
    for step in reversed(range(steps)):  # whatever was asked for before
        assert (
            DataOrder(num_tokens, batch_tokens, seed=3, shuffle=shuffle).step(step).tolist()
            == order.step(step).tolist()
            == got[step]
        )


def test_epochs_and_seeds_differ_and_corpus_order_is_kept():
    num_tokens = np.full(50, 11)

    def epoch(number, seed=1, shuffle=True):
        return DataOrder(num_tokens, 500, seed, shuffle).step(number).tolist()

    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(50))
    assert len({tuple(rows) for rows in (epoch(0), epoch(1), epoch(0, seed=2), range(50))}) == 4
    assert epoch(0, shuffle=False) == epoch(7, shuffle=False) == list(range(50))


def test_order_refuses_what_leaves_steps_empty():
    with pytest.raises(
        UserError, match="batch_tokens 9 is below the longest chunk of the corpus, 10 predictions"
    ):
        DataOrder(np.array([3, 11, 4]), 9, 0)
    assert DataOrder(np.array([3, 11, 4]), 10, 0).steps_per_epoch == 2
    for nothing in ([], [1, 0, 1]):
        with pytest.raises(UserError, match="no token to predict"):
            DataOrder(np.array(nothing, np.int64), 10, 0)


@pytest.mark.parametrize("lengths", [[11] * 7, [5, 1, 12, 20, 3, 7, 7, 1, 2, 16]])
def test_totals_are_those_of_the_steps(lengths):
    """Of any value per row, within an epoch and past it, where rows end with a step and where they do not."""
    order, values = DataOrder(np.array(lengths), 20, seed=3), np.arange(len(lengths)) ** 2 + 1
    for steps in range(12):
        rows = np.concatenate([np.zeros(0, np.int64), *(order.step(step) for step in range(steps))])
        assert order.total(values, steps) == values[rows].sum()


@pytest.mark.parametrize("longest, micro_batch_tokens", [(40, 400), (40, 100), (40, 41), (64, 70), (90, 70)])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_a_global_batch(longest, micro_batch_tokens, world):
    """Each row once, as many micro-batches for all, none larger than asked for where rows are shorter; and no
    more of them than such micro-batches that miss a row each would be."""
    generator = np.random.default_rng(world)
    rows = [np.full(n + 1, number + 1) for number, n in enumerate(generator.integers(1, longest + 1, 150))]
    total = sum(len(row) - 1 for row in rows)
    size = size_for_ranks(total, longest, micro_batch_tokens, world)
    batches = global_batch(rows, 0, size)
    shares = [share_of_rank(batches, 0, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-len(batches) // world)}
    assert sum(num_targets(share) for share in shares) == total
    found = [int(batch.input_ids[start]) for share in shares for batch in share for start in starts_of(batch)]
    assert sorted(number for number in found if number) == list(range(1, 151))
    assert all(len(batch.targets) <= max(micro_batch_tokens, longest) for batch in batches)
    if world > 1 and micro_batch_tokens > longest:
        assert len(shares[0]) <= -(-total // (world * (micro_batch_tokens - longest)))
    if world == 1:
        assert size == micro_batch_tokens


def starts_of(batch):
    return batch.row_cu_seqlens[:-1].tolist()
