"""What a data set is: images with captions, or prompts alone."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Content:
    """What decides whether two pairs are the same. image: sha256 of the image, '' for a prompt without one."""

    id: str
    caption: str
    image: str


class DataSet(ABC):
    """One file in `harness/data/`. Building it checks the options; files are read when they are asked for."""

    name: ClassVar[str]
    has_images: bool = True
    """Where False there are prompts and nothing to compare images with or to train on."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """split: the part whose captions are sampled and whose images are compared with."""

        split: Literal["reference", "train"] = "reference"

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def fingerprint(self) -> str:
        """Hash of all pairs of both splits, which becomes part of the trial."""
        pairs = (f"{one.id}\t{one.caption}\t{one.image}\n" for split in ("reference", "train") for one in self.contents(split))
        return hashlib.sha256("".join(pairs).encode()).hexdigest()[:16]

    def has(self, split: str) -> bool:
        """Whether the split has pairs; asked each time that a sweep is read."""
        return True

    @abstractmethod
    def contents(self, split: str) -> list[Content]:
        """What the pairs of a split are; empty where there is no such split."""

    @abstractmethod
    def load(self, split: str) -> Any:
        """The split: `images` (n, H, W, 3) uint8, an array or read as it is sliced; `captions`, `ids`, `fingerprint`."""
