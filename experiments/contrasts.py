"""The plan's statistics: paired t-intervals, Holm's correction, a clustered bootstrap, and the decision."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.05
NO_EFFECT = 0.01  # nats per token
RESAMPLES = 10_000


def t_inside(t: float, freedom: int) -> float:
    """The probability that Student's t lies within ±t: Abramowitz and Stegun 26.7.3 and 26.7.4.

    Args:
        freedom: degrees of freedom, 1, 2, …
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for number in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * number / (number + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t within ± which lies 1 − level of the distribution."""
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < 1 - level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < 1 - level else (low, middle)
    return high


class Contrast(NamedTuple):
    """Differences of paired seeds: their mean, its 95% t-interval and two-sided p; None of a single one."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int


def contrast(differences: Sequence[float]) -> Contrast:
    """The contrast of these differences, one of each seed that both arms have; at least one."""
    count, mean = len(differences), math.fsum(differences) / len(differences)
    if count == 1:
        return Contrast(mean, None, None, None, count)
    squares = math.fsum((each - mean) ** 2 for each in differences)
    error = math.sqrt(squares / (count - 1) / count)
    half = t_quantile(count - 1) * error
    if error:
        p = 1 - t_inside(mean / error, count - 1)
    else:
        p = 0.0 if mean else 1.0
    return Contrast(mean, mean - half, mean + half, p, count)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted by Holm's step-down rule: significant at a level where they are at most that."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min((len(p_values) - rank) * p_values[name], 1.0))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def bootstrap(
    differences: np.ndarray, sizes: np.ndarray, sets: Sequence[str], clusters: Sequence[str], seed: int = 0
) -> np.ndarray:
    """95% intervals of mean over the sets of (sum of differences / sum of sizes) over resampled clusters.

    Args:
        differences: float64 [documents, contrasts], for example bits.
        sizes: [documents], for example bytes.
        sets, clusters: of each document, by name; clusters are resampled with replacement within their set.
    Returns:
        float64 [2, contrasts], percentiles 2.5 and 97.5.
    """
    rng, means = np.random.default_rng(seed), np.zeros((RESAMPLES, differences.shape[1]))
    names = sorted(set(sets))
    for name in names:
        rows = np.array([row for row, each in enumerate(sets) if each == name])
        _, code = np.unique([clusters[row] for row in rows], return_inverse=True)
        count = int(code.max()) + 1
        summed = np.zeros((count, differences.shape[1] + 1))
        np.add.at(summed, code, np.column_stack([differences[rows], sizes[rows]]))
        for start in range(0, RESAMPLES, 500):
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=500) @ summed
            means[start : start + 500] += drawn[:, :-1] / drawn[:, -1:] / len(names)
    return np.percentile(means, [2.5, 97.5], axis=0)


class Evidence(NamedTuple):
    """What the decision is made of, for one student."""

    primary: Contrast  # M − C, bits per byte
    nats: Contrast  # M − C, nats per token
    sets: Mapping[str, tuple[Contrast, float]]  # M − C on each clean set, and its p after Holm
    m_minus_k: float | None  # mean of the primary endpoint; None where K was not run
    within: Contrast | None  # Mp − C, bits per byte; None where Mp was not run


def decision(evidence: Evidence) -> str:
    """The plan's decision: the first of its four that holds."""
    primary, nats = evidence.primary, evidence.nats
    if primary.low is None or primary.high is None or nats.low is None or nats.high is None:
        return "inconclusive: fewer than two seeds"
    worse = [name for name, (each, p) in evidence.sets.items() if each.mean > 0 and p <= LEVEL]
    beside_k = evidence.m_minus_k is None or evidence.m_minus_k <= 0
    if primary.high < 0 and not worse and beside_k:
        said = "consistent with the paper"
        if evidence.m_minus_k is None:
            said += " (K not tested)"
        if evidence.within and evidence.within.high is not None and evidence.within.high < 0:
            said += ", mechanism supported"
        return said
    if primary.low > 0:
        return "refuted at this scale"
    if -NO_EFFECT <= nats.low and nats.high <= NO_EFFECT:
        return "no effect"
    why = [f"{name} is worse" for name in worse] + ["M is above K"] * (not beside_k)
    return "inconclusive" + (f": M is below C, but {' and '.join(why)}" if primary.high < 0 else "")
