"""CLIP score: how well each image fits its prompt, 100 max(cos, 0) between CLIP's embeddings of the two.

Source: Hessel et al. 2021, arXiv:2104.08718. Differs: times 100, as most papers on diffusion print it, and not 2.5.
Which CLIP is part of the number: MLPerf takes ViT-B/32, others ViT-L/14 (the default here); the notes hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.api import METRICS, Measure, Metric, Subject
from harness.metrics.extractors import clip
from harness.metrics.extractors.base import count_name, device_of
from harness.statistics.intervals import mean_interval


@METRICS.register("clip_score")
class ClipScore(Metric):
    """clip_score_<n> in [0, 100], mean over images; higher is better."""

    group = "prompt"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """weights: a folder with model and processor, or an id on the hub; None is openai/clip-vit-large-patch14."""

        weights: str | None = None

        def __post_init__(self) -> None:
            clip.check("clip_score.weights", self.weights)

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """The model, by default the published one."""
        return (config.weights or clip.PUBLISHED,)

    def names(self, num_images: int) -> tuple[str, ...]:
        """One: 'prompt/clip_score_5k'."""
        return (f"prompt/clip_score_{count_name(num_images)}",)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Per image, with an interval over images; the report pairs it with dense."""
        model = clip.build(self.config.weights, device_of(subject))
        texts = model.texts(subject.prompts)
        images = model.images(subject.images, lambda done, total: subject.progress("clip_score", done, total))
        scores = tuple((100 * (texts * images).sum(-1).clamp(min=0)).tolist())
        (name,) = self.names(len(subject.images))
        yield Measure(name, sum(scores) / len(scores), "higher", mean_interval(scores), len(scores), scores,
                      notes={"scorer_id": clip.scorer_id(self.config.weights, model)}, window=("share", 0.002))  # MLPerf's
