"""The embedded data set: 459 Noto emoji, each on 12 background colours, with captions.

The caption of a pair is "<name> on a <colour> background". Every pair falls into one of two splits by a hash
of its own content, so the split never depends on order, on the other pairs or on a random state: "train"
(about three quarters) is what the embedded backbone learns from; "reference" (the rest) holds the prompts and
the real images of evaluation, and the embedded backbone's transformer never trains on it.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from harness.api import DATASETS, Content, DataSet
from harness.storage.fingerprints import fingerprint

RESOLUTION = 64
REFERENCE_SHARE = 0.25
SPLITS = ("train", "reference")
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "gray": (150, 153, 158),
    "red": (205, 43, 49),
    "orange": (245, 136, 40),
    "yellow": (252, 226, 100),
    "green": (58, 148, 74),
    "teal": (62, 188, 178),
    "blue": (48, 98, 206),
    "purple": (124, 70, 178),
    "pink": (250, 172, 200),
    "brown": (121, 78, 50),
}

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class EmojiSet:
    """images: (n, 64, 64, 3) uint8 RGB; captions and ids: n each, ids as "<unicode>-<colour>"."""

    images: np.ndarray
    captions: list[str]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, captions and pixels, as 64 hex digits."""
        digest = hashlib.sha256()
        for image_id, caption in zip(self.ids, self.captions, strict=True):
            digest.update(f"{image_id}\t{caption}\n".encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        return digest.hexdigest()


@lru_cache(maxsize=1)
def load_sprites() -> tuple[list[dict[str, str]], np.ndarray]:
    """The table rows (name, category, unicode, cell) and the sprites (n, 64, 64, 4) uint8, straight alpha."""
    table = json.loads((_FOLDER / "emoji_table.json").read_text(encoding="utf-8"))
    sheet = np.asarray(Image.open(_FOLDER / "emoji_sheet.png").convert("RGBA"))
    cell, columns = table["cell_px"], table["columns"]
    rows = table["sprites"]
    height = sheet.shape[0] // cell
    cells = sheet.reshape(height, cell, columns, cell, 4).swapaxes(1, 2).reshape(-1, cell, cell, 4)
    return rows, cells[[row["cell"] for row in rows]]


def composite(sprite: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The sprite (64, 64, 4) laid over a flat colour, (64, 64, 3) uint8."""
    alpha = sprite[..., 3:].astype(np.float32) / 255
    mixed = sprite[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)
    return np.round(mixed).astype(np.uint8)


def caption_of(name: str, colour: str) -> str:
    """The caption of a pair: at most 16 tokens with the start and end marks."""
    article = "an" if colour == "orange" else "a"
    return f"{name} on {article} {colour} background"


def split_of(sprite: np.ndarray, colour: str) -> str:
    """"train" or "reference", from the first 8 bytes of sha256(sprite pixels, colour name)."""
    digest = hashlib.sha256(np.ascontiguousarray(sprite).tobytes() + colour.encode()).digest()
    return "reference" if int.from_bytes(digest[:8]) < REFERENCE_SHARE * 2**64 else "train"


def load_emoji(split: Literal["train", "reference"]) -> EmojiSet:
    """All pairs of one split, sprite by sprite, colours in the order of COLOURS."""
    if split not in SPLITS:
        raise ValueError(f"unknown emoji split {split!r}. Known: {', '.join(SPLITS)}.")
    rows, sprites = load_sprites()
    images, captions, ids = [], [], []
    for row, sprite in zip(rows, sprites, strict=True):
        for colour, rgb in COLOURS.items():
            if split_of(sprite, colour) == split:
                images.append(composite(sprite, rgb))
                captions.append(caption_of(row["name"], colour))
                ids.append(f"{row['unicode']}-{colour}")
    return EmojiSet(np.stack(images), captions, ids)


def all_captions() -> list[str]:
    """Every caption of both splits, without the images: what a vocabulary is built from."""
    rows, _ = load_sprites()
    return [caption_of(row["name"], colour) for row in rows for colour in COLOURS]


@lru_cache(maxsize=2)
def _contents(split: str) -> list[Content]:
    pairs = load_emoji(split)
    return [Content(one, caption, hashlib.sha256(image.tobytes()).hexdigest())
            for one, caption, image in zip(pairs.ids, pairs.captions, pairs.images, strict=True)]


@DATASETS.register("emoji")
class Emoji(DataSet):
    """The embedded data set; it has no options but the split."""

    @property
    def fingerprint(self) -> str:
        """Of its two files."""
        return str(fingerprint([_FOLDER / "emoji_table.json", _FOLDER / "emoji_sheet.png"]))

    def contents(self, split: str) -> list[Content]:
        """Pairs with the sha256 of their pixels."""
        return _contents(split)

    def load(self, split: str) -> EmojiSet:
        """See `load_emoji`."""
        return load_emoji(split)
