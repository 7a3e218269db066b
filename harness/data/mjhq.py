"""MJHQ-30K: 30,000 curated pictures in ten categories with their prompts.

Source: Li et al. 2024, "Playground v2.5", arXiv:2402.17245; the files of the data set `playgroundai/MJHQ-30K`.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.api import DATASETS, ConfigError, did_you_mean, require
from harness.data.files import FileDataSet, ImageOptions, Pair, existing, no_missing
from harness.data.images import ImageFile
from harness.data.text import read_text
from harness.storage import strict_json

META, IMAGES = "meta_data.json", "mjhq30k_imgs"


@DATASETS.register("mjhq")
class Mjhq(FileDataSet):
    """meta_data.json and <category>/<id>.jpg, the latter at the top or in mjhq30k_imgs."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageOptions):
        """path: the folder of meta_data.json. category: one of the ten, as for their FID; None takes all.

        Other options: `harness.data.files.ImageOptions`.
        """

        path: str
        category: str | None = None

    def pairs(self) -> list[Pair]:
        """In the order of their ids."""
        folder, category = existing(self.config.path, "data.path"), self.config.category
        where = f"data.path: {folder / META}"
        try:
            meta = strict_json.parse(read_text(folder / META, "data.path"))
        except strict_json.Unreadable as error:
            raise ConfigError(f"{where}: {error}; fetch it again") from None
        good = isinstance(meta, dict) and all(isinstance(one, dict) and isinstance(one.get("category"), str)
                                              and isinstance(one.get("prompt"), str) for one in meta.values())
        require(good, f"{where}: expected {{id: {{\"category\": ..., \"prompt\": ...}}}}, as MJHQ-30K has it")
        names = sorted({one["category"] for one in meta.values()})
        require(category is None or category in names, f"data.category: unknown category '{category}'."
                f"{did_you_mean(category or '', names)}")
        images = folder / IMAGES if (folder / IMAGES).is_dir() else folder
        return no_missing([Pair(key, one["prompt"], ImageFile(images / one["category"] / f"{key}.jpg"))
                           for key, one in sorted(meta.items()) if category in (None, one["category"])], str(images))
