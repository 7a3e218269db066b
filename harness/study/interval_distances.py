"""The cases of the study of intervals that are distances between distributions, by the metrics' own classes.

The truth of a distance and of a gap is its expectation at that number of images to this reference, bias and all: the mean of the
estimates of all draws. That of a distance at infinity is the closed form of the distribution that was drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np

from harness.metrics.fidelity.fd import Frechet, KernelDistance
from harness.metrics.fidelity.reference import SHIPPED
from harness.statistics import intervals

NUM_REFERENCE, KERNEL_REFERENCE, NUM_FEATURES = 1000, 200, 64
CONSERVATIVE = "conservative"
"""A jackknife counts what is quadratic in the images twice: too wide for few images, and near the reference."""
Draw = Callable[[np.random.Generator, int], np.ndarray]


# ---------------------------------------------------------------------------------------------- what is drawn


def _scales(flat: bool) -> np.ndarray:
    """(d,) spread of each feature; those of real images fall about like this."""
    return np.ones(NUM_FEATURES) if flat else 1 / np.sqrt(np.arange(1, NUM_FEATURES + 1))


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 64) features with normal values."""
    return rng.normal(size=(n, NUM_FEATURES)) * _scales(False)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 64) features with lognormal values of sigma 0.75, skewness 3.3; spread 1 before scaling."""
    spread = np.sqrt((np.exp(0.75**2) - 1) * np.exp(0.75**2))
    return rng.lognormal(0, 0.75, (n, NUM_FEATURES)) / spread * _scales(False)


NEAR = "64 features, normal, as the reference"
"""A distance that is all bias: what a jackknife finds hardest."""
DRAWS: dict[str, Draw] = {"64 features, normal": normal, "64 features, lognormal": skewed, NEAR: normal}


@cache
def reference(name: str) -> np.ndarray:
    """(1000, 64): the real images of a made-up set, a little wider and moved; of NEAR just as the images are."""
    drawn = DRAWS[name](np.random.default_rng(99), NUM_REFERENCE)
    return drawn if name == NEAR else drawn * 1.2 + 0.1


@cache
def _real() -> tuple[np.ndarray, np.ndarray]:
    """EfficientNet features (671, 1280) of half of the emoji, from which images are drawn, and of the other half."""
    with np.load(SHIPPED, allow_pickle=False) as stored:
        features = stored["features"].astype(np.float64)
    order = np.random.default_rng(98).permutation(len(features))
    return features[order[::2]], features[order[1::2]]


@lru_cache(maxsize=1)
def _real_pairs() -> np.ndarray:
    """(2 * 671, 1280): what a method and dense make of the same images; the method's are damaged a little."""
    dense = _real()[0]
    rng = np.random.default_rng(97)
    method = np.clip(0.95 * dense + 0.3 * dense.std(0) * rng.normal(size=dense.shape), 0, None)
    return np.concatenate([method, dense])


# ---------------------------------------------------------------------------------------------- distances and their left-outs


Made = tuple[float, intervals.Interval]
Maker = Callable[[np.random.Generator], Made]


def _fresh(name: str, n: int) -> Maker:
    """Frechet distance of features that are drawn anew."""
    def made(rng: np.random.Generator) -> Made:
        distance = Frechet(DRAWS[name](rng, n), reference(name))
        value, left_out = distance(), [distance(row) for row in intervals.leave_out(n)]
        return value, intervals.jackknife_interval(value, left_out, n)
    return made


def _infinite(name: str, n: int) -> Maker:
    """The same, extrapolated."""
    def made(rng: np.random.Generator) -> Made:
        distance = Frechet(DRAWS[name](rng, n), reference(name))
        value, left_out = distance(), [distance(row) for row in intervals.leave_out(n)]
        return intervals.extrapolated(value, left_out, n), intervals.extrapolated_interval(value, left_out, n)
    return made


def _kernel(name: str, n: int) -> Maker:
    """Kernel distance over subsets, as it is printed, of features that are drawn anew."""
    def made(rng: np.random.Generator) -> Made:
        distance = KernelDistance(DRAWS[name](rng, n), reference(name)[:KERNEL_REFERENCE])
        left_out = [distance(row) for row in intervals.leave_out(n)]
        return distance.value, intervals.jackknife_interval(distance.value, left_out, n, distance.subset_variance)
    return made


def _picked(distance: Callable, total: int, n: int, paired: bool = False) -> Maker:
    """Of n of `total` images of a method, with dense's rows below; paired: of method minus dense."""
    def under(picks: np.ndarray, row: np.ndarray) -> float:
        weights = np.zeros(2 * total)
        weights[picks] = row
        return distance(weights) - (distance(np.roll(weights, total)) if paired else 0.0)

    def made(rng: np.random.Generator) -> Made:
        picks = rng.choice(total, n, replace=False)
        value, left_out = under(picks, np.ones(n)), [under(picks, row) for row in intervals.leave_out(n)]
        return value, intervals.jackknife_interval(value, left_out, n)
    return made


def at_infinity(name: str) -> float:
    """The distance of the distribution itself to the reference's mean and covariance."""
    scales, real = _scales(False), reference(name)
    mean = np.zeros(NUM_FEATURES) if name.endswith(", normal") else \
        scales * np.exp(0.75**2 / 2) / np.sqrt((np.exp(0.75**2) - 1) * np.exp(0.75**2))
    covariance = np.cov(real, rowvar=False)
    root = np.sqrt(np.linalg.eigvalsh(scales[:, None] * covariance * scales).clip(0)).sum()
    return float(((mean - real.mean(0)) ** 2).sum() + (scales**2).sum() + np.trace(covariance) - 2 * root)


# ---------------------------------------------------------------------------------------------- the cases


def cases(make_case: Callable) -> list:
    """Distances, gaps to dense, and distances at infinity, as cases of the study. Without a truth: the mean of the estimates."""
    found = []
    for name in DRAWS:
        found += [make_case("jackknife_interval", "Frechet distance", n, name, None, _fresh(name, n), CONSERVATIVE,
                            n == 32 and name != NEAR)
                  for n in (32, 256)]
        if name == NEAR:
            continue
        found.append(make_case("jackknife_interval", "kernel distance", 32, name, None, _kernel(name, 32), CONSERVATIVE))
        found += [make_case("extrapolated_interval", "Frechet distance at infinity", n, name, at_infinity(name),
                            _infinite(name, n), CONSERVATIVE, n == 160 and name.endswith("normal")) for n in (160, 512)]
    return found + _real_cases(make_case)


def _real_cases(make_case: Callable) -> list:
    images, real = _real()
    pairs, found = _real_pairs(), []
    for kind, build in (("Frechet", Frechet), ("kernel", KernelDistance)):
        distance = build(pairs, real)
        for printed, paired in ((f"{kind} distance", False), (f"{kind} gap to dense", True)):
            found.append(make_case("jackknife_interval", printed, 32, "1280 features, emoji", None,
                                   _picked(distance, len(images), 32, paired), CONSERVATIVE))
    return found
