"""Difference Sampling: the rule against a plain restatement."""

import itertools
import math
import statistics

import numpy as np
import pytest

from miniplm.config import SelectConfig
from miniplm.data.selection import best_first, choose, compared, written_order
from miniplm.runtime.errors import UserError

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


@pytest.mark.parametrize(
    "rule", [dict(ratio=0.31), dict(token_budget=700), dict(ratio=0.31, random_seed=4)], ids=str
)
def test_shares_of_domains(rule):
    rng = np.random.default_rng(1)
    scores = rng.choice(np.float32([0.5, 0.25, -1.0, 2.0, NAN]), 300)
    lengths, domains = rng.integers(1, 30, 300), rng.integers(0, 3, 300).astype(np.int32)
    names, shares = ["a", "b=c,d", "e"], {"e": 0.25, "b=c,d": 0.75}
    config = settings(domain_shares=("b=c,d=0.75", "e=0.25"), **rule)
    assert config.shares == shares
    keep = choose(config, scores, lengths, domains, names)
    for number, name in enumerate(names):
        plain = settings(**{key: value for key, value in rule.items() if key == "random_seed"}, ratio=1.0)
        there = np.flatnonzero(domains == number)
        share, kept = shares.get(name, 0), np.flatnonzero(keep & (domains == number))
        if "random_seed" not in rule:
            ranked = sorted(
                (row for row in there if np.isfinite(scores[row])), key=lambda row: (-scores[row], row)
            )
            if "ratio" in rule:
                expected = ranked[: int(share * int(0.31 * 300))]
            else:
                sums = itertools.accumulate(int(lengths[row]) for row in ranked)
                expected = [row for row, total in zip(ranked, sums, strict=True) if total <= int(share * 700)]
            assert sorted(expected) == kept.tolist()
        else:
            assert (
                len(kept) == int(share * int(0.31 * 300))
                and choose(plain, scores, lengths, domains)[kept].all()
            )


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (
            ("a=0.9", "b=0.1"),
            "domain 'a' has 2 chunks that can be kept, its share of 0.9 asks for 3: lower it",
        ),
        (("a=0.5,z=0.5",), "domain_shares names the domain 'z', the corpus has a, b"),
    ],
)
def test_shares_that_cannot_be(shares, message):
    config = settings(ratio=0.5, domain_shares=shares)
    scores, domains = np.float32([1, 2, NAN, 4, 5, 6, 7, 8]), np.int32([0, 0, 0, 1, 1, 1, 1, 1])
    with pytest.raises(UserError, match=message):
        choose(config, scores, np.ones(8, int), domains, ["a", "b"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict(domain_shares=("a=0.5",)), "must add up to 1, they add up to 0.5"),
        (dict(domain_shares=("a=0.5,a=0.5",)), "gives 'a' twice"),
        (dict(domain_shares=("a",)), "takes name=share, 0 to 1, got 'a'"),
        (dict(domain_shares=("a=nan",)), "takes name=share, 0 to 1, got 'a=nan'"),
        (dict(domain_shares=("a=1",), per_domain=True), "without per_domain"),
        (dict(domain_shares=("a=1",), threshold=0.0), "needs ratio or token_budget"),
        (dict(temperature=1.0, threshold=0.0), "needs ratio or token_budget"),
        (dict(temperature=1.0, random_seed=0), "needs ratio or token_budget, by score"),
        (dict(temperature=-1.0), "must not be negative"),
        (dict(temperature=math.inf), "must be finite"),
        (dict(temperature=1e7), "at most 1,000,000"),
        (dict(min_tokens=0), "at least 1"),
        (dict(max_repeats=0), "at least 1"),
        (dict(aggregate="sum", score="ratio"), "score ratio is one of means: leave it or aggregate sum out"),
        (dict(aggregate="quantile", quantile=1.5), "between 0 and 1, got 1.5"),
        (dict(aggregate="quantile", quantile=math.nan), "between 0 and 1, got nan"),
        (dict(quantile=0.9), "no say without aggregate quantile"),
    ],
    ids=str,
)
def test_rules_that_are_none(rule, message):
    with pytest.raises(ValueError, match=message):
        settings(**rule)


def inclusion(weights, count) -> list[float]:
    """How probable it is that each of these is among `count` draws without replacement, by their weights."""
    result = [0.0] * len(weights)
    for drawn in itertools.permutations(range(len(weights)), count):
        probability, rest = 1.0, sum(weights)
        for index in drawn:
            probability *= weights[index] / rest
            rest -= weights[index]
        for index in drawn:
            result[index] += probability
    return result


@pytest.mark.parametrize(("temperature", "count"), [(0.5, 1), (0.5, 2), (2.0, 2), (1e6, 3)])
def test_a_temperature_draws_by_the_exponential_of_the_score(temperature, count):
    scores, draws = np.float32([0.3, -0.7, 1.1, NAN, 0.0, -0.1]), 3_000
    rule = dict(ratio=(count + 0.5) / len(scores), temperature=temperature)
    lengths, domains = np.ones(len(scores), int), np.zeros(len(scores), np.int32)
    kept = sum(
        choose(settings(seed=seed, **rule), scores, lengths, domains).astype(int) for seed in range(draws)
    )
    finite = np.isfinite(scores)
    expected = inclusion([math.exp(score / temperature) for score in scores[finite].tolist()], count)
    assert kept.sum() == count * draws and kept[~finite].sum() == 0
    for found, probability in zip(kept[finite], expected, strict=True):
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(found / draws - probability) < 5 * spread  # one in a million by chance


def test_no_temperature_is_the_hard_cut():
    rng = np.random.default_rng(6)
    scores = rng.normal(size=500).astype(np.float32)
    lengths, domains = rng.integers(1, 30, 500), rng.integers(0, 4, 500).astype(np.int32)
    for rule in (dict(ratio=0.3), dict(token_budget=900, per_domain=True)):
        hard = choose(settings(**rule), scores, lengths, domains)
        assert (choose(settings(temperature=0.0, **rule), scores, lengths, domains) == hard).all()
        assert (choose(settings(temperature=1e-6, **rule), scores, lengths, domains) == hard).mean() > 0.99
        one = choose(settings(temperature=1.0, seed=3, **rule), scores, lengths, domains)
        assert (one == choose(settings(temperature=1.0, seed=3, **rule), scores, lengths, domains)).all()
        assert (one != choose(settings(temperature=1.0, seed=4, **rule), scores, lengths, domains)).any()


def test_what_is_compared():
    rng = np.random.default_rng(2)
    teacher, reference = (-rng.exponential(3, 60).astype(np.float32) - 1 for _ in range(2))
    teacher[7], reference[9] = NAN, -INF
    columns = {"teacher_log_prob": teacher, "reference_log_prob": reference, "score": teacher - reference}
    lengths, domains = rng.integers(1, 9, 60), rng.integers(0, 3, 60).astype(np.int32)
    domains[:2] = [3, 4]  # alone in their domains

    def value(**rule):
        return compared(settings(**rule), columns, lengths, domains)

    assert (
        value() is columns["score"]
        and value(score="teacher") is teacher
        and value(score="reference") is reference
    )
    both = np.isfinite(teacher) & np.isfinite(reference)
    assert np.allclose(value(score="ratio")[both], (reference / teacher)[both], rtol=1e-6)
    found = value(score="normalised")
    assert np.isnan(found[~both]).all()
    for row in np.flatnonzero(both):
        parts = []
        for column in (teacher, reference):
            others = column[both & (domains == domains[row])].tolist()
            parts.append((column[row] - statistics.fmean(others)) / (statistics.pstdev(others) or 1))
        assert abs(found[row] - (parts[0] - parts[1])) < 1e-5
    short = value(min_tokens=5)
    assert (
        np.isnan(short[lengths < 5]).all()
        and (short[lengths >= 5] == columns["score"][lengths >= 5])[both[lengths >= 5]].all()
    )


def test_written_order():
    scores, keep = np.float32([0.5, 2.0, NAN, 0.5, 9.0]), np.array([True, True, False, True, False])
    assert written_order(settings(order="score"), keep, scores).tolist() == [1, 0, 3]
    orders = {tuple(written_order(settings(order="random", seed=seed), keep, scores)) for seed in range(40)}
    assert orders == set(itertools.permutations([0, 1, 3]))
