"""What turns images into features: the contract of the networks in this package, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.api import Subject

BATCH = 16
NAMES = {"torch-fidelity": "", "clean-fid": "_clean", "dinov2": "_dinov2", "effnet": "_effnet"}
FEATURES = {"torch-fidelity": "Inception features", "clean-fid": "clean-fid's Inception features", "dinov2": "DINOv2 features",
            "effnet": "EfficientNet-Lite0 features"}
"""What they give, for titles."""
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


def planes(image: np.ndarray) -> Tensor:
    """(height, width, 3) -> (3, height, width), of the same type."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def device_of(subject: Subject) -> torch.device:
    """Where the trial's model is: there is room for a network beside it."""
    return torch.device("cpu") if subject.backbone is None else subject.backbone.transformer.device


def count_name(num_images: int) -> str:
    """How a count stands in a name: 5000 is '5k', 32 is '32'."""
    return f"{num_images // 1000}k" if num_images and num_images % 1000 == 0 else str(num_images)


def distance_title(what: str, extractor: str, count: str) -> str:
    """'FID to real images (Inception features, n = 5k)'. extractor: its name in `NAMES`. count: the images, as in the name."""
    return f"{what} to real images ({FEATURES[extractor]}, n = {count})"
