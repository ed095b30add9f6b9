"""The n-gram model: its n-grams one by one, and numpy's own solution of the ridge regression."""

import numpy as np
import pytest

from miniplm.models.ngram import NgramProxy, grams
from miniplm.training import ridge

EOS, ORDERS, BUCKETS = 3, 3, 2**20
CHUNKS = [
    np.random.default_rng(seed).integers(0, 12, length).astype(np.int32)
    for seed, length in enumerate([40, 7, 1, 25, 60, 2, 31] * 4)
]


def plain_grams(ids) -> list[tuple]:
    """The n-grams that end with each scored id."""
    padded = [None] * (ORDERS - 1) + ids.tolist()
    return [
        tuple(padded[place + ORDERS - order : place + ORDERS])
        for place in range(len(ids))
        for order in range(1, ORDERS + 1)
        if place > 0 and ids[place - 1] != EOS
    ]


def test_n_grams_are_those_that_end_with_scored_ids():
    found = grams(CHUNKS, EOS, ORDERS, BUCKETS)
    plain = [plain_grams(ids) for ids in CHUNKS]
    assert found.counts.tolist() == [len(each) // ORDERS for each in plain]
    assert found.rows.tolist() == sorted(found.rows) and len(found.rows) == found.counts.sum()
    # [orders, S] → in the order of plain; equal n-grams have equal entries, others have others.
    pairs = set(
        zip([gram for each in plain for gram in each], found.buckets.T.flatten().tolist(), strict=True)
    )
    assert len(pairs) == len({gram for gram, _ in pairs}) == len({entry for _, entry in pairs}) > 500
    assert found.buckets.min() >= 0 and found.buckets.max() < BUCKETS


def test_entries_are_used_evenly():
    ids = np.random.default_rng(0).integers(0, 50_000, 20_001).astype(np.int32)
    counts = np.bincount(grams([ids], EOS, 2, 100).buckets[1], minlength=100)
    assert len(counts) == 100 and abs(counts - 200).max() < 75  # five standard deviations are 70


def test_batches_change_nothing():
    whole = grams(CHUNKS, EOS, ORDERS, BUCKETS)
    parts = [grams(CHUNKS[start : start + 5], EOS, ORDERS, BUCKETS) for start in range(0, len(CHUNKS), 5)]
    np.testing.assert_array_equal(whole.buckets, np.concatenate([part.buckets for part in parts], 1))


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_conjugate_gradients_end_at_the_ridge_regression(strength, monkeypatch):
    monkeypatch.setattr(ridge, "TOLERANCE", 1e-10)
    chunks = [ids for ids in CHUNKS if plain_grams(ids)]
    scores = np.random.default_rng(9).normal(size=len(chunks)) + 0.5
    names: dict[tuple, int] = {}
    counts = np.zeros((len(chunks), 3_000))
    for row, ids in enumerate(chunks):
        for gram in plain_grams(ids):
            counts[row, names.setdefault(gram, len(names))] += 1
    positions = counts.sum(1) / ORDERS
    mean = (scores * positions).sum() / positions.sum()
    shares = counts / positions[:, None]
    left = counts.T @ shares + strength * np.eye(counts.shape[1])
    expected = mean + shares @ np.linalg.solve(left, counts.T @ (scores - mean))

    def batches():
        for start in range(0, len(chunks), 6):
            part = slice(start, start + 6)
            yield grams(chunks[part], EOS, ORDERS, BUCKETS), scores[part]

    state = ridge.begin(batches, BUCKETS)
    while not state.done:
        state = ridge.improve(state, batches, strength)
    assert state.passes <= 2 * len(chunks)  # their rank, and rounding
    proxy = NgramProxy(state.weights, state.mean, ORDERS, EOS)
    found, predicted = proxy.predict(chunks)
    assert found.tolist() == positions.tolist()
    np.testing.assert_allclose(predicted, expected, atol=1e-7)
    again = ridge.load(ridge.tensors(state))
    assert again.passes == state.passes and again.weights is state.weights


def test_nothing_to_predict_is_nan():
    counts, scores = NgramProxy(np.ones(8, np.float32), 1.0, 2, EOS).predict(
        [np.array([5]), np.array([EOS, 5])]
    )
    assert counts.tolist() == [0, 0] and np.isnan(scores).all()
