import dataclasses

import numpy as np
import pytest
from training_runs import make_config, metrics, stop_after

from miniplm.analysis.scaling_law import Point, fit_scaling_law, run_point
from miniplm.runtime.errors import UserError
from miniplm.runtime.files import read_json
from miniplm.stages.train import train
from miniplm.training.checkpoints import checkpoint_folders

# As published: A, α, L∞, and the losses that the curve promises at 1T and at 10T tokens; the cost of
# 1T tokens at each size. The points behind the constants are not published.
COST_OF_1T = {"200M": 1.26e21, "500M": 3.14e21, "1.2B": 7.30e21}
PUBLISHED = {
    ("200M", "conventional"): (2.19e7, 0.41, 3.30, 3.35, 3.32),
    ("200M", "vanilla kd"): (9.77e7, 0.44, 3.34, 3.39, 3.35),
    ("200M", "miniplm"): (8.56e10, 0.59, 3.25, 3.28, 3.26),
    ("500M", "conventional"): (2.73e8, 0.45, 3.06, 3.12, 3.08),
    ("500M", "vanilla kd"): (3.14e8, 0.45, 3.05, 3.12, 3.07),
    ("500M", "miniplm"): (6.64e9, 0.52, 3.03, 3.06, 3.04),
    ("1.2B", "conventional"): (1.88e8, 0.43, 2.91, 2.98, 2.94),
    ("1.2B", "vanilla kd"): (1.10e10, 0.52, 2.90, 2.95, 2.91),
    ("1.2B", "miniplm"): (4.29e8, 0.45, 2.86, 2.92, 2.88),
}
TOKENS = (
    np.array([2.6, 5.2, 10.5, 21.0, 35.0, 52.4]) * 1e9
)  # of the runs that end, up to the published length


def points(amplitude, exponent, limit, flops, noise=0.0, seed=0):
    losses = amplitude * flops**-exponent + limit
    losses += noise * np.random.default_rng(seed).standard_normal(len(flops))
    return [Point(float(cost), float(loss)) for cost, loss in zip(flops, losses, strict=True)]


@pytest.mark.parametrize(("size", "method"), PUBLISHED)
def test_published_constants_come_back_and_promise_the_published_losses(size, method):
    amplitude, exponent, limit, at_1t, at_10t = PUBLISHED[size, method]
    cost = COST_OF_1T[size]
    law = fit_scaling_law(points(amplitude, exponent, limit, cost * TOKENS / 1e12), resamples=10)
    assert law.amplitude == pytest.approx(amplitude, rel=1e-5)
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    assert law.irreducible_loss == pytest.approx(limit, abs=1e-6)
    assert law.noise < 1e-8
    assert law.predict(cost) == pytest.approx(at_1t, abs=0.015)  # the constants are published rounded
    assert law.predict(10 * cost) == pytest.approx(at_10t, abs=0.015)
    assert law.flops_for(law.predict(cost)) == pytest.approx(cost, rel=1e-9)
    with pytest.raises(UserError, match="is not reached at any cost"):
        law.flops_for(law.irreducible_loss)


def test_intervals_hold_the_truth_as_often_as_they_say():
    truth = 2.19e7, 0.41, 3.30
    flops, far = 1.26e21 * np.geomspace(0.0026, 0.0524, 6), 1.26e21
    curve = truth[0] * far ** -truth[1] + truth[2]
    held, sets = np.zeros(3), 40
    for seed in range(sets):
        law = fit_scaling_law(points(*truth, flops, noise=0.003, seed=seed), resamples=100, seed=seed)
        intervals = law.exponent_interval, law.irreducible_loss_interval, law.loss_interval(far)
        held += [
            low < value < high for (low, high), value in zip(intervals, (*truth[1:], curve), strict=True)
        ]
        assert law.amplitude_interval.low < law.amplitude < law.amplitude_interval.high
    assert (held >= 0.85 * sets).all(), held
    assert (held < sets).any(), held  # nor are they so wide that they say nothing


def test_intervals_follow_noise_and_level():
    def width(noise, level=0.95):
        flops = 1.26e21 * np.geomspace(0.0026, 0.0524, 6)
        law = fit_scaling_law(points(2.19e7, 0.41, 3.30, flops, noise), level=level, resamples=300)
        low, high = law.loss_interval(1.26e21)
        assert law.noise == pytest.approx(noise, rel=1)
        return high - low

    assert width(0.003) > 5 * width(0.0003)
    assert width(0.003) > 1.2 * width(0.003, level=0.8)


GOOD = points(2.19e7, 0.41, 3.30, 1e18 * np.array([1.0, 2.0, 4.0, 8.0]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD[:3], "3 different costs"),
        ([*GOOD[:3], GOOD[0]], "3 different costs"),
        ([point._replace(run="runs/a") for point in GOOD], "runs/a gives more than one point"),
        ([p._replace(corpus=c) for p, c in zip(GOOD, "aaab", strict=True)], "different corpora"),
        ([*GOOD, Point(0, 3.0)], "above 0, got 0 FLOPs"),
        ([*GOOD, Point(1e19, float("nan"), "runs/b")], r"nan \(runs/b\)"),
        ([point._replace(loss=3 + 1e-18 * point.flops) for point in GOOD], "do not fall"),
        ([point._replace(loss=4 - np.log10(point.flops) / 100) for point in GOOD], "do not fall"),
    ],
)
def test_points_that_give_no_law(bad, message):
    with pytest.raises(UserError, match=message):
        fit_scaling_law(bad)
    assert fit_scaling_law(GOOD, resamples=2).exponent == pytest.approx(0.41)


@pytest.mark.slow
def test_the_point_of_a_run_is_its_end(tiny_corpus, tmp_path):
    config = make_config(tiny_corpus, tmp_path / "run")
    train(config)
    point = run_point(config.output, 1e18)
    assert point.loss == metrics(config.output)[-1]["eval_loss"] and point.flops == 1e18
    *earlier, last = checkpoint_folders(config.output)
    flops = read_json(f"{config.output}/manifest.json")["flops"]  # where none are given
    assert run_point(config.output).flops == run_point(last).flops == 3 * flops["forward"]
    assert earlier and run_point(last, 1e18) == point._replace(run=str(last))
    with pytest.raises(UserError, match="at step 24 of 26 is a point on the way"):
        run_point(earlier[-1], 1e18)
    with pytest.raises(UserError, match="at step 18 of 26 is a point on the way"):  # a line with an eval_loss
        run_point(config.output, 1e18, step=18)


@pytest.mark.slow
def test_runs_that_did_not_decay_give_no_point(tiny_corpus, tmp_path, monkeypatch):
    config = make_config(tiny_corpus, tmp_path / "stopped")
    stop_after(config, 13, monkeypatch)
    with pytest.raises(UserError, match="at step 13 of 26 is a point on the way"):
        run_point(config.output, 1e18)
    for name, change, message in [
        ("constant", {"min_lr_ratio": 1.0}, "min_lr_ratio is 1"),
        ("rising", {"warmup_steps": 3}, "warm-up is not over"),
    ]:
        optimizer = dataclasses.replace(config.optimizer, **{"warmup_steps": 1, **change})
        output = str(tmp_path / name)
        train(dataclasses.replace(config, output=output, steps=3, optimizer=optimizer))
        with pytest.raises(UserError, match=message):
            run_point(output, 1e18)
