"""The Pareto front of a search and its hypervolume: exact, in two dimensions, from rows. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.reporting.rows import Row, SweepResults

Pair = tuple[float, float]


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
    or with a disturbed timing.
    """

    metrics: tuple[str, ...]
    signs: tuple[int, ...]
    points: tuple[Point, ...]
    reference: tuple[float, ...]
    given: bool
    left_out: int

    @property
    def best(self) -> list[Point]:
        """The points that no other beats, by the first objective, best first."""
        pairs = [self.signed(point.values) for point in self.points]
        chosen = [point for point, pair in zip(self.points, pairs, strict=True) if not any(dominates(o, pair) for o in pairs)]
        return sorted(chosen, key=lambda point: self.signed(point.values))

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


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is nowhere worse and somewhere better; less is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


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
    return Front(names, signs, tuple(points), reference, given, len(done) - len(points))


def _alike(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The largest set of rows that may be compared in all of `names`; disturbed timings are in none."""
    sets: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not (row.contaminated and any(name.startswith("latency/") for name in names)):
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
