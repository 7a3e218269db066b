"""What is in a scene, drawn from its number: subjects, artwork, places, background, caption.

A caption names the subjects, sometimes the colour of the background and rarely the style, never a position, so it leaves much
open: many pictures belong to it. Scene `index` of a split depends on (split, index) alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

SIDE = 128
"""Pixels of a side of a scene."""
FOLDER = Path(__file__).parent / "artwork"
SPLITS = ("train", "validation", "reference")
SHARES = {"validation": 0.05, "reference": 0.15}
"""Fraction of the unordered pairs of subjects that only scenes of this split show together."""
COLOURS = {"white": (244, 244, 242), "black": (34, 35, 40), "gray": (150, 153, 158), "red": (205, 58, 58),
           "orange": (243, 146, 62), "yellow": (250, 220, 104), "green": (76, 158, 92), "blue": (66, 118, 212),
           "purple": (132, 86, 186), "pink": (246, 172, 200)}
BACKGROUNDS = (("plain", 0.4), ("gradient", 0.3), ("stripes", 0.1), ("checks", 0.1), ("clouds", 0.1))
STYLES = {"noto": "classic", "fluent": "shaded", "fluent-flat": "bright", "twemoji": "simple", "openmoji": "outlined"}
"""The word for an artwork in a caption."""
COUNTS = ((1, 0.4), (2, 0.4), (3, 0.2))
SIZES = {1: (0.45, 0.85), 2: (0.36, 0.56), 3: (0.28, 0.44)}
"""Longer side of a subject as a share of SIDE, by the number of subjects."""
TWINS, ONE_ARTWORK, NAMED_COLOUR, NAMED_STYLE, MIRRORED = 0.15, 0.5, 0.25, 0.08, 0.5
"""Chances: a subject repeats the one before; one artwork for all; the caption names the colour; the style; a mirrored subject."""
TILT_DEGREES = 8.0
NUMBER_WORDS = {2: "two", 3: "three"}


RGB = tuple[int, int, int]
Draw = Callable[[], float]
"""The next uniform number in [0, 1)."""


@dataclass(frozen=True)
class Placed:
    """A subject in a scene. x, y: its middle, size: its longer side, in pixels. angle: degrees, counter-clockwise."""

    subject: str
    artwork: str
    x: float
    y: float
    size: float
    angle: float
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """placed: from back to front. background: a kind of BACKGROUNDS, in two colours. seed: of the background's texture."""

    id: str
    caption: str
    placed: tuple[Placed, ...]
    background: str
    colours: tuple[RGB, RGB]
    seed: int

    @property
    def subjects(self) -> tuple[str, ...]:
        """The names, sorted, each once."""
        return tuple(sorted({one.subject for one in self.placed}))

    @property
    def content(self) -> str:
        """sha256 of all that decides the picture: two scenes with the same are the same picture."""
        facts = [[vars(one) for one in self.placed], self.background, self.colours, self.seed]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def table() -> dict:
    """The table of subjects and artworks as it was built."""
    return json.loads((FOLDER / "artwork.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def subjects() -> tuple[str, ...]:
    """The names of all subjects, in the order of the sheets."""
    return tuple(row["name"] for row in table()["subjects"])


@lru_cache(maxsize=1)
def artworks() -> tuple[str, ...]:
    """The artworks whose sheet is there: one whose licence does not suit can be deleted."""
    return tuple(row["name"] for row in table()["artworks"] if (FOLDER / f"{row['name']}.png").is_file())


def split_of_pair(one: str, other: str) -> str:
    """The split that alone shows these two subjects together, by a hash of their names."""
    digest = hashlib.sha256("|".join(sorted((one, other))).encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    if share < SHARES["reference"]:
        return "reference"
    return "validation" if share < SHARES["reference"] + SHARES["validation"] else "train"


def scene(split: str, index: int) -> Scene:
    """Scene `index` of a split. With two or three subjects, some pair is of this split and none of another held-out one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split of scenes '{split}'. Known: {', '.join(SPLITS)}")
    number = int.from_bytes(hashlib.sha256(f"scene {split} {index}".encode()).digest()[:8])
    draw = Random(number).random  # of all methods, random() alone is promised to stay the same
    names = _names(draw, split, _pick(draw, COUNTS))
    artwork = _one(draw, artworks()) if draw() < ONE_ARTWORK else None
    named_style = draw() < NAMED_STYLE
    if named_style and artwork is None:
        artwork = _one(draw, artworks())
    placed = _placed(draw, names, artwork)
    base, second = _one(draw, tuple(COLOURS)), _one(draw, tuple(COLOURS))
    background = _pick(draw, BACKGROUNDS)
    named_colour = background in ("plain", "gradient") and draw() < NAMED_COLOUR
    caption = caption_of(names, base if named_colour else None, STYLES[artwork] if named_style and artwork else None)
    light = _jittered(draw, COLOURS[base])
    other = _near(draw, light) if background in ("plain", "gradient") else _jittered(draw, COLOURS[second])
    return Scene(f"{split}-{index}", caption, placed, background, (light, other), int(draw() * 2**31))


def caption_of(names: tuple[str, ...], colour: str | None, style: str | None) -> str:
    """'a frog, two dogs and an apple on green, outlined': subjects in alphabetic order."""
    plural = {row["name"]: row["plural"] for row in table()["subjects"]}
    words = []
    for name in sorted(set(names)):
        count = names.count(name)
        words.append(f"{NUMBER_WORDS[count]} {plural[name]}" if count > 1 else f"{'an' if name[0] in 'aeiou' else 'a'} {name}")
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return text + (f" on {colour}" if colour else "") + (f", {style}" if style else "")


def all_words() -> list[str]:
    """Every word that a caption can hold, sorted: what a vocabulary is built from."""
    words = {"a", "an", "and", "on", ",", *NUMBER_WORDS.values(), *COLOURS, *STYLES.values()}
    for row in table()["subjects"]:
        words |= {*row["name"].split(), *row["plural"].split()}
    return sorted(words)


# ---------------------------------------------------------------------------------------------- draws


def _one(draw: Draw, choices: tuple[str, ...]) -> str:
    return choices[int(draw() * len(choices))]


def _pick(draw: Draw, shares: Sequence[tuple[Any, float]]) -> Any:
    value = draw()
    for choice, share in shares:
        if value < share:
            return choice
        value -= share
    return shares[-1][0]


def _names(draw: Draw, split: str, count: int) -> tuple[str, ...]:
    """`count` subjects, of which every pair may be shown in `split`, and one is held out for it where it is held out at all."""
    while True:
        names = [_one(draw, subjects())]
        while len(names) < count:
            names.append(names[-1] if draw() < TWINS else _one(draw, subjects()))
        pairs = {split_of_pair(one, other) for i, one in enumerate(names) for other in names[:i]}
        if pairs <= {split, "train"} and (count == 1 or split in pairs):
            return tuple(names)


def _placed(draw: Draw, names: tuple[str, ...], artwork: str | None) -> tuple[Placed, ...]:
    """Places that hardly overlap; sizes shrink until there is room."""
    low, high = SIZES[len(names)]
    shrink = 1.0
    while True:
        spots: list[tuple[float, float, float]] = []
        for _ in names:
            size = SIDE * shrink * (low + (high - low) * draw())
            for _ in range(40):
                x, y = (size / 2 + (SIDE - size) * draw() for _ in range(2))
                if all(math.hypot(x - a, y - b) > 0.42 * (size + other) for a, b, other in spots):
                    spots.append((x, y, size))
                    break
        if len(spots) == len(names):
            break
        shrink *= 0.95
    return tuple(Placed(name, artwork or _one(draw, artworks()), round(x, 2), round(y, 2), round(size, 2),
                        round(_normal(draw), 2), draw() < MIRRORED) for name, (x, y, size) in zip(names, spots, strict=True))


def _normal(draw: Draw) -> float:
    return TILT_DEGREES * math.sqrt(-2 * math.log(1 - draw())) * math.cos(2 * math.pi * draw())


def _jittered(draw: Draw, colour: RGB) -> RGB:
    return tuple(max(0, min(255, round(value + 24 * (draw() - 0.5)))) for value in colour)  # type: ignore[return-value]


def _near(draw: Draw, colour: RGB) -> RGB:
    """The same colour, lighter or darker: the far end of a gradient."""
    target, share = (255 if draw() < 0.5 else 0), 0.25 + 0.3 * draw()
    return tuple(round(value + share * (target - value)) for value in colour)  # type: ignore[return-value]
