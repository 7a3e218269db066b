"""What all data sets from files share: splits by content, fingerprints, leaks.

A pair falls into a split by sha256(sha256 of the image's bytes, caption), so the split depends on the pair alone: not on its
name, its place in the list or the other pairs.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from harness.api import Content, DataSet, require
from harness.data.hashes import content_hashes
from harness.data.images import RECIPE, LazyImages, StoredImage
from harness.data.text import checked, is_file, same_caption, same_text


@dataclass(frozen=True)
class Pair:
    """id: unique within the data set. image: None for a prompt alone."""

    id: str
    caption: str
    image: StoredImage | None = None


@dataclass(frozen=True)
class Split:
    """images: (n, side, side, 3) uint8, read as they are sliced; None where there are prompts only. captions and ids: n each."""

    images: LazyImages | None
    captions: list[str]
    ids: list[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What every data set from files takes.

    split: what is sampled and compared with. limit: at most so many pairs, those with the smallest hash of their id; None takes
    all. train: another data set to train on, {name: ..., path: ...}; None: the 'train' split of this one.
    """

    split: Literal["reference"] = "reference"
    limit: int | None = None
    train: dict | None = None
    reference_share: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, f"limit: at least one pair is needed, got {self.limit}; null takes all")
        require(0 <= self.reference_share <= 1, f"reference_share must lie in [0, 1], got {self.reference_share}")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(PromptOptions):
    """What every data set of image files takes besides.

    reference_share: fraction of the pairs that are 'reference', in [0, 1]; the rest is 'train'. leaks: what becomes of training
    pairs that share an image or a caption with the reference: 'refuse' stops, 'drop' leaves them out of training. resolution:
    pixels of a side, those of the backbone; None takes `backbone.resolution`.
    """

    split: Literal["reference", "train"] = "reference"  # type: ignore[assignment]
    reference_share: float = 1.0  # type: ignore[misc]
    leaks: Literal["refuse", "drop"] = "refuse"
    resolution: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.resolution is None or self.resolution >= 8, f"resolution: at least 8 pixels, got {self.resolution}")


class FileDataSet(DataSet):
    """Subclasses say which pairs there are; see `PromptOptions` and `ImageOptions` for what their Config begins with."""

    @abstractmethod
    def pairs(self) -> list[Pair]:
        """Every pair, in an order that is always the same. Raises ConfigError where the files are not as they should be."""

    @property
    def place(self) -> str:
        """Where the files are: for messages, and for the cache of hashes."""
        return self.config.path

    @cached_property
    def _pairs(self) -> list[Pair]:
        pairs = self.pairs()
        for pair in pairs:
            checked(pair.caption, f"data: the caption of '{pair.id}' at {self.place}")
        require(bool(pairs), f"data: '{self.name}' at {self.place} holds nothing; check data.path")
        bare = [pair.id for pair in pairs if not pair.caption.strip()]
        require(not bare, f"data: {len(bare)} of {len(pairs)} captions at {self.place} are empty, such as that of "
                f"'{bare[0] if bare else ''}'; write them or take the pairs out")
        limit = self.config.limit
        if limit is None or limit >= len(pairs):
            return pairs
        chosen = set(sorted(range(len(pairs)), key=lambda i: hashlib.sha256(pairs[i].id.encode()).digest())[:limit])
        return [pair for index, pair in enumerate(pairs) if index in chosen]

    @cached_property
    def _contents(self) -> list[Content]:
        images = [pair.image for pair in self._pairs if pair.image is not None]
        hashes = content_hashes(images, f"{self.name} {self.place}") if images else [""] * len(self._pairs)
        return [Content(pair.id, pair.caption, found) for pair, found in zip(self._pairs, hashes, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """Of ids, captions and image bytes of all splits, 16 hex digits."""
        return _digest(self._contents)[:16]

    def has(self, split: str) -> bool:
        """Whether the split has pairs."""
        return bool(self.contents(split))

    def contents(self, split: str) -> list[Content]:
        """What the pairs of a split are; empty where there is no such split."""
        return [one for one in self._contents if split_of(one, self.config.reference_share) == split]

    def load(self, split: str, without: Collection[str] = ()) -> Split:
        """The split, less the ids in `without`; images at `resolution`. Its fingerprint is of this split and of RECIPE."""
        kept = [one for one in self.contents(split) if one.id not in without]
        require(bool(kept), f"data: '{self.name}' at {self.place} has no '{split}' pair at reference_share "
                f"{self.config.reference_share}; change it")
        images, facts = None, ""
        if self.has_images:
            sources = {pair.id: pair.image for pair in self._pairs}
            images = LazyImages([sources[one.id] for one in kept], self.config.resolution)  # type: ignore[misc]
            facts = f"{RECIPE} {self.config.resolution}"
        return Split(images, [one.caption for one in kept], [one.id for one in kept], _digest(kept, facts))


def split_of(content: Content, reference_share: float) -> str:
    """'train' or 'reference', from the first 8 bytes of sha256(image's sha256, caption in its Unicode form NFC)."""
    digest = hashlib.sha256(bytes.fromhex(content.image) + same_text(content.caption).encode()).digest()
    return "reference" if int.from_bytes(digest[:8]) < reference_share * 2**64 else "train"


def leaked(train: Sequence[Content], reference: Sequence[Content]) -> dict[str, str]:
    """{id of a training pair: why it must not be trained on}: its image or its caption, but for case and Unicode form, is in the
    reference."""
    images = {one.image: one.id for one in reference if one.image}
    captions = {same_caption(one.caption): one.id for one in reference}
    found = {}
    for one in train:
        if one.image and one.image in images:
            found[one.id] = f"'{one.id}' is the same image as '{images[one.image]}' of the reference"
        elif same_caption(one.caption) in captions:
            other = captions[same_caption(one.caption)]
            found[one.id] = f"'{one.id}' has the caption of '{other}' of the reference, '{one.caption}'"
    return found


def existing(path: str, what: str) -> Path:
    """The path, or ConfigError where there is nothing. what: the option that named it, and what should be there."""
    try:
        there = Path(path).exists()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    require(there, f"{what}: nothing at '{path[:300]}'; a relative path starts where harness.run was started")
    return Path(path)


def no_missing(pairs: Sequence[Pair], place: str) -> list[Pair]:
    """The pairs, or ConfigError where an image is not there."""
    missing = [pair.image.name for pair in pairs if not is_file(pair.image.path)]  # type: ignore[union-attr]
    require(not missing, f"data.path: {len(missing)} of {len(pairs)} images of {place} are missing, such as "
            f"{missing[0] if missing else ''}; unpack the images there")
    return list(pairs)


def _digest(contents: Sequence[Content], facts: Any = "") -> str:
    digest = hashlib.sha256(f"{facts}\n".encode())
    for one in contents:
        row = json.dumps([one.id, one.caption, one.image], ensure_ascii=True)  # a caption may hold tabs and line ends
        digest.update(f"{row}\n".encode())
    return digest.hexdigest()
