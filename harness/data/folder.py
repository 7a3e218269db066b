"""Any folder of images with a file of captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.api import DATASETS, require
from harness.data.files import FileDataSet, ImageOptions, Pair, existing, no_missing
from harness.data.images import SUFFIXES, ImageFile
from harness.data.tables import KINDS, column, read_table
from harness.data.text import checked, is_file, numbered_lines, read_text, same_text

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
        captions, there = self._captions(folder), self._images(folder)
        pairs = no_missing([Pair(file, captions[file], ImageFile(folder / there.get(file, file))) for file in sorted(captions)],
                           str(folder))
        bare = sorted(there.keys() - captions.keys())
        require(not bare, f"data.path: {len(bare)} of {len(there)} images in {folder} have no caption, such as "
                f"{bare[0] if bare else ''}; write them or move the images away")
        return pairs

    def _images(self, folder: Path) -> dict[str, str]:
        """{name in the form that captions are paired by: name as the system has it}: macOS spells 'é' with two characters."""
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
        there = {same_text(name): name for name in names}
        twice = next((name for name in names if there[same_text(name)] != name), "")
        require(not twice, f"data.path: {folder} has two images named '{same_text(twice)}', in two Unicode forms; rename one")
        return there

    def _captions(self, folder: Path) -> dict[str, str]:
        there = [self.config.captions] if self.config.captions else [name for name in CAPTIONS if is_file(folder / name)]
        require(len(there) == 1, f"data.captions: {folder} holds {' and '.join(there) or 'none of ' + ', '.join(CAPTIONS)}; "
                "name the one to read")
        path = folder / there[0]
        if path.suffix.lower() == ".txt":
            rows = [_file_and_caption(line, f"data.captions: {path}, line {number}")
                    for number, line in numbered_lines(read_text(path, "data.captions"))]
        else:
            table = read_table(path, "data.captions")
            rows = list(zip(column(table, self.config.file_column, "data.file_column"),
                            column(table, self.config.caption_column, "data.caption_column"), strict=True))
        captions = {same_text(PurePosixPath(file).as_posix()): caption for file, caption in rows}
        require(len(captions) == len(rows), f"data.captions: {path} names {len(rows) - len(captions)} images more than once; "
                "keep one caption per image")
        return captions


def _file_and_caption(line: str, where: str) -> tuple[str, str]:
    file, tab, caption = line.partition("\t")
    require(bool(tab) and "\t" not in caption, f"{where}: expected path, tab, caption, got {line[:80]!r}")
    return file, checked(caption, where)
