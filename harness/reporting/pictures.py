"""The images that a trial left behind. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHEET_COLUMNS, SHEET_IMAGES = 8, 16


@dataclass(frozen=True)
class Pictures:
    """images: (n, height, width, 3) uint8. captions: n. seeds: n."""

    images: np.ndarray
    captions: list[str]
    seeds: list[int]


def stored(folder: Path, result: Mapping[str, Any]) -> Pictures | None:
    """The images of a trial in the results folder `folder`; None when it left none or they cannot be read."""
    relative = (result.get("artifacts") or {}).get("images")
    path = Path(folder) / relative if relative else None
    if path is None or not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            names = [name for name in ("prompts", "captions") if name in arrays]
            captions = arrays[names[0]] if names else [""] * len(images)
            seeds = arrays["seeds"] if "seeds" in arrays else np.arange(len(images)) + result["trial"]["seeds"][0]
    except (OSError, ValueError, KeyError):
        return None
    return Pictures(_as_uint8(images), [str(c) for c in captions], [int(s) for s in seeds])


def _as_uint8(images: np.ndarray) -> np.ndarray:
    """(n, h, w, 3) uint8 from that, or from (n, 3, h, w), or from floats in [0, 1]."""
    if images.shape[-1] != 3:
        images = images.transpose(0, 2, 3, 1)
    return images if images.dtype == np.uint8 else np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def picks(count: int, wanted: int) -> np.ndarray:
    """`wanted` indices evenly spaced over `count` images: nobody chooses."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int))


def sheet(pictures: Pictures) -> np.ndarray:
    """(height, width, 3) uint8: up to SHEET_IMAGES evenly spaced images, SHEET_COLUMNS in a line."""
    chosen = pictures.images[picks(len(pictures.images), SHEET_IMAGES)]
    side = chosen.shape[1]
    chosen = chosen.repeat(2, 1).repeat(2, 2) if side <= 128 else chosen  # small images are hard to see in a browser
    lines = -(-len(chosen) // SHEET_COLUMNS)
    canvas = np.full((lines * chosen.shape[1], min(SHEET_COLUMNS, len(chosen)) * chosen.shape[2], 3), 255, np.uint8)
    for index, image in enumerate(chosen):
        y, x = index // SHEET_COLUMNS * image.shape[0], index % SHEET_COLUMNS * image.shape[1]
        canvas[y:y + image.shape[0], x:x + image.shape[1]] = image
    return canvas
