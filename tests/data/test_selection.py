"""Difference Sampling: the rule against a plain restatement."""

import numpy as np
import pytest

from miniplm.config import SelectConfig
from miniplm.data.selection import best_first, choose

NAN, INF = float("nan"), float("inf")


def settings(**rule) -> SelectConfig:
    return SelectConfig(data="corpus", scores=["scores"], output="out", **rule)


def plainly(config, scores, lengths, domains) -> set[int]:
    """The rule once more, row by row."""
    kept = set()
    for domain in set(domains) if config.per_domain else [None]:
        rows = [row for row in range(len(scores)) if domain in (None, domains[row])]
        ranked = sorted((row for row in rows if abs(scores[row]) < INF), key=lambda row: (-scores[row], row))
        if config.threshold is not None:
            kept |= {row for row in ranked if scores[row] >= config.threshold}
        elif config.ratio is not None:
            kept |= set(ranked[: int(config.ratio * len(rows))])
        else:
            budget = config.token_budget * sum(lengths[row] for row in rows) // sum(lengths)
            for row in ranked:
                budget -= lengths[row]
                if budget < 0:
                    break
                kept.add(row)
    return kept


RULES = [
    dict(ratio=0.5),
    dict(ratio=1.0),
    dict(ratio=0.29),
    dict(ratio=0.5, per_domain=True),
    dict(threshold=0.0),
    dict(threshold=0.25),
    dict(token_budget=1),
    dict(token_budget=200),
    dict(token_budget=10**9),
    dict(token_budget=200, per_domain=True),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 100, 257])
def test_rule(rows, rule):
    rng = np.random.default_rng(rows)
    config = settings(**rule)
    for values in (
        [0.25, -0.5, 0.0, -0.0, NAN, INF, -INF],
        rng.normal(size=1000),
        [0.0],
        [NAN, 1.0],
    ):  # few values: many ties
        scores = rng.choice(np.float32(values), rows)
        lengths, domains = rng.integers(1, 30, rows), rng.integers(0, 4, rows).astype(np.int32)
        if rows > 50:
            scores[domains == 3] = NAN
        assert set(np.flatnonzero(choose(config, scores, lengths, domains))) == plainly(
            config, scores.tolist(), lengths.tolist(), domains.tolist()
        )


def test_best_first_is_the_stable_descending_order():
    rng = np.random.default_rng(0)
    bits = (
        rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    )  # every kind of float: tiny, huge, NaN, infinite
    scores = np.concatenate(
        [bits, rng.choice(np.float32([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, NAN, INF, -INF]), 5_000)]
    )
    rng.shuffle(scores)
    rows = np.flatnonzero(np.isfinite(scores))
    assert len(rows) > 20_000
    np.testing.assert_array_equal(
        best_first(scores), rows[np.argsort(-scores[rows].astype(np.float64), kind="stable")]
    )


def test_random_control_takes_as_many_rows_at_random():
    scores = np.float32(np.linspace(1, -1, 1000))
    scores[:100] = NAN
    ones, domains = np.ones(1000, np.int64), np.repeat(np.int32([0, 1]), 500)
    best = choose(settings(ratio=0.5), scores, ones, domains)
    first, again, second = (
        choose(settings(ratio=0.5, random_seed=seed), scores, ones, domains) for seed in (1, 1, 2)
    )
    assert best.sum() == first.sum() == second.sum() == 500
    np.testing.assert_array_equal(first, again)
    assert (first != second).sum() > 300
    assert not first[:100].any() and best[100:600].all()
    assert 150 < first[550:].sum() < 350  # 250 expected, where the rule by score keeps 50
    per_domain = choose(settings(ratio=0.5, random_seed=1, per_domain=True), scores, ones, domains)
    assert per_domain[:500].sum() == per_domain[500:].sum() == 250
