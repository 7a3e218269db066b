"""DINOv2 features by transformers: the class token after the last norm.

Source: Oquab et al. 2024, arXiv:2304.07193; Stein et al. 2023, arXiv:2306.04675, who propose the Frechet distance on them.
Differs: Stein et al. use ViT-L/14 by torch hub; the weights of facebook/dinov2-large are the same, converted.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harness.metrics.extractors.base import Extractor, planes
from harness.metrics.extractors.weights import check_model, model_folder, model_id

PUBLISHED = "facebook/dinov2-large"
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = "Pillow bicubic per channel, 224, unrounded, ImageNet mean and deviation, class token after the norm, float32"


def check(where: str, name: str, weights: str) -> None:
    """ConfigError unless `weights` is a folder with a DINOv2, or may be an id on the hub."""
    check_model(where, weights, "dinov2")


def build(name: str, weights: str | None, device: torch.device) -> Extractor:
    """The extractor of a checked folder or id; None is facebook/dinov2-large."""
    folder = model_folder(weights or PUBLISHED)
    found = model_id(folder, RECIPE)
    return Extractor(f"{name}-{_size(folder)}", found, prepared, _network(str(folder), found).to(device), device)


def _size(folder: Path) -> str:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return f"{config.num_hidden_layers}x{config.hidden_size}"


@lru_cache(maxsize=1)
def _network(folder: str, content: str) -> nn.Module:
    from transformers import AutoModel

    return _ClassToken(AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False))


class _ClassToken(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 224, 224), scaled -> (B, d)."""
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def prepared(image: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 -> (3, 224, 224), scaled."""
    from cleanfid.resize import make_resizer

    pixels = planes(make_resizer("PIL", False, "bicubic", (SIDE, SIDE))(image)) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
