"""Finds the subjects of scenes in a picture: a small convolutional network that names what is in each of 16 x 16 cells.

It answers two questions about a sampled picture: is what the prompt asked for there, and where. No metric uses it
yet, and its weights are not in the package: `python -m harness.embedded.train_finder --export` makes them and measures it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from harness.api import require
from harness.data.scene_plan import SIDE, subjects, table

CELLS = 16
"""Cells of a side of the map."""
WIDTH = 128
WEIGHTS, FACTS = Path(__file__).with_name("finder.safetensors"), Path(__file__).with_name("finder.json")
BATCH = 64
FOUND = 0.5
"""A subject is found where its best cell has at least this probability."""


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(width, width, 1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape."""
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class Finder(nn.Module):
    """(B, 3, 128, 128) in [-1, 1] -> (B, 1 + subjects, 16, 16) logits; class 0 is the background."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(),
                                  nn.Conv2d(64, WIDTH, 3, 2, 1))
        self.body = nn.Sequential(*(_Residual(WIDTH, dilation) for dilation in (1, 2, 1, 4)))
        self.head = nn.Sequential(nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, 1 + len(subjects()), 1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.body(self.stem(images)))


def signed(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, 128, 128) in [-1, 1]; other sizes are scaled."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels if pixels.shape[-2:] == (SIDE, SIDE) else F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)


@lru_cache(maxsize=1)
def load_finder() -> Finder:
    """The network of the package. Its weights are not part of it yet: `train_finder --export` makes them."""
    require(WEIGHTS.exists(), f"the finder of subjects has no weights at {WEIGHTS.name}; make them with: python -m "
            "harness.embedded.train_finder --export")
    finder = Finder().eval().requires_grad_(False)
    finder.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return finder


def facts() -> dict:
    """How it was trained and what it reached on held-out scenes."""
    return json.loads(FACTS.read_text(encoding="utf-8"))


@torch.no_grad()
def find(images: np.ndarray, finder: Finder | None = None,
         progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
    """(n, 1 + subjects, 16, 16) float32 probabilities for images (n, H, W, 3) uint8."""
    finder, parts = finder or load_finder(), []
    for start in range(0, len(images), BATCH):
        parts.append(finder(signed(images[start:start + BATCH])).softmax(1).numpy())
        progress(min(start + BATCH, len(images)), len(images))
    return np.concatenate(parts)


def found(probabilities: np.ndarray) -> np.ndarray:
    """(n, subjects) bool: which subjects are in each picture."""
    return probabilities[:, 1:].max((2, 3)) >= FOUND


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    rows = table()["subjects"]
    return {row["name"]: row["name"] for row in rows} | {row["plural"]: row["name"] for row in rows}


def asked(prompt: str) -> tuple[str, ...]:
    """The subjects that a prompt names, in its order, each once; longer names first, so that 'teddy bear' is no bear."""
    text, places = f" {prompt.lower().replace(',', ' ')} ", {}
    for word in sorted(_names(), key=len, reverse=True):
        if (at := text.find(f" {word} ")) >= 0:
            places.setdefault(_names()[word], at)
            text = text.replace(f" {word} ", f" {'_' * len(word)} ")
    return tuple(sorted(places, key=places.__getitem__))


def asked_found(prompts: Sequence[str], probabilities: np.ndarray) -> list[float]:
    """For each prompt, the share of the subjects it names that are found in its picture."""
    order, there = {name: place for place, name in enumerate(subjects())}, found(probabilities)
    return [float(np.mean([row[order[name]] for name in asked(prompt)])) for prompt, row in zip(prompts, there, strict=True)]
