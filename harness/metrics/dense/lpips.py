"""LPIPS: how different each image looks from the dense model's of the same seed and prompt, to an image classifier.

Squared distance of unit-length features at five depths, weighted by learned heads, mean over positions, summed over depths. The
heads come inside the wheel of torchmetrics; the classifier is torchvision's, from a file or fetched once.

Source: Zhang et al. 2018, arXiv:1801.03924 (Eq. 1), version 0.1 of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchmetrics
import torchvision
from torch import Tensor, nn

from harness.api import METRICS, Measure, Metric, Subject, sources_of
from harness.metrics.extractors.base import device_of, planes
from harness.metrics.extractors.weights import check_file, fetched, file_id, state_dict
from harness.statistics.intervals import mean_interval
from harness.storage.fingerprints import stamp

TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Layers of torchvision's `features` whose outputs count: the ReLUs before each change of size, and the last."""
URLS = {"alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
        "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of images in [-1, 1]."""


@METRICS.register("lpips")
class Lpips(Metric):
    """dense/lpips_<net>, mean over images; 0 for an identical image, lower is nearer to dense."""

    group = "dense"
    against_dense = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """net: the classifier. weights: torchvision's file of it; None fetches it once."""

        net: Literal["alex", "vgg"] = "alex"
        weights: str | None = None

        def __post_init__(self) -> None:
            if self.weights is not None:
                state_dict("lpips.weights", check_file("lpips.weights", self.weights), _shapes(self.net))

    @classmethod
    def sources(cls, config: Config) -> Sequence[Any]:
        """The heads, and the classifier where it is named; a fetched one is known by its hash."""
        return (_heads(config.net), *sources_of(config))

    def names(self, num_images: int) -> tuple[str, ...]:
        """One: 'dense/lpips_alex'."""
        return (f"dense/lpips_{self.config.net}",)

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Per image, with an interval over images."""
        net, written = self.config.net, self.config.weights
        path, device = Path(written).expanduser() if written else fetched(*URLS[net]), device_of(subject)
        network = _network(net, str(path), stamp(path)).to(device)
        values = []
        for i, (image, dense) in enumerate(zip(subject.images, subject.dense_images, strict=True)):
            values.append(float(network(*(_scaled(one).to(device) for one in (image, dense)))))
            subject.progress("lpips", i + 1, len(subject.images))
        (name,) = self.names(len(subject.images))
        yield Measure(name, float(np.mean(values)), "lower", mean_interval(values), len(values), tuple(values),
                      notes={"scorer_id": f"{net}-{file_id(path)[:8]}"})


def _scaled(image: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 -> (1, 3, height, width), as the classifier was trained."""
    pixels = planes(image)[None].float() / 127.5 - 1
    return (pixels - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]


def _layers(net: str) -> nn.Sequential:
    whole = torchvision.models.alexnet() if net == "alex" else torchvision.models.vgg16(init_weights=False)
    return whole.features


def _heads(net: str) -> Path:
    return Path(torchmetrics.__file__).parent / f"functional/image/lpips_models/{net}.pth"


@lru_cache(maxsize=2)
def _shapes(net: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {f"features.{name}": tensor.shape for name, tensor in _layers(net).state_dict().items()}


@lru_cache(maxsize=2)
def _network(net: str, path: str, mark: str) -> Network:
    state = state_dict("lpips.weights", Path(path), _shapes(net))
    with torch.device("meta"):
        layers = _layers(net)
    layers.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items()}, assign=True)
    heads = torch.load(_heads(net), "cpu", weights_only=True)
    return Network(layers, TAPS[net], [heads[f"lin{i}.model.1.weight"].clone() for i in range(5)]).eval().requires_grad_(False)


class Network(nn.Module):
    """The distance of two batches (B, 3, H, W) of scaled images: (B,). heads: (1, C, 1, 1) for each tap of `layers`."""

    def __init__(self, layers: nn.Sequential, taps: tuple[int, ...], heads: list[Tensor]) -> None:
        super().__init__()
        self.layers, self.taps, self.heads = layers, taps, nn.ParameterList(heads)

    @torch.no_grad()
    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Eq. 1: sum over depths of the mean over positions of heads * (unit features - unit features)^2."""
        depths = zip(self._features(image), self._features(other), self.heads, strict=True)
        return sum((head * (a - b) ** 2).sum(1).mean((1, 2)) for a, b, head in depths)  # type: ignore[return-value]

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        for index, layer in enumerate(self.layers[:self.taps[-1] + 1]):
            x = layer(x)
            if index in self.taps:
                yield x / (x.norm(dim=1, keepdim=True) + 1e-10)
