"""contrasts.py against tables, cases computed by hand, and every branch of the decision."""

import math

import numpy as np
import pytest

# Student's t, two-sided 95%: from printed tables
QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423}


@pytest.fixture
def contrasts(experiment):
    return experiment("contrasts")


@pytest.mark.parametrize("freedom", QUANTILES)
def test_t_quantiles_are_the_tables(contrasts, freedom):
    assert contrasts.t_quantile(freedom) == pytest.approx(QUANTILES[freedom], abs=6e-5)
    assert contrasts.t_inside(QUANTILES[freedom], freedom) == pytest.approx(0.95, abs=1e-5)


def test_many_degrees_of_freedom_are_the_normal_distribution(contrasts):
    for t in (0.5, 1.96, 3.0):
        assert contrasts.t_inside(t, 100_001) == pytest.approx(math.erf(t / math.sqrt(2)), abs=1e-5)


def test_paired_interval_by_hand(contrasts):
    """Mean −0.025; squares add up to 5e-4, so the standard error is √(5e-4 / 3 / 4) = 0.006455, and half of
    the interval 3.18245 · 0.006455 = 0.020543. t = −3.873 = −√15, so with 3 degrees of freedom p is
    1 − 2/π · (atan √5 + √5 / 6) = 0.03047."""
    found = contrasts.contrast([-0.02, -0.03, -0.01, -0.04])
    assert found.mean == pytest.approx(-0.025) and found.seeds == 4
    assert (found.low, found.high) == pytest.approx((-0.045543, -0.004457), abs=1e-6)
    assert found.p == pytest.approx(0.03047, abs=1e-5)


def test_contrasts_of_one_seed_or_without_spread(contrasts):
    assert contrasts.contrast([0.5]) == (0.5, None, None, None, 1)
    assert contrasts.contrast([0.5, 0.5]) == (0.5, 0.5, 0.5, 0.0, 2)
    assert contrasts.contrast([0.0, 0.0]).p == 1.0


def test_holm_by_hand(contrasts):
    """0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1, which may not fall below the one before."""
    found = contrasts.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert contrasts.holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0} and contrasts.holm({}) == {}


def test_bootstrap_resamples_clusters_within_sets(contrasts):
    rng = np.random.default_rng(1)
    sizes, differences = rng.integers(50, 500, 60).astype(float), rng.normal(0, 30, (60, 2))
    sets, clusters = ["a"] * 40 + ["b"] * 20, [str(row) for row in range(60)]
    found = contrasts.bootstrap(differences, sizes, sets, clusters)
    twice = contrasts.bootstrap(
        np.concatenate([differences] * 2), np.tile(sizes, 2), sets * 2, clusters * 2
    )  # a cluster of two equal documents says no more than one document
    assert np.allclose(found, twice) and found.shape == (2, 2)
    alone = contrasts.bootstrap(
        np.concatenate([differences] * 2), np.tile(sizes, 2), sets * 2, [str(row) for row in range(120)]
    )
    width = lambda ends: ends[1] - ends[0]
    assert width(alone) == pytest.approx(width(found) / math.sqrt(2), rel=0.1)
    constant = contrasts.bootstrap(np.outer(sizes, [0.25, -1.0]), sizes, sets, clusters)
    assert np.allclose(constant, [[0.25, -1.0]] * 2)
    # the mean over sets has a standard error of about √(se_a² + se_b²) / 2
    error = [
        np.std(differences[rows, 0] - sizes[rows] * differences[rows, 0].sum() / sizes[rows].sum())
        * math.sqrt(len(sizes[rows]))
        / sizes[rows].sum()
        for rows in (slice(0, 40), slice(40, 60))
    ]
    assert width(found)[0] == pytest.approx(2 * 1.96 * math.hypot(*error) / 2, rel=0.1)


def test_every_branch_of_the_decision(contrasts):
    of = lambda low, high: contrasts.Contrast((low + high) / 2, low, high, 0.01, 5)
    better, worse, unclear = of(-0.03, -0.01), of(0.01, 0.03), of(-0.01, 0.02)

    large = of(-0.05, -0.02)

    def decided(primary, nats=large, sets=None, m_minus_k=-0.01, within=None):
        return contrasts.decision(contrasts.Evidence(primary, nats, sets or {}, m_minus_k, within))

    assert decided(better) == "consistent with the paper"
    assert decided(better, m_minus_k=None) == "consistent with the paper (K not tested)"
    assert decided(better, within=better) == "consistent with the paper, mechanism supported"
    assert decided(better, within=unclear) == decided(better, m_minus_k=0.0) == "consistent with the paper"
    assert decided(better, m_minus_k=0.001) == "inconclusive: M is below C, but M is above K"
    assert decided(better, sets={"brown": (worse, 0.05)}) == "inconclusive: M is below C, but brown is worse"
    assert decided(better, sets={"brown": (worse, 0.051), "coqa": (better, 0.001)}) == decided(better)
    assert decided(worse, of(0.02, 0.05)) == decided(worse, of(0.001, 0.002)) == "refuted at this scale"
    assert decided(unclear, of(-0.01, 0.01)) == "no effect"
    assert decided(better, of(-0.009, -0.002), m_minus_k=1.0) == "no effect"
    assert decided(unclear, of(-0.01, 0.0101)) == decided(unclear, of(-0.0101, 0.0)) == "inconclusive"
    assert decided(contrasts.contrast([-0.1])) == "inconclusive: fewer than two seeds"
