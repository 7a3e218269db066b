"""HPS: Human Preference Score v2.1, a CLIP ViT-H trained on people's choices among images of one prompt.

Source: Wu et al. 2023, arXiv:2306.09341, by their package hpsv2 in an environment of its own (`harness.metrics.external.scorer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.api import METRICS, Measure, Metric, Subject
from harness.metrics.external.scorer import OutsideOptions, environment_sources, outside_measure, outside_name


@METRICS.register("hps")
class Hps(Metric):
    """hps_<n>, mean over images; higher is better."""

    group = "prompt"

    @dataclass(frozen=True, kw_only=True)
    class Config(OutsideOptions):
        """See OutsideOptions."""

        def __post_init__(self) -> None:
            self.check("hps")

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """Its environment."""
        return environment_sources(cls.name, config)

    def names(self, num_images: int) -> tuple[str, ...]:
        """One: 'prompt/hps_5k'."""
        return (outside_name(self.name, num_images),)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Per image, with an interval over images; the report pairs it with dense."""
        yield from outside_measure(self.name, "hpsv2", subject, self.config)
