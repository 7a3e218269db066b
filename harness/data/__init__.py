"""Data sets by name: images with captions in splits that never share a pair."""

from __future__ import annotations

from typing import Any

from harness.api import did_you_mean, require

NAMES = ("emoji",)


def load(name: str, split: str) -> Any:
    """The split 'train' or 'reference' of data set `name`: `images` (n, H, W, 3) uint8, `captions`, `ids`, `fingerprint`."""
    require(name in NAMES, f"data.name: unknown data set '{name}'.{did_you_mean(name, NAMES)}")
    require(split in ("train", "reference"), f"data.split: unknown split '{split}'.{did_you_mean(split, ('train', 'reference'))}")
    from harness.data.emoji import load_emoji

    return load_emoji(split)
