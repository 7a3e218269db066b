"""Seeded percentile bootstrap, 95 %."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 2000

Interval = tuple[float, float]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of `values`; None for fewer than two. A paired difference is the mean of the differences."""
    return _bootstrap(values, np.mean)


def median_interval(values: Sequence[float]) -> Interval | None:
    """Of the median of `values`, such as the ratios of paired timing rounds; None for fewer than two."""
    return _bootstrap(values, np.median)


def paired_interval(values: Sequence[float], others: Sequence[float]) -> Interval | None:
    """Of the mean of values[i] - others[i]."""
    if len(values) != len(others):
        raise ValueError(f"{len(values)} values but {len(others)} others: not pairs")
    return mean_interval(np.asarray(values, np.float64) - np.asarray(others, np.float64))


def _bootstrap(values: Sequence[float], statistic: Callable) -> Interval | None:
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    rng = np.random.default_rng(0)
    return _percentiles([statistic(rng.choice(sample, len(sample))) for _ in range(NUM_RESAMPLES)])


def spread_interval(value: float, resampled: Sequence[float]) -> Interval:
    """`value` with the spread of `resampled`, which are moved so that their mean is `value`.

    For statistics that resampling with replacement shifts (a Frechet distance grows when images repeat): their percentile
    interval would not even hold the value itself. The spread is still that of drawing other images.
    """
    moved = np.asarray(resampled, np.float64)
    moved = moved - moved.mean() + value
    return _percentiles(moved)


def _percentiles(values: Sequence[float]) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
