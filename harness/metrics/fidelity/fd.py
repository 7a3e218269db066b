"""Distance of the generated images to the real ones: Frechet and kernel distance of EfficientNet-Lite0 features.

The names carry extractor and sample count, and the numbers compare only at equal n, extractor and reference: they are no FID or
KID, which mean Inception features. Below 1280 images the Frechet distance is dominated by its bias, which all methods share.
Intervals are of the expected distance at this number of images to this reference: the bias is in both.

Source: Heusel et al. 2017, arXiv:1706.08500 (Frechet); Binkowski et al. 2018, arXiv:1801.01401 (kernel).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch_fidelity.metric_kid import kernel_poly, mmd2

from harness.api import METRICS, Measure, Metric, Subject, require
from harness.metrics.extractors.base import distance_title
from harness.metrics.extractors.effnet import NUM_FEATURES, features_of, weights_file
from harness.metrics.fidelity.reference import load_reference
from harness.statistics.intervals import OF_EXPECTED, extrapolated, extrapolated_interval, jackknife_interval, leave_out

KERNEL = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
KD_SUBSETS, KD_SUBSET_SIZE, KD_SEED = 100, 1000, 2020
"""torch-fidelity's defaults; subsets shrink to the number of images where that is smaller."""
EXTRAPOLATE_FROM = 4096
"""Images, twice the widest features in use (Inception's 2048): with fewer the bias of a Frechet distance is no line in 1/n."""
GRAM_ROWS = 4096
"""Up to this many rows all products of two rows are kept: 128 MiB."""


@METRICS.register("fd")
class FrechetAndKernelDistance(Metric):
    """fd_effnet_<n>, kd_effnet_<n> against the real images of the trial's data split; fd_effnet_inf_<n> from 4096 images on."""

    group = "fidelity"
    measures = ("fidelity/fd_effnet_{n}", "fidelity/kd_effnet_{n}")
    needs_reference = True
    least_images = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """No options."""

    def names(self, num_images: int) -> tuple[str, ...]:
        """'fidelity/fd_effnet_32', 'fidelity/kd_effnet_32', and the extrapolated one where there are images enough."""
        more = (f"fidelity/fd_effnet_inf_{num_images}",) if num_images >= EXTRAPOLATE_FROM else ()
        return *super().names(num_images), *more

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """The extractor's weights."""
        return (weights_file(),)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """The distances with their intervals; lower is better."""
        n, options = len(subject.images), subject.trial["data"]
        require(n >= 2, f"metric fd: a distance needs at least 2 images, and the trial has {n}; widen seeds")
        reference = load_reference(options, options["split"], subject.store, subject.progress)
        features = features_of(subject.images, lambda done, total: subject.progress("features", done, total)).double().numpy()
        notes = {"reference_id": reference.id, "num_reference": len(reference.features)}
        target = {"interval": OF_EXPECTED}
        bias = {"bias": f"n <= {NUM_FEATURES} features: compare at equal n only"} if n <= NUM_FEATURES else {}
        weights, frechet = leave_out(n), Frechet(features, reference.features)
        value, left_out = frechet(), [frechet(row) for row in weights]
        interval = jackknife_interval(value, left_out, n)
        title = distance_title("FD", "effnet", str(n))
        found = Measure(f"fidelity/fd_effnet_{n}", value, "lower", interval, n, notes=notes | target | bias, title=title, lead=1)
        yield found
        yield from extrapolation(f"fidelity/fd_effnet_inf_{n}", found, value, left_out, notes)
        kernel = KernelDistance(features, reference.features)
        interval = jackknife_interval(kernel.value, [kernel(row) for row in weights], n, kernel.subset_variance)
        yield Measure(f"fidelity/kd_effnet_{n}", kernel.value, "lower", interval, n, notes=target,
                      title=distance_title("KD", "effnet", str(n)))


def extrapolation(name: str, of: Measure, value: float, left_out: Sequence[float], notes: Mapping[str, Any]) -> Iterator[Measure]:
    """The distance at infinitely many generated images, from those of `leave_out(n)`; nothing below EXTRAPOLATE_FROM images.

    of: the distance at the n images there are, with which alone the window of dense is asked.

    The bias of the reference, which is as large as its own number of images makes it, stays.
    """
    n = of.n or 0
    if n >= EXTRAPOLATE_FROM:
        notes = {**notes, "extrapolated": "bias taken as a line in 1/n"}
        interval = extrapolated_interval(value, left_out, n)
        yield Measure(name, extrapolated(value, left_out, n), "lower", interval, n, notes=notes, lead=of.lead, window=None,
                      title=f"{of.title[:-1]}, extrapolated to infinitely many)")


class Frechet:
    """Frechet distance of features (n, d) to a reference (m, d), in float64, with whole-number weights on the features.

    ||mu - mu_r||^2 + tr S + tr S_r - 2 tr (S S_r)^(1/2); the last trace is the sum of singular values of A S_r^(1/2), where A are
    the centred features, so it comes from the eigenvalues of a symmetric matrix and has no imaginary part. What the weights of
    one call share with another's is computed once.
    """

    def __init__(self, features: np.ndarray, reference: np.ndarray) -> None:
        covariance = np.cov(reference, rowvar=False)
        values, vectors = np.linalg.eigh(covariance)
        self.trace = float(np.trace(covariance))
        self.features = features - reference.mean(0)
        self.squares = (self.features**2).sum(1)
        self.turned = self.features @ (vectors * np.sqrt(values.clip(0)))  # times an orthogonal matrix: singular values stay
        self._base: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, weights: np.ndarray | None = None) -> float:
        """The distance; weights (n,) count how often each row is taken, None takes each once."""
        weights = np.ones(len(self.features)) if weights is None else np.asarray(weights, np.float64)
        taken = np.flatnonzero(weights)
        counts, total = weights[taken], float(weights.sum())
        mean = counts @ self.features[taken] / total
        shift = float(mean @ mean)
        trace = (float(counts @ self.squares[taken]) - total * shift) / (total - 1)
        few = len(taken) <= self.turned.shape[1] and len(self.turned) <= GRAM_ROWS
        product = self._products_of_rows(taken, counts) if few else self._products_of_columns(weights, taken)
        root = np.sqrt(np.linalg.eigvalsh(product / (total - 1)).clip(0)).sum()
        return float(shift + trace + self.trace - 2 * root)

    @cached_property
    def _gram(self) -> np.ndarray:
        return self.turned @ self.turned.T

    def _products_of_rows(self, taken: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(rows, rows): of the centred turned rows that are taken, each times the root of its weight."""
        kernel, shares, roots = self._gram[np.ix_(taken, taken)], counts / counts.sum(), np.sqrt(counts)
        to_mean = kernel @ shares
        return (kernel - to_mean[:, None] - to_mean + shares @ to_mean) * roots[:, None] * roots

    def _products_of_columns(self, weights: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """(d, d): the weighted products of the centred turned columns, from those of the last whole set and what differs."""
        rows, total = self.turned[taken], float(weights.sum())
        if self._base is not None and 2 * np.count_nonzero(weights != self._base[0]) < len(taken):
            changed = np.flatnonzero(weights != self._base[0])
            others, by = self.turned[changed], (weights - self._base[0])[changed]
            products = self._base[1] + (others * by[:, None]).T @ others
        else:
            products = (rows * weights[taken, None]).T @ rows
            if self._base is None or total >= self._base[0].sum():
                self._base = (weights, products)
        mean = weights[taken] @ rows / total
        return products - total * np.outer(mean, mean)


class KernelDistance:
    """Squared MMD of features (n, d) to a reference (m, d). rows: the first of the features that `value` is of; None is all.

    value: mean of the unbiased estimate over seeded subsets, as torch-fidelity draws them. subset_variance: of that mean, by
    which subsets were drawn; 0 where every subset is everything. A call takes all images at once under weights (n,), and leaves
    out pairs of an image with its own copy, which would bias it.
    """

    def __init__(self, features: np.ndarray, reference: np.ndarray, rows: int | None = None) -> None:
        k_xx, k_xy, k_yy = _kernel(features, features), _kernel(features, reference), _kernel(reference, reference)
        num, size = rows or len(features), min(KD_SUBSET_SIZE, rows or len(features), len(reference))
        rng = np.random.RandomState(KD_SEED)
        values = []
        for _ in range(KD_SUBSETS):
            x, y = rng.choice(num, size, replace=False), rng.choice(len(reference), size, replace=False)
            values.append(mmd2(k_xx[np.ix_(x, x)], k_xy[np.ix_(x, y)], k_yy[np.ix_(y, y)]))
        self.value, self.subset_variance = float(np.mean(values)), float(np.var(values, ddof=1)) / KD_SUBSETS
        self._apart, self._to_reference = k_xx - np.diag(np.diag(k_xx)), k_xy.mean(1)

    def __call__(self, weights: np.ndarray) -> float:
        """The estimate under weights, but for the part of the reference alone, which no weights change."""
        taken = np.flatnonzero(weights)
        w = np.asarray(weights, np.float64)[taken]
        pairs = w @ self._apart[np.ix_(taken, taken)] @ w / (w.sum() ** 2 - (w**2).sum())
        return float(pairs - 2 * (w @ self._to_reference[taken]) / w.sum())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return kernel_poly(a, b, **KERNEL)
