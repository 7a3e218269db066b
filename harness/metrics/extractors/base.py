"""What turns images into features, by name, and the features of the real images in the store.

`harness.metrics.extractors.inception`, `dinov2` and `effnet` hold the networks; a metric names one in its options.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import data
from harness.api import Subject
from harness.metrics.extractors import effnet
from harness.metrics.fidelity.reference import load_reference
from harness.storage.code_hash import code_hash

BATCH = 16
NAMES = {"torch-fidelity": "", "clean-fid": "_clean", "dinov2": "_dinov2", "effnet": "_effnet"}
"""Extractor -> what it adds to a metric's name. The bare name is Inception by torch-fidelity, as most papers print it."""


@dataclass(frozen=True)
class Extractor:
    """A network with everything done to its input.

    id: 12 hex digits over weights and recipe. prepare: (height, width, 3) uint8 -> the input of one image, on the CPU.
    network: (B, ...) inputs -> (B, d) features, on `device`.
    """

    name: str
    id: str
    prepare: Callable[[np.ndarray], Tensor]
    network: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: np.ndarray, progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """(n, d) float64 features of (n, height, width, 3) uint8 images."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = torch.stack([self.prepare(np.asarray(image)) for image in images[start:start + BATCH]])
            parts.append(self.network(batch.to(self.device)).double().cpu().numpy())
            progress(min(start + BATCH, len(images)), len(images))
        return np.concatenate(parts)


def check_extractor(where: str, name: str, weights: str | None) -> None:
    """ConfigError naming the option `where` unless `weights` can be those of the extractor `name`; None is always right."""
    from harness.metrics.extractors import dinov2, inception

    if weights is not None:
        (dinov2 if name == "dinov2" else inception).check(where, name, weights)


def extractor_sources(name: str, weights: str | None) -> tuple[Any, ...]:
    """What the weights of the extractor `name` are: see `Metric.sources`. Fetched ones of Inception are known by their hash."""
    from harness.metrics.extractors import dinov2

    published = {"effnet": effnet.weights_file(), "dinov2": dinov2.PUBLISHED}
    source = weights or published.get(name)
    return () if source is None else (source,)


def build_extractor(name: str, weights: str | None, device: torch.device) -> Extractor:
    """The extractor `name` with checked `weights`; None takes the published ones. Raises Unavailable when they cannot be had."""
    from harness.metrics.extractors import dinov2, inception

    if name == "effnet":  # always on the CPU, as its stored features of the real images
        return Extractor(effnet.NAME, effnet.extractor_id(), lambda image: effnet.scaled(planes(image)[None])[0],
                         effnet.network().features, torch.device("cpu"))
    return (dinov2 if name == "dinov2" else inception).build(name, weights, device)


def planes(image: np.ndarray) -> Tensor:
    """(height, width, 3) -> (3, height, width), of the same type."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def device_of(subject: Subject) -> torch.device:
    """Where the trial's model is: there is room for a network beside it."""
    return torch.device("cpu") if subject.backbone is None else subject.backbone.transformer.device


def count_name(num_images: int) -> str:
    """How a count stands in a name: 5000 is '5k', 32 is '32'."""
    return f"{num_images // 1000}k" if num_images and num_images % 1000 == 0 else str(num_images)


@dataclass(frozen=True)
class Features:
    """(n, d), (m, d) and (n, d) float64: the trial's images, the real ones, and the dense model's of the same seeds.

    dense is None for the dense trial itself. reference_id: which real images by which extractor.
    """

    images: np.ndarray
    reference: np.ndarray
    dense: np.ndarray | None
    reference_id: str


def features_of(subject: Subject, extractor: Extractor) -> Features:
    """Features of a trial; those of the real and the dense images are computed once into the store."""
    reference, reference_id = _reference(subject, extractor)
    dense = None
    if subject.dense_images is not None:
        dense = _stored(subject, extractor, "dense", _fingerprint(subject.dense_images), subject.dense_images)
    images = extractor(subject.images, lambda done, total: subject.progress("features", done, total))
    return Features(images, reference, dense, reference_id)


def _reference(subject: Subject, extractor: Extractor) -> tuple[np.ndarray, str]:
    """Features and id of the real images; for effnet they are shipped."""
    options = subject.trial["data"]
    if extractor.name == effnet.NAME:
        found = load_reference(options, options["split"], subject.store, subject.progress)
        return found.features, found.id
    real = data.load(options, options["split"])
    features = _stored(subject, extractor, "reference", real.fingerprint, real.images)
    return features, f"{data.describe(options, options['split'])}-{real.fingerprint[:8]}-{extractor.name}-{extractor.id[:8]}"


def _fingerprint(images: np.ndarray) -> str:
    return hashlib.sha256(repr(images.shape).encode() + np.ascontiguousarray(images).tobytes()).hexdigest()


def _stored(subject: Subject, extractor: Extractor, what: str, fingerprint: str, images: np.ndarray) -> np.ndarray:
    inputs = {"images": fingerprint, "extractor": f"{extractor.name}-{extractor.id}", "device": extractor.device.type,
              "code": code_hash(__name__)}

    def make(folder: Path) -> None:
        features = extractor(images, lambda done, total: subject.progress(f"{what} features", done, total))
        np.savez(folder / "features.npz", features=features.astype(np.float32))

    with np.load(subject.store.get_or_make("features", inputs, make) / "features.npz", allow_pickle=False) as stored:
        return stored["features"].astype(np.float64)
