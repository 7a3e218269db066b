"""FD-DINOv2: Frechet distance of DINOv2 features, which agrees better with people than FID on diffusion models.

Source: Stein et al. 2023, arXiv:2306.04675. Extractor and what differs: `harness.metrics.extractors.dinov2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.api import METRICS, Measure, Metric, Subject, Traits
from harness.metrics.extractors.base import count_name, device_of, distance_title
from harness.metrics.extractors.catalogue import build_extractor, check_extractor
from harness.metrics.extractors.dinov2 import PUBLISHED
from harness.metrics.fidelity.fid import frechet_measures, with_extrapolation
from harness.metrics.fidelity.spread import DistanceOptions


@METRICS.register("fd_dinov2")
class FdDinov2(Metric):
    """fd_dinov2_<n> against the real images of the trial's data split; lower is better."""

    group = "fidelity"
    needs_reference = True
    least_images = 4

    @dataclass(frozen=True, kw_only=True)
    class Config(DistanceOptions):
        """weights: a folder that save_pretrained wrote or an id on the hub; None is facebook/dinov2-large."""

        weights: str | None = None

        def __post_init__(self) -> None:
            self.check("fd_dinov2")
            check_extractor("fd_dinov2.weights", "dinov2", self.weights)

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """The model, by default the published one."""
        return (config.weights or PUBLISHED,)

    def names(self, num_images: int) -> tuple[str, ...]:
        """'fidelity/fd_dinov2_5k', and 'fidelity/fd_dinov2_inf_5k' where there are images enough to extrapolate."""
        return with_extrapolation(f"fidelity/fd_dinov2_{count_name(num_images)}", num_images)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """The distance with its interval, spread over subsets, and gap to dense; the extrapolated one."""
        extractor = build_extractor("dinov2", self.config.weights, device_of(subject))
        said = Traits(title=distance_title("FD", "dinov2", count_name(len(subject.images))), lead=1)
        yield from frechet_measures(self.names(len(subject.images)), subject, extractor, self.config, said)
