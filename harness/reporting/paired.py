"""Which differences are real: paired tests over images, Holm over comparisons, overlap of intervals. Seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.reporting import seeds
from harness.reporting.rows import CONTROL, Budget, Row, traits_in
from harness.statistics.intervals import mean_interval

DRAWS, BATCH = 10_000, 100
LEVEL = 0.05
MIN_SAMPLES = 8
"""With fewer images or timing rounds nothing is claimed: their intervals are too short to trust."""


@dataclass(frozen=True)
class Comparison:
    """`row` minus `other` in `metric`, image by image.

    difference, low, high: mean difference and its 95 % interval, in the metric's unit. p: Holm-corrected; raw_p: before that. n:
    images used. refused: why the two were not compared; the numbers are then None. apart: over training seeds, whether the values
    of the two lie apart; None when neither was trained with several. Values that mingle are no claim whatever p says.
    """

    row: Row
    other: Row
    metric: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int = 0
    better: str = "none"
    refused: str = ""
    apart: bool | None = None
    raw_p: float | None = None

    @property
    def verdict(self) -> str:
        """'better', 'worse', 'noise' or 'refused', for `row` as seen from `other`."""
        if self.refused:
            return "refused"
        if self.p >= LEVEL or self.difference == 0 or self.apart is False:
            return "noise"
        return "better" if (self.difference < 0) == (self.better == "lower") else "worse"

    @property
    def too_few(self) -> bool:
        """Whether no result of so few images could have passed: all of them differ the same way, and p is as small as it gets."""
        if self.verdict != "noise" or self.apart is False or self.raw_p is None:
            return False
        return self.raw_p <= 1.5 * 2.0 ** (1 - self.n) + 2 / DRAWS


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float, float]:
    """(mean, low, high, p) of a - b over images.

    Interval: of the mean of the differences (`intervals.mean_interval`). p: two-sided sign-flip test, which holds at any n; a
    bootstrap p of a handful of images is far too small.
    """
    delta = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    rng, mean = np.random.default_rng(seed), float(delta.mean())
    flipped = [((2 * rng.integers(0, 2, (BATCH, len(delta)), np.int8) - 1) @ delta) / len(delta) for _ in range(DRAWS // BATCH)]
    low, high = mean_interval(delta) or (mean, mean)
    slack = 1e-12 * np.abs(delta).max()  # a rounding error must not decide a tie
    p = (1 + np.count_nonzero(np.abs(np.concatenate(flipped)) >= abs(mean) - slack)) / (DRAWS + 1)
    return mean, low, high, float(p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def image_metrics(rows: Sequence[Row]) -> list[str]:
    """Metrics with values per image and a direction, those that lead their group first."""
    names = dict.fromkeys(name for row in rows for name in row.result.get("per_image") or {}
                          if (row.measure(name) or {}).get("better", "none") != "none")
    return sorted(names, key=lambda name: -traits_in(rows, name).lead)


def compare(row: Row, other: Row, metric: str) -> Comparison:
    """`row` against `other`, uncorrected. Refused when the two do not share images, reference or count.

    Where one was trained with several seeds, the spread between trainings joins that over images (see `seeds`).
    """
    if reason := row.unavailable(metric) or other.unavailable(metric):
        return Comparison(row, other, metric, refused=f"unavailable: {reason}")
    if row.comparison_key(metric) != other.comparison_key(metric):
        return Comparison(row, other, metric, refused="other seeds, sampler or reference")
    a, b = (np.asarray(r.per_image(metric) if r.per_image(metric) is not None else [], np.float64) for r in (row, other))
    if a.shape != b.shape or a.size == 0:
        return Comparison(row, other, metric, refused=f"{a.size} and {b.size} values per image")
    finite = np.isfinite(a) & np.isfinite(b)
    if finite.sum() < MIN_SAMPLES:
        return Comparison(row, other, metric, refused=f"{finite.sum()} images, fewer than {MIN_SAMPLES}")
    better = (row.measure(metric) or {}).get("better", "none")
    apart = seeds.apart(row, other, metric)
    found = paired_difference(a[finite], b[finite]) if apart is None else \
        seeds.difference(row, other, metric, a[finite] - b[finite])
    return Comparison(row, other, metric, *found, int(finite.sum()), better, apart=apart)


def compare_any(row: Row, other: Row, metric: str) -> Comparison:
    """Like `compare`; a metric without values per image, such as a Frechet distance, is compared by the rows' intervals."""
    if row.per_image(metric) is not None or row.comparison_key(metric) != other.comparison_key(metric):
        return compare(row, other, metric)
    if not (_trusted(row, metric) and _trusted(other, metric)):
        return Comparison(row, other, metric, refused=f"no interval, or fewer than {MIN_SAMPLES} samples")
    measure, found = row.measure(metric), seeds.difference(row, other, metric, None)
    return Comparison(row, other, metric, *found, measure.get("n") or 0, measure["better"], apart=seeds.apart(row, other, metric))


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with Holm-corrected p values; the family is everything given."""
    tested = [c for c in comparisons if not c.refused]
    p_values = dict(zip(map(id, tested), holm([c.p for c in tested]), strict=True))
    return [c if c.refused else replace(c, p=p_values[id(c)], raw_p=c.p) for c in comparisons]


def control_of(budget: Budget, row: Row) -> Row | None:
    """The random_drop row of the budget whose executed compute is nearest to the row's."""
    controls = [other for other in budget.rows if other.method == CONTROL]
    return min(controls, key=lambda other: abs(other.cut - row.cut), default=None)


def against_control(groups: Sequence[Budget], metrics: Sequence[str]) -> list[Comparison]:
    """Every other row against random_drop at its budget, in every metric; one Holm family over all of it."""
    comparisons = []
    for budget in groups:
        for row in budget.rows:
            control = control_of(budget, row)
            if row.method != CONTROL and control is not None:
                comparisons += [compare(row, control, metric) for metric in metrics]
    return corrected(comparisons)


def clear_best(rows: Sequence[Row], metric: str) -> Row | None:
    """The best of at least two rows when its interval is outside every other's; None when it is not, or cannot be known."""
    rows = [row for row in rows if row.value(metric) is not None]
    if len(rows) < 2 or len({row.comparison_key(metric) for row in rows}) > 1:
        return None
    better = rows[0].measure(metric)["better"]
    if better == "none" or not all(_trusted(row, metric) for row in rows):
        return None
    sign = 1 if better == "lower" else -1
    best = min(rows, key=lambda row: sign * row.value(metric))
    others = [row for row in rows if row is not best]
    return best if all(_apart(best.interval(metric), other.interval(metric)) for other in others) else None


def _trusted(row: Row, metric: str) -> bool:
    """Whether the row has an interval of `metric` from enough samples to claim something."""
    n = (row.measure(metric) or {}).get("n")
    return row.interval(metric) is not None and (n is None or n >= MIN_SAMPLES)


def _apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[1] < b[0] or b[1] < a[0]


def intervals_overlap(row: Row, other: Row, metric: str) -> bool | None:
    """Whether the two intervals overlap; None when one is missing or of few samples, or the rows may not be compared."""
    a, b = row.interval(metric), other.interval(metric)
    if not (_trusted(row, metric) and _trusted(other, metric)) or row.comparison_key(metric) != other.comparison_key(metric):
        return None
    return not _apart(a, b)
