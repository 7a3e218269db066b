"""Pareto fronts, of a search and of any two measures, how sure a row's place on one is, and the hypervolume. From rows; no torch.

Rows whose costs lie within the tolerance of budgets spent one budget, and the better of them stands for it. How likely a row is
on the front is the share of draws in which it is: of images together where every row has values per image, else of each row's
own interval. Equal rows are drawn as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.reporting.rows import BUDGET_TOLERANCE, CUT, GFLOPS, Row, SweepResults
from harness.statistics.intervals import part_behind

Pair = tuple[float, float]
DRAWS = 1000
PERHAPS = 0.05
"""A row with at least this probability of being on the front is named beside those that are on it."""


@dataclass(frozen=True)
class Point:
    """A finished row with its objectives as measured. number: of the trial in the search; 0 for a row of `methods`."""

    row: Row
    number: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Front:
    """metrics, signs: of the objectives; times its sign, less is better. points: comparable finished rows, as tried.

    reference: worst values that count; given: whether the sweep file says them. left_out: finished rows measured otherwise
    or with a disturbed timing. tolerances: differences of the objectives that are none.
    """

    metrics: tuple[str, ...]
    signs: tuple[int, ...]
    points: tuple[Point, ...]
    reference: tuple[float, ...]
    given: bool
    left_out: int
    tolerances: tuple[float, ...]

    @property
    def best(self) -> list[Point]:
        """The points that no other beats, by the first objective, best first."""
        signed = np.array([self.signed(point.values) for point in self.points])
        return sorted((self.points[i] for i in unbeaten(signed, self.tolerances)), key=lambda point: self.signed(point.values))

    @property
    def probabilities(self) -> list[float]:
        """Of being on the front, of each of `points`."""
        return probabilities([point.row for point in self.points], self.metrics, self.signs, self.tolerances)

    def signed(self, values: Sequence[float]) -> tuple[float, ...]:
        """Values of which less is better."""
        return tuple(sign * value for sign, value in zip(self.signs, values, strict=True))

    def volume(self, points: Sequence[Point] | None = None) -> float:
        """Hypervolume of `points`, all by default, in the product of the two units. Only for two objectives."""
        chosen = self.points if points is None else points
        return hypervolume([self.signed(point.values) for point in chosen], self.signed(self.reference))

    def history(self) -> list[tuple[int, float]]:
        """(number of trials of the search so far, hypervolume); at 0 that of the rows of `methods` alone."""
        numbers = [0, *sorted({point.number for point in self.points} - {0})]
        return [(number, self.volume([point for point in self.points if point.number <= number])) for number in numbers]


def unbeaten(signed: np.ndarray, tolerances: Sequence[float]) -> list[int]:
    """Indices of the rows of `signed` (n, objectives), less being better, that are on the front.

    A row is beaten by one on the front that is nowhere worse, and somewhere better; differences up to the tolerance are none,
    and decide only between rows that are equal otherwise. Only rows on the front beat: what is left out of it cannot put a
    cheaper row out too.
    """
    slack, chosen = np.asarray(tolerances, float), []
    exact = [i for i, value in enumerate(slack) if value == 0] + [i for i, value in enumerate(slack) if value]
    for index in np.lexsort(signed.T[list(reversed(exact))]):  # who beats comes before whom it beats
        gaps = signed[chosen] - signed[index]  # negative: the chosen one is better
        outside = np.where(np.abs(gaps) <= slack, 0.0, gaps)
        beaten = (outside <= 0).all(1) & ((outside < 0).any(1) | ((gaps <= 0).all(1) & (gaps < 0).any(1)))
        if not beaten.any():
            chosen.append(int(index))
    return sorted(chosen)


def probabilities(rows: Sequence[Row], metrics: Sequence[str], signs: Sequence[int], tolerances: Sequence[float]) -> list[float]:
    """Share of seeded draws in which each row is on the front of `metrics`; 1 or 0 where nothing has an interval."""
    drawn = np.stack([sign * _draws(rows, name) for name, sign in zip(metrics, signs, strict=True)], axis=-1)
    counts = np.zeros(len(rows))
    for values in drawn:
        counts[unbeaten(values, tolerances)] += 1
    return (counts / len(drawn)).tolist()


def _draws(rows: Sequence[Row], name: str) -> np.ndarray:
    """(draws, rows): values of `name` as other images, or other rounds of timing, might have given them."""
    values = np.array([row.value(name) for row in rows], float)
    images = [row.per_image(name) for row in rows]
    if all(one is not None for one in images) and len({len(one) for one in images}) == 1 and np.isfinite(images).all():
        table, rng = np.array(images, float), np.random.default_rng(0)
        picks = rng.integers(0, table.shape[1], (DRAWS, table.shape[1]))
        widen = np.sqrt(table.shape[1] / max(1, table.shape[1] - 1))
        return np.stack([value + widen * (one - one.mean())[picks].mean(1) for value, one in zip(values, table, strict=True)], 1)
    drawn = np.tile(values, (DRAWS, 1))
    alike: dict[tuple, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for column, row in enumerate(rows):
        ends = row.interval(name)
        if ends is not None:
            error = np.sqrt(part_behind(ends, row.measure(name).get("n"))[0])
            drawn[:, column] += error * alike.setdefault((row.value(name), ends), rng.normal(size=DRAWS))
    return drawn


def tolerances_of(sweep: SweepResults, metrics: Sequence[str]) -> tuple[float, ...]:
    """Differences that are none: of executed FLOPs the tolerance of a budget, of everything else 0."""
    dense = sweep.dense
    counted = [row.value(GFLOPS) for row in sweep.rows if row.value(GFLOPS) is not None]
    whole = dense.value(GFLOPS) if dense is not None and dense.value(GFLOPS) is not None else max(counted, default=0.0)
    known = {CUT: BUDGET_TOLERANCE, GFLOPS: BUDGET_TOLERANCE * whole}
    return tuple(known.get(name, 0.0) for name in metrics)


def front_rows(sweep: SweepResults, rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Those of `rows`, which may be compared and have every one of `metrics`, that are on the front, by the last metric."""
    signs = [1 if rows[0].measure(name)["better"] == "lower" else -1 for name in metrics] if rows else []
    signed = np.array([[sign * row.value(name) for name, sign in zip(metrics, signs, strict=True)] for row in rows])
    chosen = unbeaten(signed, tolerances_of(sweep, metrics)) if rows else []
    return sorted((rows[i] for i in chosen), key=lambda row: row.value(metrics[-1]))


def hypervolume(points: Sequence[Pair], reference: Pair) -> float:
    """Area that the points dominate up to `reference`, less being better: exact, by one sweep in the first coordinate."""
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


def front_of(sweep: SweepResults) -> Front | None:
    """The front of a sweep with a search that has objectives; None without, and where no row is finished."""
    options = sweep.search
    objectives = options.get("objectives") or []
    numbers = options.get("numbers") or {}
    names = tuple(objective["metric"] for objective in objectives)
    done = [row for row in sweep.rows if row.status == "done" and all(row.value(name) is not None for name in names)]
    if not objectives or not done:
        return None
    alike = _alike(done, names)
    points = sorted((Point(row, numbers.get(row.trial_id) or 0, tuple(row.value(name) for name in names)) for row in alike),
                    key=lambda point: point.number)
    signs = tuple(1 if objective["direction"] == "minimize" else -1 for objective in objectives)
    if not points:
        return None
    reference = tuple(objective["reference"] if objective["reference"] is not None else _worst(points, index, sign)
                      for index, (objective, sign) in enumerate(zip(objectives, signs, strict=True)))
    given = all(objective["reference"] is not None for objective in objectives)
    return Front(names, signs, tuple(points), reference, given, len(done) - len(points), tolerances_of(sweep, names))


def _alike(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The largest set of rows that may be compared in all of `names`; disturbed timings are in none."""
    sets: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not (row.contaminated and any(row.traits(name).group == "latency" for name in names)):
            sets.setdefault(tuple(row.comparison_key(name) for name in names), []).append(row)
    return max(sets.values(), key=len, default=[])


def _worst(points: Sequence[Point], index: int, sign: int) -> float:
    return sign * max(sign * point.values[index] for point in points)


def summary(front: Front) -> dict[str, list[tuple[int, float]]]:
    """{name: [(trials so far, value)]}: what MLflow shows of the search on the sweep's run."""
    last = max(point.number for point in front.points)
    if len(front.metrics) == 1:
        return {"search/best": [(last, front.best[0].values[0])]}
    return {"search/front_size": [(last, float(len(front.best)))], "search/hypervolume": front.history()}
