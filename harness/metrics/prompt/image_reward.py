"""ImageReward: a score learned from people's choices among images of one prompt; standardised, so that 0 is average.

Source: Xu et al. 2023, arXiv:2304.05977, by their package image-reward in an environment of its own (`external.scorer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.api import METRICS, Measure, Metric, Subject
from harness.metrics.external.scorer import OutsideOptions, environment_sources, outside_measure, outside_name


@METRICS.register("image_reward")
class ImageReward(Metric):
    """image_reward_<n>, mean over images; higher is better."""

    group = "prompt"

    @dataclass(frozen=True, kw_only=True)
    class Config(OutsideOptions):
        """See OutsideOptions."""

        def __post_init__(self) -> None:
            self.check("image_reward")

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """Its environment."""
        return environment_sources(cls.name, config)

    def names(self, num_images: int) -> tuple[str, ...]:
        """One: 'prompt/image_reward_5k'."""
        return (outside_name(self.name, num_images),)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Per image, with an interval over images; the report pairs it with dense."""
        for found in outside_measure(self.name, "image-reward", subject, self.config):
            yield replace(found, window=("absolute", 0.05))  # zero means nothing
