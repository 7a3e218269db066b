"""How sure a distance between distributions is, and how sure its gap to the dense model's.

Three kinds of chance are told apart. The interval is a jackknife over the generated images, of the expected distance at this
number of images. The spread over subsets (each half of the images, drawn once without replacement) says how the number moves with
the images at hand. The gap to dense is paired: image i of the method and of dense share noise and prompt, so both are left out
together, and a permutation test swaps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.api import Measure, require
from harness.metrics.fidelity.feature_sets import FeatureSets
from harness.statistics.intervals import OF_EXPECTED, jackknife_interval, leave_out

SEED = 0
Under = Callable[[np.ndarray], list[float]]
"""Weights (draws, rows) over the rows of features -> the distance under each."""


@dataclass(frozen=True, kw_only=True)
class DistanceOptions:
    """num_subsets: halves of the images. num_permutations: swaps with dense, 0 for no test.

    Each costs an evaluation of the distance per draw: with more than 2000 images about a second on one core.
    """

    num_subsets: int = 10
    num_permutations: int = 499

    def check(self, name: str) -> None:
        """ConfigError when an option of metric `name` is out of range."""
        for option, least in (("num_subsets", 2), ("num_permutations", 0)):
            value = getattr(self, option)
            require(value >= least, f"{name}.{option} must be at least {least}, got {value}")


def images_and_dense(features: FeatureSets) -> np.ndarray:
    """(n, d) features of the trial's images, with the dense model's below them where there are any: the rows of weights."""
    return features.images if features.dense is None else np.concatenate([features.images, features.dense])


@dataclass(frozen=True)
class Distance:
    """A measure with what it was made of: the value of all images at once, and those under `leave_out`."""

    measure: Measure
    whole: float
    left_out: np.ndarray


def distance_measure(name: str, under: Under, features: FeatureSets, options: DistanceOptions,
                     value: float | None = None, more_variance: float = 0.0) -> Distance:
    """The distance with its interval and notes `subsets` and, except for dense itself, `to_dense`; lower is better.

    under: over the rows of `images_and_dense`. value: where the number itself is not the distance of all images at once.
    more_variance: of that number, beside the chance of the images.
    """
    n = len(features.images)
    rng = np.random.default_rng(SEED)
    left_out = leave_out(n)
    subsets = np.stack([_half(rng, n) for _ in range(options.num_subsets)])
    whole, nothing = np.ones((1, n), np.uint8), np.zeros_like
    own, other = [whole, left_out, subsets], [nothing(whole), nothing(left_out), nothing(subsets)]
    if features.dense is None:
        values = np.array(under(np.concatenate(own)))
    else:
        swaps = rng.integers(0, 2, (options.num_permutations, n), np.uint8)
        left, right = np.concatenate([*own, 1 - swaps]), np.concatenate([*other, swaps])
        values = np.array(under(np.concatenate([left, right], axis=1)))
    at, end = 1 + len(left_out), 1 + len(left_out) + options.num_subsets
    notes: dict[str, Any] = {"reference_id": features.reference_id, "num_reference": len(features.reference),
                             "interval": OF_EXPECTED,
                             "subsets": {"count": options.num_subsets, "size": n // 2, "mean": float(values[at:end].mean()),
                                         "sd": float(values[at:end].std(ddof=1))}}
    if n <= features.images.shape[1]:
        notes["bias"] = f"n <= {features.images.shape[1]} features: compare at equal n only"
    if features.dense is not None:
        kept = np.r_[0:at, end:len(values)]  # no gap is taken over subsets
        swapped = np.array(under(np.concatenate([right[kept], left[kept]], axis=1)))
        notes["to_dense"] = _gap(values[kept] - swapped, at, n)
    shown = float(values[0]) if value is None else value
    interval = jackknife_interval(shown, values[1:at], n, more_variance)
    return Distance(Measure(name, shown, "lower", interval, n, notes=notes), float(values[0]), values[1:at])


def _half(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n,) weights that take n // 2 of the images once."""
    weights = np.zeros(n, np.uint8)
    weights[rng.choice(n, n // 2, replace=False)] = 1
    return weights


def _gap(gaps: np.ndarray, left_out: int, n: int) -> Mapping[str, Any]:
    """From the gap itself, then those without some pairs (up to `left_out`), then those of swapped pairs."""
    gap, chance = float(gaps[0]), np.abs(gaps[left_out:])
    slack = 1e-9 * max(1e-300, float(np.abs(gaps).max()))  # a rounding error must not decide a tie
    p = (1 + np.count_nonzero(chance >= abs(gap) - slack)) / (len(chance) + 1) if len(chance) else None
    interval = jackknife_interval(gap, gaps[1:left_out], n)
    return {"difference": gap, "interval": interval and list(interval), "p": p, "permutations": len(chance)}
