"""Any data set that the `datasets` library opens: an id on the Hugging Face hub, or a local folder in one of its layouts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.api import DATASETS, ConfigError, did_you_mean, require
from harness.data.files import FileDataSet, ImageOptions, Pair
from harness.data.images import ImageFile


@dataclass(frozen=True)
class HubImage:
    """The image of a row, as it is stored."""

    rows: Any
    row: int
    column: str
    name: str

    @property
    def stamp(self) -> str:
        """The library's own fingerprint of the table, and the row."""
        return f"{self.rows._fingerprint}|{self.column}|{self.row}"

    def read(self) -> bytes:
        """The encoded bytes, from the table or from the file it names."""
        stored = self.rows[self.row][self.column]
        require(stored is not None, f"data: {self.name}: the row has no image; leave it out of the data set")
        if stored["bytes"] is not None:
            return stored["bytes"]
        return ImageFile(Path(stored["path"])).read()


@DATASETS.register("hub")
class Hub(FileDataSet):
    """Rows of a split of a hub data set, in its order; needs `pip install 'dit-harness[datasets]'`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageOptions):
        """id: '<owner>/<name>' on the hub, or a local folder. subset, part, revision: its configuration, split and version.

        image_column: None where there are prompts only. Other options: `harness.data.files.ImageOptions`.
        """

        id: str
        part: str
        subset: str | None = None
        revision: str | None = None
        image_column: str | None = "image"
        caption_column: str = "caption"

    @property
    def has_images(self) -> bool:  # type: ignore[override]
        """Whether a column of images is named."""
        return self.config.image_column is not None

    @property
    def place(self) -> str:
        """'<id> <part>'."""
        return f"{self.config.id} {self.config.part}"

    def pairs(self) -> list[Pair]:
        """In the order of the rows."""
        image, caption, rows = self.config.image_column, self.config.caption_column, self._rows
        for option, column in (("image_column", image), ("caption_column", caption)):
            require(column is None or column in rows.column_names, f"data.{option}: {self.place} has no column '{column}'."
                    f"{did_you_mean(column or '', rows.column_names)}")
        captions = rows.select_columns([caption])[caption]
        require(all(isinstance(text, str) for text in captions), f"data.caption_column: '{caption}' of {self.place} holds no "
                "single text for each row; name another column")
        if image is None:
            return [Pair(f"{row:08d}", text) for row, text in enumerate(captions)]
        return [Pair(f"{row:08d}", text, HubImage(rows, row, image, f"{self.place}, row {row}"))
                for row, text in enumerate(captions)]

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ConfigError("data: 'hub' needs the library `datasets`; install it with pip install 'dit-harness[datasets]', or "
                              "unpack the files and take 'folder'") from None
        options = self.config
        try:
            rows = datasets.load_dataset(options.id, options.subset, split=options.part, revision=options.revision)
        except Exception as error:  # the library raises whatever its loaders, the network and the hub raise
            raise ConfigError(f"data.id: '{options.id}' could not be opened: {type(error).__name__}: {error}") from None
        if options.image_column not in rows.column_names:
            return rows
        return rows.cast_column(options.image_column, datasets.Image(decode=False))
