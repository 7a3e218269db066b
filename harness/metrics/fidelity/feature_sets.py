"""Features of a trial's images, of the real ones and of the dense model's; what can be shared lies in the store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import data
from harness.api import Subject
from harness.metrics.extractors import effnet
from harness.metrics.extractors.base import Extractor
from harness.metrics.fidelity.reference import load_reference
from harness.storage.code_hash import code_hash


@dataclass(frozen=True)
class FeatureSets:
    """(n, d), (m, d) and (n, d) float64: the trial's images, the real ones, and the dense model's of the same seeds.

    dense is None for the dense trial itself. reference_id: which real images by which extractor.
    """

    images: np.ndarray
    reference: np.ndarray
    dense: np.ndarray | None
    reference_id: str


def features_of(subject: Subject, extractor: Extractor) -> FeatureSets:
    """Features of a trial; those of the real and the dense images are computed once into the store."""
    reference, reference_id = _reference(subject, extractor)
    dense = None
    if subject.dense_images is not None:
        dense = _stored(subject, extractor, "dense", _fingerprint(subject.dense_images), subject.dense_images)
    images = extractor(subject.images, lambda done, total: subject.progress("features", done, total))
    return FeatureSets(images, reference, dense, reference_id)


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
