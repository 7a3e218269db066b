"""Likeness of each image to the dense model's image of the same seed and prompt.

It measures what a reduction changed, not whether it became worse; read it beside a fidelity metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from harness.api import METRICS, Measure, Metric, Subject
from harness.statistics.intervals import mean_interval


def psnr_db(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two (height, width, 3) uint8 images, peak 255; infinite when they are identical."""
    error = np.mean((image.astype(np.float64) - other.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def psnr_cap_db(image: np.ndarray) -> float:
    """PSNR of two images that differ by one grey level in one channel of one pixel: what an identical pair is booked as."""
    return 10 * math.log10(255**2 * image.size)


def ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two (height, width, 3) uint8 images: 11 x 11 Gaussian window of spread 1.5.

    Mean over channels and all positions, with mirrored borders (torchmetrics). Source: Wang et al. 2004, with its parameters.
    """
    return float(structural_similarity_index_measure(_planes(image), _planes(other), data_range=255.0, sigma=1.5, kernel_size=11))


def _planes(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].double()


@METRICS.register("paired")
class Paired(Metric):
    """PSNR and SSIM on the 8-bit images."""

    group = "dense"
    measures = ("dense/psnr_db", "dense/ssim")
    against_dense = True

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Means over images with an interval over the pairs."""
        pairs = list(zip(subject.images, subject.dense_images, strict=True))
        raw = [psnr_db(a, b) for a, b in pairs]
        cap = psnr_cap_db(subject.images[0])
        values = tuple(min(value, cap) for value in raw)
        identical = sum(math.isinf(value) for value in raw)
        notes = {"identical_images": identical, "psnr_cap_db": round(cap, 2)} if identical else {}
        yield Measure("dense/psnr_db", float(np.mean(values)), "higher", mean_interval(values), len(values), values, notes=notes,
                      heading="PSNR to dense", title="PSNR to dense images", unit="dB", lead=2)
        values = tuple(ssim(a, b) for a, b in pairs)
        yield Measure("dense/ssim", float(np.mean(values)), "higher", mean_interval(values), len(values), values,
                      heading="SSIM to dense", title="SSIM to dense images", lead=1)
