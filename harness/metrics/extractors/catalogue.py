"""The extractors by name; a metric names one in its options."""

from __future__ import annotations

from typing import Any

import torch

from harness.metrics.extractors import dinov2, effnet, inception
from harness.metrics.extractors.base import Extractor, planes


def check_extractor(where: str, name: str, weights: str | None) -> None:
    """ConfigError naming the option `where` unless `weights` can be those of the extractor `name`; None is always right."""
    if weights is not None:
        (dinov2 if name == "dinov2" else inception).check(where, name, weights)


def extractor_sources(name: str, weights: str | None) -> tuple[Any, ...]:
    """What the weights of the extractor `name` are: see `Metric.sources`. Fetched ones of Inception are known by their hash."""
    published = {"effnet": effnet.weights_file(), "dinov2": dinov2.PUBLISHED}
    source = weights or published.get(name)
    return () if source is None else (source,)


def build_extractor(name: str, weights: str | None, device: torch.device) -> Extractor:
    """The extractor `name` with checked `weights`; None takes the published ones. Raises Unavailable when they cannot be had."""
    if name == "effnet":  # always on the CPU, as its stored features of the real images
        return Extractor(effnet.NAME, effnet.extractor_id(), lambda image: effnet.scaled(planes(image)[None])[0],
                         effnet.network().features, torch.device("cpu"))
    return (dinov2 if name == "dinov2" else inception).build(name, weights, device)
