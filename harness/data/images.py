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
from harness.storage.fingerprints import stamp

RECIPE = "upright by EXIF, transparent parts on white, RGB, largest centred square, PIL bicubic with antialiasing"
"""What `square` does; part of the fingerprint of what it gives. Change it with the code."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is decoded, whatever a file is called. Not all that PIL knows: it hands some formats to other programs."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Eight bits a channel: of deeper ones nobody says where white is."""
MAX_PIXELS = 80_000_000
CHECK = 2
"""Version of what `check` finds; raise it with the code, and every image is looked at again."""
_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24


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
        try:
            return f"{self.path.absolute()}|{stamp(self.path)}"
        except OSError as error:
            raise _unreadable(self.name, error) from None

    def read(self) -> bytes:
        """The encoded bytes."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise _unreadable(self.name, error) from None


def _unreadable(name: str, error: OSError) -> ConfigError:
    return ConfigError(f"data: {name}: cannot be read ({error.strerror}); give yourself the right to read it, or take it out")


def check(encoded: bytes, name: str) -> None:
    """ConfigError unless `square` can read `encoded` to its end."""
    _upright(encoded, name)


def square(encoded: bytes, side: int, name: str) -> np.ndarray:
    """(side, side, 3) uint8 of an encoded image, by RECIPE; an upright RGB image of that size comes out as it is."""
    image = _upright(encoded, name)
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    cropped = image.crop((left, top, left + edge, top + edge))  # resize(box=...) would blend in what lies outside the box
    return np.asarray(cropped.resize((side, side), Image.Resampling.BICUBIC))


def _upright(encoded: bytes, name: str) -> Image.Image:
    """The whole picture, upright, opaque, RGB. Decoding it is the only way to know that it is whole."""
    require(bool(encoded), f"data: {name}: the file is empty; replace it or take it out")
    deep = encoded[:8] == _PNG and encoded[_PNG_DEPTH:_PNG_DEPTH + 1] == b"\x10"  # PIL would halve the bits and not say so
    require(not deep, f"data: {name}: its pixels have 16 bits a channel, not 8; convert it to 8-bit RGB")
    try:
        with _opened(encoded) as image:
            _check_kind(image, name)
            image.verify()  # checksums of a PNG, which decoding passes over
        with _opened(encoded) as image:
            image.load()
            return _opaque(ImageOps.exif_transpose(image)).convert("RGB")
    except ConfigError:
        raise
    except Exception as error:  # decoders of damaged bytes raise what they like, from struct.error to MemoryError
        raise ConfigError(f"data: {name}: not an image that can be read ({_said(error)}); replace it or take it out. "
                          f"Read are {', '.join(FORMATS)}") from None


def _opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def _check_kind(image: Image.Image, name: str) -> None:
    """ConfigError for what can be decoded and not be understood."""
    require(image.width * image.height <= MAX_PIXELS, f"data: {name}: {image.width} x {image.height} pixels, more than "
            f"{MAX_PIXELS // 10**6} million; make it smaller")
    require(image.mode in MODES, f"data: {name}: its pixels are of kind '{image.mode}', not 8 bits a channel; convert it to "
            "8-bit RGB")
    moving = image.format != "MPO" and getattr(image, "is_animated", False)  # of an MPO, every viewer shows the first picture
    require(not moving, f"data: {name}: an animation; save the one picture of it that is meant")


def _opaque(image: Image.Image) -> Image.Image:
    """Transparent parts laid on white."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _said(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:160]}" if words else type(error).__name__


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
