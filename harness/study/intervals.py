"""Do the 95 % intervals that are printed hold the truth in 95 of 100 cases? Every kind of interval, at the n in tables.

Each case draws samples whose true value is known, makes the interval by the code that the tables use, and counts how often it
holds the truth. Distances also run on the features of real images, as stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.statistics import intervals
from harness.study import interval_distances as distances
from harness.study.intervals_report import figures as figures
from harness.study.intervals_report import report as report

log = logging.getLogger(__name__)

NUM_DRAWS = 2000
LEAST, GREATEST = 0.93, 0.97
"""The bar for the share of intervals that hold the truth."""
Made = tuple[float, intervals.Interval]
"""(estimate, its interval)."""
Maker = Callable[[np.random.Generator], Made]


@dataclass(frozen=True)
class Case:
    """kind: the function that makes it. printed: where such a number stands. values: what is drawn. truth: what the interval
    must hold; None is the mean of all estimates. make: one estimate with its interval. said: 'conservative' or 'short' where
    docs/metrics.md says so. quick: whether a test runs it too.
    """

    kind: str
    printed: str
    n: int
    values: str
    truth: float | None
    make: Maker
    said: str = ""
    quick: bool = False


@dataclass(frozen=True)
class Values:
    """A distribution: `draw(rng, n)`, its mean and median."""

    draw: Callable[[np.random.Generator, Any], np.ndarray]
    mean: float
    median: float


NORMAL = "normal"
VALUES = {NORMAL: Values(lambda rng, n: rng.normal(size=n), 0.0, 0.0),
          "lognormal, sigma 0.5": Values(lambda rng, n: rng.lognormal(0, 0.5, n), float(np.exp(0.125)), 1.0),
          "exponential": Values(lambda rng, n: rng.exponential(size=n), 1.0, float(np.log(2))),
          "lognormal, sigma 1": Values(lambda rng, n: rng.lognormal(0, 1, n), float(np.exp(0.5)), 1.0)}
"""Skewness 0, 1.75, 2 and 6.2."""


# ---------------------------------------------------------------------------------------------- the cases


def cases() -> list[Case]:
    """Every kind at every n that is printed."""
    return [*_means(), *_pairs(), *_medians(), *_shares(), *_sums(), *distances.cases(Case)]


def _means() -> list[Case]:
    places = {8: "velocity (8 images)", 12: "estimators (12 samples)", 16: "16 images", 32: "PSNR, SSIM, LPIPS, scores",
              256: "the same, 256 images"}

    def make(values: Values, n: int) -> Maker:
        def once(rng: np.random.Generator) -> Made:
            drawn = values.draw(rng, n)
            return float(drawn.mean()), intervals.mean_interval(drawn)
        return once

    return [Case("mean_interval", place, n, name, values.mean, make(values, n), quick=n == 8 and name != "lognormal, sigma 1",
                 said="short" if name == "lognormal, sigma 1" and n < 32 else "")
            for n, place in places.items() for name, values in VALUES.items()]


def _pairs() -> list[Case]:
    """Differences over the same images: what an image is worth to both is taken out."""
    def make(kind: str, n: int) -> Maker:
        def once(rng: np.random.Generator) -> Made:
            shared = rng.lognormal(0, 1, n)
            if kind == "shares":
                delta = (rng.random(n) < 0.85).astype(float) - (rng.random(n) < 0.75)
            elif kind == "skewed":
                delta = shared + rng.lognormal(0, 0.5, n) - (shared + 0.5 * rng.exponential(size=n))
            else:
                delta = (shared + rng.normal(size=n)) - (shared + 0.5 * rng.normal(size=n))
            return float(delta.mean()), intervals.mean_interval(delta)
        return once

    truths = {"normal": 0.0, "skewed": float(np.exp(0.125)) - 0.5, "shares": 0.1}
    return [Case("mean_interval", "paired difference", n, f"difference, {name}", truth, make(name, n), quick=n == 8)
            for n in (8, 32) for name, truth in truths.items()]


def _medians() -> list[Case]:
    places = {6: "bench (6 rounds)", 8: "latency (8 rounds)", 12: "latency (12 rounds)"}

    def make(values: Values, n: int) -> Maker:
        def once(rng: np.random.Generator) -> Made:
            drawn = values.draw(rng, n)
            return float(np.median(drawn)), intervals.median_interval(drawn)
        return once

    return [Case("median_interval", place, n, name, values.median, make(values, n), quick=n == 8) for n, place in places.items()
            for name, values in VALUES.items()]


def _shares() -> list[Case]:
    def make(share: float, n: int) -> Maker:
        def once(rng: np.random.Generator) -> Made:
            drawn = (rng.random(n) < share).astype(float)
            return float(drawn.mean()), intervals.proportion_interval(drawn)
        return once

    return [Case("proportion_interval", "precision", n, f"share {share}", share, make(share, n), "conservative", n == 32)
            for n in (32, 5000) for share in (0.5, 0.9, 0.97)]


def _sums() -> list[Case]:
    """Chance of several kinds: trainings and images (reports over seeds), or two large samples (the stratified study)."""
    def seeds(name: str, count: int, between: float) -> Maker:
        def once(rng: np.random.Generator) -> Made:
            images = VALUES[name].draw(rng, 32) - VALUES[name].mean  # all trainings draw the same images
            trained = between * rng.normal(size=count) + images.mean()
            within = intervals.part_behind(intervals.mean_interval(images), 32)
            mean = float(trained.mean())
            return mean, intervals.combined_interval(mean, [(float(trained.var(ddof=1)) / count, count - 1), within])
        return once

    def variances(rng: np.random.Generator) -> Made:
        one, other = rng.lognormal(0, 0.5, 10_000), 0.5 * rng.normal(size=10_000)
        squares = [(x - x.mean()) ** 2 for x in (one, other)]
        gain = float(one.var(ddof=1) - other.var(ddof=1))
        return gain, intervals.combined_interval(gain, [(float(part.var() / len(part)), np.inf) for part in squares])

    truth = float((np.exp(0.25) - 1) * np.exp(0.25)) - 0.25
    found = [Case("combined_interval", "mean over 3 training seeds", 32, f"images {name}, trainings {between:g} apart", 0.0,
                  seeds(name, 3, between), "short" if between == 0.5 else "", between == 0.5)
             for name in list(VALUES)[:2] for between in (0.05, 0.5)]
    return [*found, Case("combined_interval", "stratified study", 10_000, "difference of two variances", truth, variances)]


# ---------------------------------------------------------------------------------------------- measuring


def coverage(case: Case, draws: int, seed: int) -> dict[str, Any]:
    """How often the interval of `case` held its truth, and its width over that of the true spread."""
    rng = np.random.default_rng([seed, case.n])
    made = [case.make(rng) for _ in range(draws)]
    values, ends = np.array([value for value, _ in made]), np.array([interval for _, interval in made])
    truth = float(values.mean()) if case.truth is None else case.truth
    held = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    true_width = float(np.subtract(*np.quantile(values, [intervals.TAIL, 1 - intervals.TAIL])))
    return {"kind": case.kind, "printed": case.printed, "n": case.n, "values": case.values, "truth": truth, "draws": draws,
            "said": case.said, "covered": float(held.mean()), "covered_interval": list(intervals.proportion_interval(held)),
            "too_high": float((truth < ends[:, 0]).mean()), "too_low": float((truth > ends[:, 1]).mean()),
            "width": float(np.median(ends[:, 1] - ends[:, 0])) / true_width, "verdict": verdict(float(held.mean()))}


def verdict(covered: float) -> str:
    """'held' within the bar, else 'conservative' above it or 'short' below."""
    return "conservative" if covered > GREATEST else "short" if covered < LEAST else "held"


def measure(seeds: Sequence[int], store: Path | None = None, num_draws: int = NUM_DRAWS) -> dict[str, Any]:
    """The coverage of every case; the first seed's draws."""
    rows = []
    for case in cases():
        rows.append(coverage(case, num_draws, seeds[0]))
        log.info("%s, n = %d, %s: %.3f", case.kind, case.n, case.values, rows[-1]["covered"])
    return {"seeds": list(seeds[:1]), "draws": num_draws, "bar": [LEAST, GREATEST], "rows": rows}
