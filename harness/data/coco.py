"""COCO captions, 2014 and 2017: one caption for each image.

Source: Lin et al. 2014, arXiv:1405.0312; Chen et al. 2015, arXiv:1504.00325.
Differs: papers draw their own 30,000 of the 40,504 images of val2014; here they are those whose ids have the smallest hashes, and
the caption is the one with the smallest annotation id. Numbers compare at an equal reference id only. White space around a
caption, of which COCO has much, is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from harness.api import DATASETS, ConfigError, require
from harness.data.files import FileDataSet, ImageOptions, Pair, existing, no_missing
from harness.data.images import ImageFile
from harness.data.text import read_text
from harness.storage import strict_json

STANDARD = 30_000


@DATASETS.register("coco")
class Coco(FileDataSet):
    """annotations/captions_<part><year>.json and the folder <part><year> of images, as COCO is unpacked."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageOptions):
        """path: the folder that holds both. year, part: which of COCO's own splits.

        limit: of val2014, 30,000 is what papers call COCO-30K; val2017 has 5,000 images, all of which are taken. Other options:
        `harness.data.files.ImageOptions`.
        """

        path: str
        year: Literal[2014, 2017] = 2014
        part: Literal["val", "train"] = "val"
        limit: int | None = STANDARD

    def pairs(self) -> list[Pair]:
        """In the order of the images' ids."""
        folder, part = existing(self.config.path, "data.path"), f"{self.config.part}{self.config.year}"
        path = folder / "annotations" / f"captions_{part}.json"
        try:
            tree = strict_json.parse(read_text(path, "data.path"))
        except strict_json.Unreadable as error:
            raise ConfigError(f"data.path: {path}: {error}; fetch it again") from None
        try:
            files = {_of(int, image["id"]): _of(str, image["file_name"]) for image in tree["images"]}
            captions = _first_captions(tree["annotations"])
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"data.path: {path} has not the keys of COCO's captions: {error!r}; fetch it again") from None
        bare = sorted(files.keys() - captions.keys())
        require(not bare, f"data.path: {len(bare)} of {len(files)} images of {path} have no caption, such as {bare[:1]}")
        return no_missing([Pair(f"{key:012d}", captions[key], ImageFile(folder / part / files[key])) for key in sorted(files)],
                          str(folder / part))


def _first_captions(annotations: list[dict[str, Any]]) -> dict[int, str]:
    """{image id: the caption with the smallest annotation id}."""
    captions: dict[int, str] = {}
    for one in sorted(annotations, key=lambda one: one["id"]):
        captions.setdefault(_of(int, one["image_id"]), _of(str, one["caption"]).strip())
    return captions


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:80]!r} is no {kind.__name__}")
    return value
