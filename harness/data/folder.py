"""Any folder of images with a file of captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.api import DATASETS, require
from harness.data.files import FileDataSet, ImageOptions, Pair, existing, no_missing
from harness.data.images import SUFFIXES, ImageFile
from harness.data.tables import KINDS, column, read_table, read_text

CAPTIONS = tuple(f"captions{kind}" for kind in KINDS)


@DATASETS.register("folder")
class Folder(FileDataSet):
    """Images of any layout under a folder; every image has one caption and every caption its image."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ImageOptions):
        """path: the folder. captions: the file in it; None: the one of captions.csv, .tsv, .jsonl and .txt that is there.

        file_column, caption_column: of a csv or tsv with a header, or keys of a jsonl; paths are relative to the folder. A txt
        has a line per image: path, tab, caption. Other options: `harness.data.files.ImageOptions`.
        """

        path: str
        captions: str | None = None
        file_column: str = "file"
        caption_column: str = "caption"

    def pairs(self) -> list[Pair]:
        """In the order of the images' paths."""
        folder = existing(self.config.path, "data.path")
        captions = self._captions(folder)
        pairs = no_missing([Pair(file, captions[file], ImageFile(folder / file)) for file in sorted(captions)], str(folder))
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
        bare = sorted(found - captions.keys())
        require(not bare, f"data.path: {len(bare)} of {len(found)} images in {folder} have no caption, such as "
                f"{bare[0] if bare else ''}; write them or move the images away")
        return pairs

    def _captions(self, folder: Path) -> dict[str, str]:
        there = [self.config.captions] if self.config.captions else [name for name in CAPTIONS if (folder / name).is_file()]
        require(len(there) == 1, f"data.captions: {folder} holds {' and '.join(there) or 'none of ' + ', '.join(CAPTIONS)}; "
                "name the one to read")
        path = folder / there[0]
        if path.suffix == ".txt":
            rows = [line.split("\t") for line in read_text(path, "data.captions").splitlines() if line.strip()]
            odd = [row for row in rows if len(row) != 2]
            require(not odd, f"data.captions: {path}: expected path, tab, caption in each line, got {odd[:1]}")
        else:
            table = read_table(path, "data.captions")
            rows = list(zip(column(table, self.config.file_column, "data.file_column"),
                            column(table, self.config.caption_column, "data.caption_column"), strict=True))
        captions = {Path(file).as_posix(): caption for file, caption in rows}
        require(len(captions) == len(rows), f"data.captions: {path} names {len(rows) - len(captions)} images more than once; "
                "keep one caption per image")
        return captions
