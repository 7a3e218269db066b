"""Scenes of one to three subjects from several free artworks, 128 pixels a side: a data set whose captions leave much open.

Drawn when they are asked for, from the sheets in `artwork/`, so there are as many as one likes. See `scene_plan` for what is in a
scene and which scenes belong to which split, and artwork/README.md for the licences.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from harness.api import DATASETS, Content, DataSet, require
from harness.data.scene_plan import FOLDER, SIDE, Placed, Scene, artworks, scene, subjects, table

PROBES = 4
"""Scenes whose pixels are part of a fingerprint: another version of Pillow may scale otherwise."""
SHADE = 0.5
"""A pixel belongs to a subject from this opacity on."""


@lru_cache(maxsize=8)
def _sheet(artwork: str) -> Image.Image:
    """All subjects of an artwork in a row, alpha premultiplied."""
    with Image.open(FOLDER / f"{artwork}.png") as image:
        return image.convert("RGBa")


def sprite(one: Placed) -> Image.Image:
    """The subject as it lies in the scene: scaled, mirrored, turned; alpha premultiplied."""
    cell, place = table()["cell_px"], subjects().index(one.subject)
    cut = _sheet(one.artwork).crop((place * cell, 0, (place + 1) * cell, cell))
    if one.mirrored:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(4, round(one.size * cell / (cell - 4)))  # the sheet leaves two pixels around each subject
    return cut.resize((side, side), Image.Resampling.LANCZOS).rotate(one.angle, Image.Resampling.BICUBIC, expand=True)


def background(one: Scene) -> np.ndarray:
    """(SIDE, SIDE, 3) float32 in [0, 255]."""
    first, second = (np.asarray(colour, np.float32) for colour in one.colours)
    rng = np.random.Generator(np.random.PCG64(one.seed))
    across = np.linspace(-1, 1, SIDE, dtype=np.float32)
    angle = rng.random() * 2 * np.pi
    ramp = np.cos(angle) * across[None] + np.sin(angle) * across[:, None]
    if one.background == "plain":
        share = np.zeros_like(ramp)
    elif one.background == "gradient":
        share = (ramp / np.abs(ramp).max() + 1) / 2
    elif one.background == "stripes":
        share = 0.5 + 0.5 * np.clip(4 * np.sin(ramp * (8 + 16 * rng.random())), -1, 1)
    elif one.background == "checks":
        count = 3 + int(rng.random() * 6)
        cells = np.arange(SIDE) * count // SIDE
        share = ((cells[None] + cells[:, None]) % 2).astype(np.float32)
    else:
        small = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
        share = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    return first + share[..., None] * (second - first)


def render(one: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The picture (SIDE, SIDE, 3) uint8, and the masks (k, SIDE, SIDE) of what is seen of each subject, from back to front."""
    picture, masks = background(one), []
    for placed in one.placed:
        layer = Image.new("RGBa", (SIDE, SIDE))
        drawn = sprite(placed)
        layer.paste(drawn, (round(placed.x - drawn.width / 2), round(placed.y - drawn.height / 2)))
        pixels = np.asarray(layer, np.float32)
        opaque = pixels[..., 3:] / 255
        picture = pixels[..., :3] + picture * (1 - opaque)
        covered = opaque[..., 0] >= SHADE
        masks = [mask & ~covered for mask in masks] + [covered]
    return np.clip(np.round(picture), 0, 255).astype(np.uint8), np.stack(masks)


class SceneImages:
    """Images (n, side, side, 3) uint8 that are drawn when they are sliced, at SIDE pixels, and scaled where side is another."""

    def __init__(self, scenes: list[Scene], side: int = SIDE) -> None:
        self.scenes, self.shape = scenes, (len(scenes), side, side, 3)

    def _drawn(self, one: Scene) -> np.ndarray:
        picture, side = render(one)[0], self.shape[1]
        return picture if side == SIDE else np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """One image (side, side, 3), or a stretch (m, side, side, 3)."""
        if not isinstance(index, slice):
            return self._drawn(self.scenes[index])
        chosen = self.scenes[index]
        return np.stack([self._drawn(one) for one in chosen]) if chosen else np.empty((0, *self.shape[1:]), np.uint8)


@dataclass(frozen=True)
class SceneSet:
    """A split. images are drawn as they are sliced; scenes say what is in them."""

    scenes: list[Scene]
    fingerprint: str
    side: int = SIDE

    def __len__(self) -> int:
        return len(self.scenes)

    @cached_property
    def images(self) -> SceneImages:
        """(n, side, side, 3) uint8."""
        return SceneImages(self.scenes, self.side)

    @property
    def captions(self) -> list[str]:
        """n captions."""
        return [one.caption for one in self.scenes]

    @property
    def ids(self) -> list[str]:
        """'<split>-<index>'."""
        return [one.id for one in self.scenes]


@lru_cache(maxsize=4)
def load_scenes(split: str, num: int, side: int = SIDE) -> SceneSet:
    """The first `num` scenes of a split, as pictures of `side` pixels."""
    scenes = [scene(split, index) for index in range(num)]
    facts = "".join(f"{one.id}\t{one.caption}\t{one.content}\n" for one in scenes)
    digest = hashlib.sha256(f"{side}\n{facts}".encode())
    for one in scenes[:PROBES]:
        digest.update(render(one)[0].tobytes())
    return SceneSet(scenes, digest.hexdigest(), side)


@DATASETS.register("scenes")
class Scenes(DataSet):
    """Scenes drawn from the artwork in the package; as many as are asked for."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """split: what is sampled and compared with. num_reference, num_train: scenes of these splits, at least 1.

        resolution: pixels of a side, those of the backbone; None takes them from it.
        """

        split: Literal["reference", "train"] = "reference"
        num_reference: int = 2000
        num_train: int = 20000
        resolution: int | None = None

        def __post_init__(self) -> None:
            for name in ("num_reference", "num_train"):
                require(getattr(self, name) >= 1, f"{name}: at least one scene is needed, got {getattr(self, name)}")
            require(self.resolution is None or self.resolution >= 8, f"resolution: at least 8 pixels, got {self.resolution}")

    @property
    def fingerprint(self) -> str:
        """Of the artworks that are there and of the first scenes' pixels."""
        digest = hashlib.sha256()
        for artwork in artworks():
            digest.update(f"{artwork}\n".encode() + (FOLDER / f"{artwork}.png").read_bytes())
        digest.update(load_scenes("reference", PROBES).fingerprint.encode())
        return digest.hexdigest()[:16]

    def contents(self, split: str) -> list[Content]:
        """Scenes with the hash of all that decides their pixels."""
        return [Content(one.id, one.caption, one.content) for one in self.load(split).scenes]

    def load(self, split: str) -> SceneSet:
        """See `load_scenes`."""
        num = self.config.num_train if split == "train" else self.config.num_reference
        return load_scenes(split, num, self.config.resolution or SIDE)
