"""CLIP-IQA: how much more an image looks like "Good photo." than like "Bad photo." to CLIP. It never sees the prompt.

The softmax of CLIP's scaled cosines to the two texts, its first entry.

Source: Wang et al. 2023, arXiv:2207.12396 (Eq. 3).
Differs: any CLIP of transformers with its position embedding and its own resize, where the paper takes ResNet-50 without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.api import METRICS, Measure, Metric, Subject
from harness.metrics.extractors import clip
from harness.metrics.extractors.base import count_name, device_of
from harness.statistics.intervals import mean_interval

TEXTS = ("Good photo.", "Bad photo.")


@METRICS.register("clip_iqa")
class ClipIqa(Metric):
    """clip_iqa_<n> in [0, 1], mean over images; higher is better."""

    group = "image"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """weights: a folder with model and processor, or an id on the hub; None is openai/clip-vit-large-patch14."""

        weights: str | None = None

        def __post_init__(self) -> None:
            clip.check("clip_iqa.weights", self.weights)

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """The model, by default the published one."""
        return (config.weights or clip.PUBLISHED,)

    def names(self, num_images: int) -> tuple[str, ...]:
        """One: 'image/clip_iqa_5k'."""
        return (f"image/clip_iqa_{count_name(num_images)}",)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Per image, with an interval over images; the report pairs it with dense."""
        model = clip.build(self.config.weights, device_of(subject))
        images = model.images(subject.images, lambda done, total: subject.progress("clip_iqa", done, total))
        chances = (model.scale * images @ model.texts(TEXTS).T).softmax(-1)[:, 0]
        scores = tuple(chances.tolist())
        (name,) = self.names(len(subject.images))
        yield Measure(name, sum(scores) / len(scores), "higher", mean_interval(scores), len(scores), scores,
                      notes={"scorer_id": clip.scorer_id(self.config.weights, model), "texts": " / ".join(TEXTS)},
                      window=("absolute", 0.02))
