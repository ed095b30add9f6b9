import random
import threading

import numpy as np
import pytest
import torch

from miniplm.data.batches import IGNORE_INDEX, pack, prefetch, split_by_tokens


def naive(rows, eos, document_mask):
    """The packed layout, one position at a time."""
    inputs, targets, bounds, row_bounds = [], [], [0], [0]
    for row in rows:
        for position in range(len(row) - 1):
            inputs.append(row[position])
            targets.append(IGNORE_INDEX if row[position] == eos else row[position + 1])
            if document_mask and row[position] == eos:
                bounds.append(len(inputs))
        bounds.append(len(inputs))
        row_bounds.append(len(inputs))
    return inputs, targets, bounds, row_bounds


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_pack_against_one_position_at_a_time(seed, document_mask):
    rng = random.Random(seed)
    rows = [
        np.array([rng.randrange(4) for _ in range(rng.choice([1, 2, 3, 9]))], np.int32)
        for _ in range(rng.choice([0, 1, 7]))
    ]
    batch = pack(rows, eos_token_id=0, document_mask=document_mask)
    inputs, targets, bounds, row_bounds = naive(rows, 0, document_mask)
    assert (
        batch.input_ids.tolist() == inputs
        and batch.targets.tolist() == targets
        and batch.row_cu_seqlens.tolist() == row_bounds
    )
    if document_mask:  # which bounds repeat does not matter to attention
        assert batch.cu_seqlens.tolist() == sorted(set(bounds))
    else:
        assert batch.cu_seqlens.tolist() == bounds
    assert batch.max_seqlen == max(np.diff(bounds), default=0)
    assert (
        batch.input_ids.dtype == batch.targets.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    )


def test_split_by_tokens_keeps_order_and_budget():
    rng = random.Random(0)
    for _ in range(50):
        lengths = np.array([rng.choice([1, 2, 5, 30]) for _ in range(rng.randrange(20))], np.int64)
        groups = split_by_tokens(lengths, 20)
        assert [row for group in groups for row in range(group.start, group.stop)] == list(
            range(len(lengths))
        )
        for group, following in zip(groups, [*groups[1:], None][: len(groups)], strict=True):
            positions = (lengths[group] - 1).sum()
            assert positions <= 20 or group.stop - group.start == 1
            assert following is None or positions + lengths[following.start] - 1 > 20


def test_prefetch_passes_items_errors_and_stops():
    def numbers():
        yield from range(3)
        raise OSError("disk")

    received = []
    with pytest.raises(OSError, match="disk"):
        for number in prefetch(numbers()):
            received.append(number)
    assert received == [0, 1, 2]
    before = threading.active_count()
    endless = prefetch(iter(int, 1))
    next(endless)
    endless.close()
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.main_thread():
            thread.join(timeout=2)
    assert threading.active_count() <= before
