"""Prompts without images: PartiPrompts, DrawBench, any list; for a class-conditional backbone the numbers of classes.

Source: Yu et al. 2022, arXiv:2206.10789 (PartiPrompts); Saharia et al. 2022, arXiv:2205.11487 (DrawBench).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.api import DATASETS, require
from harness.data.files import FileDataSet, Pair, PromptOptions, existing
from harness.data.tables import column, names, read_table
from harness.data.text import checked, numbered_lines, read_text

COLUMNS = ("prompt", "prompts", "caption", "text")
"""Names of the column that are known without being told, in any case; PartiPrompts has 'Prompt', DrawBench 'Prompts'."""


@DATASETS.register("prompts")
class Prompts(FileDataSet):
    """A txt with a prompt a line, to the letter, or a column of a csv, tsv or jsonl. No metric of real images."""

    has_images = False

    @dataclass(frozen=True, kw_only=True)
    class Config(PromptOptions):
        """path: the file. column: of the prompts; None: the one column named prompt, prompts, caption or text.

        Other options: `harness.data.files.PromptOptions`.
        """

        path: str
        column: str | None = None

    def pairs(self) -> list[Pair]:
        """In the order of the file; equal prompts are several prompts."""
        path = existing(self.config.path, "data.path")
        if path.suffix.lower() == ".txt":
            require(self.config.column is None, f"data.column: {path} is a txt, which has no columns; remove column")
            prompts = [checked(line, f"data.path: {path}, line {number}")
                       for number, line in numbered_lines(read_text(path, "data.path"))]
        else:
            rows = read_table(path, "data.path")
            prompts = column(rows, self.config.column or _only_column(names(rows[0]) if rows else [], str(path)), "data.column")
        return [Pair(f"{number:06d}", prompt) for number, prompt in enumerate(prompts)]


def _only_column(there: list[str], path: str) -> str:
    found = [name for name in there if name.lower() in COLUMNS]
    require(len(found) == 1, f"data.column: {path} has {'several columns' if found else 'no column'} that could hold prompts; "
            f"name it. There are: {', '.join(there) or 'none'}.")
    return found[0]
