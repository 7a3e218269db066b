"""KID: kernel distance (squared MMD, cubic polynomial) of Inception features to the real images. Unbiased at any n.

Source: Binkowski et al. 2018, arXiv:1801.01401, with torch-fidelity's defaults: 100 seeded subsets of 1000, gamma 1/d.
Differs: interval, subsets and gap to dense use all pairs of different images at once (n by n kernels: 4 n^2 numbers in memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness.api import METRICS, Measure, Metric, Subject, require
from harness.metrics.extractors.base import count_name, distance_title
from harness.metrics.fidelity.fd import KernelDistance
from harness.metrics.fidelity.feature_sets import features_of
from harness.metrics.fidelity.inception_options import InceptionOptions
from harness.metrics.fidelity.spread import distance_measure, images_and_dense


@METRICS.register("kid")
class Kid(Metric):
    """kid_<n> by torch-fidelity's network, kid_clean_<n> by clean-fid's; lower is better."""

    group = "fidelity"
    needs_reference = True
    least_images = 4

    @dataclass(frozen=True, kw_only=True)
    class Config(InceptionOptions):
        """See InceptionOptions."""

        def __post_init__(self) -> None:
            self.check("kid")

    def names(self, num_images: int) -> tuple[str, ...]:
        """One: 'fidelity/kid_5k'."""
        return (self.config.measure_name("kid", num_images),)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """The mean over subsets as torch-fidelity draws them, with its interval and gap to dense."""
        n = len(subject.images)
        require(n >= 4, f"metric kid: a distance with its spread needs at least 4 images, and the trial has {n}; widen seeds")
        features = features_of(subject, self.config.extractor(subject))
        kernel = KernelDistance(images_and_dense(features), features.reference, n)
        found = distance_measure(self.names(n)[0], lambda weights: [kernel(row) for row in weights], features, self.config,
                                 kernel.value, kernel.subset_variance)
        yield replace(found.measure, title=distance_title("KID", self.config.library, count_name(n)))
