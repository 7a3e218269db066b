"""From image files to what a model sees: one named preprocessing, and images that are read only when they are sliced."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from harness.api import ConfigError, require
from harness.fingerprints import stamp

RECIPE = "upright by EXIF, transparent parts on white, RGB, largest centred square, PIL bicubic with antialiasing"
"""What `square` does; part of the fingerprint of what it gives. Change it with the code."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Eight bits a channel: of deeper ones nobody says where white is."""


class StoredImage(Protocol):
    """An encoded image somewhere. name: for messages. stamp: changes whenever the bytes may have changed."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def stamp(self) -> str: ...  # noqa: D102

    def read(self) -> bytes: ...  # noqa: D102


@dataclass(frozen=True)
class ImageFile:
    """An image in a file."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def stamp(self) -> str:
        """Path, size, time of change and of the entry's change."""
        return f"{self.path.absolute()}|{stamp(self.path)}"

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.path.read_bytes()


def check(encoded: bytes, name: str) -> None:
    """ConfigError unless `encoded` begins as an image that `square` can read."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode = image.mode
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"data: {name}: not an image that can be read ({error}); replace it or take it out") from None
    require(mode in MODES, f"data: {name}: its pixels are of kind '{mode}', not 8 bits a channel; convert it to 8-bit RGB")


def square(encoded: bytes, side: int, name: str) -> np.ndarray:
    """(side, side, 3) uint8 of an encoded image, by RECIPE; an upright RGB image of that size comes out as it is."""
    check(encoded, name)
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except OSError as error:
        raise ConfigError(f"data: {name}: the image is damaged ({error}); replace it or take it out") from None
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cropped = image.crop((left, top, left + edge, top + edge))  # resize(box=...) would blend in what lies outside the box
    return np.asarray(cropped.resize((side, side), Image.Resampling.BICUBIC))


class LazyImages:
    """Images (n, side, side, 3) uint8 of which only a slice is in memory at a time."""

    def __init__(self, images: Sequence[StoredImage], side: int) -> None:
        self._images, self.shape = images, (len(images), side, side, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """One image (side, side, 3), or a stretch (m, side, side, 3)."""
        if not isinstance(index, slice):
            image = self._images[index]
            return square(image.read(), self.shape[1], image.name)
        chosen = self._images[index]
        if not chosen:
            return np.empty((0, *self.shape[1:]), np.uint8)
        return np.stack([square(image.read(), self.shape[1], image.name) for image in chosen])
