"""Intervals of 95 %, of every kind that is printed. Their coverage is measured by `python -m harness.study intervals`.

No other module makes one: a new kind is a public function here that returns an Interval, and has an entry in the study.
Fewer than MIN_VALUES values carry no interval at all: not even the least and the greatest of five hold a median with 95 %. A mean
needs MIN_FOR_MEAN, or skewed values fall below 93 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, betaincinv, stdtrit

LEVEL = 0.95
TAIL = (1 + LEVEL) / 2
MIN_VALUES, MIN_FOR_MEAN = 6, 8
NUM_RESAMPLES, BATCH_VALUES = 2000, 2_000_000
DELETE_ONE_UP_TO, NUM_GROUPS = 64, 32
CURVATURE = 0.07
"""Standard error of an extrapolated bias, as a share of it: what a line in 1/n misses at n = 2.5 times the features."""

OF_EXPECTED = "of the expected distance at this n, conservative for few images and small distances"
"""What the interval of a distance is about, for its notes."""

Interval = tuple[float, float]
Part = tuple[float, float]
"""(variance of a mean, its degrees of freedom)."""


# ---------------------------------------------------------------------------------------------- values


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of `values`; None for fewer than MIN_FOR_MEAN. A paired difference is the mean of the differences.

    Each end is the farther one of Student's t and of the bootstrap of t, which follows skewed values where Student's does not.
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < MIN_FOR_MEAN:
        return None
    mean, error = float(sample.mean()), float(sample.std(ddof=1)) / math.sqrt(len(sample))
    if error <= 1e-15 * abs(mean):  # all alike
        return mean, mean
    student, (low, high) = float(stdtrit(len(sample) - 1, TAIL)), _resampled_t(sample)
    return mean - error * max(student, high), mean + error * max(student, -low)


def _resampled_t(sample: np.ndarray) -> Interval:
    """The outer quantiles of (mean - true mean) / error over seeded resamples of `sample`."""
    rng, n, found = np.random.default_rng(0), len(sample), []
    centred, done = sample - sample.mean(), 0
    while done < NUM_RESAMPLES:
        count = min(NUM_RESAMPLES - done, max(1, BATCH_VALUES // n))
        drawn = centred[rng.integers(0, n, (count, n))]
        means, spread = drawn.mean(1), drawn.std(1, ddof=1)
        varied = spread > 1e-12 * sample.std()  # a resample of one value again and again has no t
        found.append(means[varied] / (spread[varied] / math.sqrt(n)))
        done += count
    low, high = np.quantile(np.concatenate(found), [1 - TAIL, TAIL])
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> Interval | None:
    """Of the median of `values`, such as the ratios of paired timing rounds; None for fewer than MIN_VALUES.

    Between two pairs of order statistics, whose coverage is exact for any distribution: one has at least 95 %, the next less.

    Source: Hettmansperger and Sheather 1986, Statistics & Probability Letters 4, 75-79.
    """
    ordered, n = np.sort(np.asarray(values, np.float64)), len(values)
    if n < MIN_VALUES:
        return None
    rank = max(k for k in range(1, n // 2 + 1) if _median_coverage(k, n) >= LEVEL)
    wide, narrow = _median_coverage(rank, n), _median_coverage(rank + 1, n)
    excess = (wide - LEVEL) / (wide - narrow)
    inward = (n - rank) * excess / (rank + (n - 2 * rank) * excess)
    low = (1 - inward) * ordered[rank - 1] + inward * ordered[rank]
    high = (1 - inward) * ordered[n - rank] + inward * ordered[n - rank - 1]
    return float(low), float(high)


def _median_coverage(rank: int, n: int) -> float:
    """How often the median lies between the order statistics `rank` and n + 1 - rank."""
    return 1 - 2 * float(bdtr(rank - 1, n, 0.5))


def proportion_interval(successes: Sequence[float]) -> Interval | None:
    """Of a share, from values that are 0 or 1; None for fewer than MIN_VALUES. Conservative: it covers 95 % or more, never less.

    Source: Clopper and Pearson 1934, Biometrika 26, 404-413.
    """
    n, hits = len(successes), int(round(float(np.sum(successes))))
    if n < MIN_VALUES:
        return None
    low = float(betaincinv(hits, n - hits + 1, 1 - TAIL)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, TAIL)) if hits < n else 1.0
    return low, high


# ---------------------------------------------------------------------------------------------- distances


def leave_out(n: int) -> np.ndarray:
    """(groups, n) uint8: weights that leave out one group of the images each: every image up to DELETE_ONE_UP_TO images, beyond
    it NUM_GROUPS seeded groups of n // NUM_GROUPS. Groups are alike in size, or their bias would differ."""
    groups = n if n <= DELETE_ONE_UP_TO else NUM_GROUPS
    order, size = np.random.default_rng(0).permutation(n), n // groups
    weights = np.ones((groups, n), np.uint8)
    for group in range(groups):
        weights[group, order[group * size:(group + 1) * size]] = 0
    return weights


def jackknife_interval(value: float, left_out: Sequence[float], n: int, more_variance: float = 0.0) -> Interval | None:
    """Of the expected `value` at this n, from the values under the weights of `leave_out(n)`; None for n below MIN_VALUES.

    For statistics that repeated images would shift, such as distances between distributions: nothing is drawn with replacement.
    more_variance: of chance that leaving out images does not see.
    """
    if n < MIN_VALUES:
        return None
    left, size = np.asarray(left_out, np.float64), n // len(left_out)
    variance = float(left.var(ddof=1)) * (n - size) ** 2 / (size * n) + more_variance
    half = float(stdtrit(len(left) - 1, TAIL)) * math.sqrt(variance)
    return value - half, value + half


def extrapolated(value: float, left_out: Sequence[float], n: int) -> float:
    """`value` at infinitely many images, where its bias is a line in 1/n: through n and the n - size of `leave_out(n)`.

    Source: Chong and Forsyth 2020, arXiv:1911.07023 (the line in 1/n); Quenouille 1956 (through n and n - size).
    """
    size = n // len(left_out)
    return value + (n - size) / size * (value - float(np.mean(left_out)))


def extrapolated_interval(value: float, left_out: Sequence[float], n: int) -> Interval | None:
    """Of the value at infinitely many images, around `extrapolated`: the spread of `value`, and CURVATURE of its bias."""
    found = extrapolated(value, left_out, n)
    return jackknife_interval(found, left_out, n, (CURVATURE * (value - found)) ** 2)


# ---------------------------------------------------------------------------------------------- variances that add


def freedom(parts: Sequence[Part]) -> float:
    """Degrees of freedom of a sum of variances, by Welch and Satterthwaite."""
    lower = sum(variance**2 / df for variance, df in parts if math.isfinite(df))
    return sum(variance for variance, _ in parts) ** 2 / lower if lower > 0 else math.inf


def combined_interval(mean: float, parts: Sequence[Part]) -> Interval:
    """Of a mean whose variance is the sum of `parts`, by Student's t."""
    half = float(stdtrit(min(freedom(parts), 1e6), TAIL)) * math.sqrt(sum(variance for variance, _ in parts))
    return mean - half, mean + half


def part_behind(interval: Interval, n: int | None) -> Part:
    """The variance of a number and its degrees of freedom, from its interval over n values (None: many), taken as Student's."""
    df = math.inf if n is None or n < MIN_VALUES else n - 1
    return ((interval[1] - interval[0]) / (2 * float(stdtrit(min(df, 1e6), TAIL)))) ** 2, df
