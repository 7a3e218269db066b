"""Precision: the share of generated images that lie among the real ones. Recall: the share of real ones that can be generated.

An image lies among others when it is within the distance of one of them to its k-th neighbour.

Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, k = 3.
Differs: Inception, DINOv2 or EfficientNet features in place of VGG-16's, and as many real images as the split has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from harness.api import METRICS, Measure, Metric, Planned, Subject, require
from harness.metrics.extractors.base import NAMES, count_name, device_of, distance_title
from harness.metrics.extractors.catalogue import build_extractor, check_extractor, extractor_sources
from harness.metrics.fidelity.feature_sets import features_of
from harness.statistics.intervals import proportion_interval


@METRICS.register("precision_recall")
class PrecisionRecall(Metric):
    """precision_<n> and recall_<n>, both in [0, 1]; higher is better."""

    group = "fidelity"
    needs_reference = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """features: the extractor; effnet needs no weights. weights: of the extractor, None fetches. neighbours: k."""

        features: Literal["torch-fidelity", "clean-fid", "dinov2", "effnet"] = "torch-fidelity"
        weights: str | None = None
        neighbours: int = 3

        def __post_init__(self) -> None:
            require(self.neighbours >= 1, f"precision_recall.neighbours must be at least 1, got {self.neighbours}")
            require(self.features != "effnet" or self.weights is None,
                    f"precision_recall.weights: '{self.weights}', but effnet brings its own; remove weights")
            check_extractor("precision_recall.weights", self.features, self.weights)

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """What the extractor is made from."""
        return extractor_sources(config.features, config.weights)

    def names(self, num_images: int) -> tuple[str, ...]:
        """Two: 'fidelity/precision_5k' and 'fidelity/recall_5k'."""
        end = f"{NAMES[self.config.features]}_{count_name(num_images)}"
        return f"fidelity/precision{end}", f"fidelity/recall{end}"

    def check(self, planned: Planned) -> None:
        """Each image, generated or real, has k neighbours."""
        k, least = self.config.neighbours, min(planned.num_images, planned.num_real)
        require(least > k, f"precision_recall.neighbours: {k} need more than {k} images, and there are {planned.num_images} of "
                f"the trial and {planned.num_real} real ones; widen seeds, or take fewer neighbours")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Precision per image with its interval (conservative); recall without one: leaving out images changes its neighbours."""
        n, k = len(subject.images), self.config.neighbours
        require(n > k, f"precision_recall.neighbours: {k} need more than {k} images, and the trial has {n}; widen seeds")
        features = features_of(subject, build_extractor(self.config.features, self.config.weights, device_of(subject)))
        real, notes = features.reference, {"reference_id": features.reference_id, "num_reference": len(features.reference)}
        require(len(real) > k, f"precision_recall.neighbours: {k} neighbours, but there are {len(real)} real images")
        precision, recall = self.names(len(subject.images))
        conservative = {**notes, "interval": "Clopper-Pearson, conservative"}
        inside = tuple(among(features.images, real, k).astype(float).tolist())
        titles = [distance_title(what, self.config.features, count_name(n)) for what in ("precision", "recall")]
        yield Measure(precision, float(np.mean(inside)), "higher", proportion_interval(inside), n, inside, notes=conservative,
                      title=titles[0], window=("absolute", 0.02))
        yield Measure(recall, float(among(real, features.images, k).mean()), "higher", n=n, notes=notes, title=titles[1])


def among(points: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """(n,) bool: whether each of `points` (n, d) is within the k-th neighbour's distance of one of `others` (m, d)."""
    a, b = torch.from_numpy(points), torch.from_numpy(others)
    # differences, not |a|^2 + |b|^2 - 2ab: an image must lie at distance 0 from itself
    radii = torch.cat([torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1, dim=1).values
                       for part in b.split(1000)])
    inside = [(torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist") <= radii).any(1) for part in a.split(1000)]
    return torch.cat(inside).numpy()
