"""Distance of the generated images to the real ones: Frechet and kernel distance of EfficientNet-Lite0 features.

The names carry extractor and sample count, and the numbers compare only at equal n, extractor and reference: they are no FID or
KID, which mean Inception features. Below 1280 images the Frechet distance is dominated by its bias, which all methods share.

Source: Heusel et al. 2017, arXiv:1706.08500 (Frechet); Binkowski et al. 2018, arXiv:1801.01401 (kernel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch_fidelity.metric_kid import kernel_poly, mmd2

from harness.api import METRICS, Measure, Metric, Subject, require
from harness.metrics.effnet import NUM_FEATURES, features_of
from harness.metrics.reference import load_reference
from harness.stats import spread_interval

KERNEL = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
KD_SUBSETS, KD_SUBSET_SIZE, KD_SEED = 100, 1000, 2020
"""torch-fidelity's defaults; subsets shrink to the number of images where that is smaller."""


@METRICS.register("fd")
class FrechetAndKernelDistance(Metric):
    """fd_effnet_<n> and kd_effnet_<n> against the real images of the trial's data split."""

    measures = ("fidelity/fd_effnet_{n}", "fidelity/kd_effnet_{n}")
    needs_reference = True
    least_images = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """num_resamples: bootstrap draws over the generated images, for both intervals; the reference stays as it is."""

        num_resamples: int = 100

        def __post_init__(self) -> None:
            require(self.num_resamples >= 20, f"fd.num_resamples must be at least 20, got {self.num_resamples}")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Both distances with their intervals; lower is better."""
        n, options = len(subject.images), subject.trial["data"]
        require(n >= 2, f"metric fd: a distance needs at least 2 images, and the trial has {n}; widen seeds")
        reference = load_reference(options, options["split"], subject.store, subject.progress)
        features = features_of(subject.images, lambda done, total: subject.progress("features", done, total)).double().numpy()
        notes = {"reference_id": reference.id, "num_reference": len(reference.features)}
        if n <= NUM_FEATURES:
            notes["bias"] = f"n <= {NUM_FEATURES} features: compare at equal n only"
        weights = _resamples(n, self.config.num_resamples)
        frechet = Frechet(features, reference.features)
        spread = [frechet(w) for w in weights]
        yield Measure(f"fidelity/fd_effnet_{n}", frechet(), "lower", spread_interval(frechet(), spread), n, notes=notes)
        value, resampled = kernel_distance(features, reference.features, weights)
        yield Measure(f"fidelity/kd_effnet_{n}", value, "lower", spread_interval(value, resampled), n)


def _resamples(n: int, count: int) -> np.ndarray:
    """(count, n): how often each image is drawn in each bootstrap sample."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=count)


class Frechet:
    """Frechet distance of features (n, d) to a reference (m, d), in float64, with whole-number weights on the features.

    ||mu - mu_r||^2 + tr S + tr S_r - 2 tr (S S_r)^(1/2); the last trace is the sum of singular values of A S_r^(1/2), where A are
    the centred features, so it comes from the eigenvalues of a symmetric matrix and has no imaginary part.
    """

    def __init__(self, features: np.ndarray, reference: np.ndarray) -> None:
        self.features, self.mean = features, reference.mean(0)
        covariance = np.cov(reference, rowvar=False)
        values, vectors = np.linalg.eigh(covariance)
        self.trace = float(np.trace(covariance))
        self.turned = features @ (vectors * np.sqrt(values.clip(0)))  # times an orthogonal matrix: singular values stay

    def __call__(self, weights: np.ndarray | None = None) -> float:
        """The distance; weights (n,) count how often each row is taken, None takes each once."""
        n = len(self.features)
        weights = np.ones(n) if weights is None else weights
        drawn = weights > 0
        counts, total = weights[drawn, None].astype(np.float64), float(weights.sum())
        mean = (counts * self.features[drawn]).sum(0) / total
        trace = float((counts * (self.features[drawn] - mean) ** 2).sum()) / (total - 1)
        turned = self.turned[drawn]
        turned = np.sqrt(counts) * (turned - (counts * turned).sum(0) / total)
        gram = turned @ turned.T if len(turned) <= turned.shape[1] else turned.T @ turned
        root = np.sqrt(np.linalg.eigvalsh(gram / (total - 1)).clip(0)).sum()
        return float(((mean - self.mean) ** 2).sum() + trace + self.trace - 2 * root)


def kernel_distance(features: np.ndarray, reference: np.ndarray, weights: np.ndarray) -> tuple[float, list[float]]:
    """Mean unbiased squared MMD over seeded subsets, as torch-fidelity draws them, and its values under `weights` (draws, n).

    The values under weights use all images at once and leave out pairs of an image with its own copy, which would bias them.
    """
    k_xx, k_xy = _kernel(features, features), _kernel(features, reference)
    k_yy = _kernel(reference, reference)
    size, rng = min(KD_SUBSET_SIZE, len(features), len(reference)), np.random.RandomState(KD_SEED)
    values = []
    for _ in range(KD_SUBSETS):
        x, y = rng.choice(len(features), size, replace=False), rng.choice(len(reference), size, replace=False)
        values.append(mmd2(k_xx[np.ix_(x, x)], k_xy[np.ix_(x, y)], k_yy[np.ix_(y, y)]))
    apart, to_reference = k_xx - np.diag(np.diag(k_xx)), k_xy.mean(1)
    pairs = [w @ apart @ w / (w.sum() ** 2 - (w**2).sum()) - 2 * (w @ to_reference) / w.sum() for w in weights.astype(np.float64)]
    return float(np.mean(values)), [float(p) for p in pairs]


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return kernel_poly(a, b, **KERNEL)
