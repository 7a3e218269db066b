"""Prompts without images: PartiPrompts, DrawBench, any list; for a class-conditional backbone the numbers of classes.

Source: Yu et al. 2022, arXiv:2206.10789 (PartiPrompts); Saharia et al. 2022, arXiv:2205.11487 (DrawBench).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.api import DATASETS, require
from harness.data.files import FileDataSet, Pair, PromptOptions, existing
from harness.data.tables import column, read_table, read_text

COLUMNS = ("prompt", "prompts", "caption", "text")
"""Names of the column that are known without being told, in any case; PartiPrompts has 'Prompt', DrawBench 'Prompts'."""


@DATASETS.register("prompts")
class Prompts(FileDataSet):
    """A txt with a prompt a line, or a column of a csv, tsv or jsonl. Metrics that need real images are refused."""

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
        if path.suffix == ".txt":
            require(self.config.column is None, f"data.column: {path} is a txt, which has no columns; remove column")
            prompts = [line for line in read_text(path, "data.path").splitlines() if line.strip()]
        else:
            rows = read_table(path, "data.path")
            prompts = column(rows, self.config.column or _only_column(list(rows[0]) if rows else [], str(path)), "data.column")
        return [Pair(f"{number:06d}", prompt) for number, prompt in enumerate(prompts)]


def _only_column(names: list[str], path: str) -> str:
    found = [name for name in names if name.lower() in COLUMNS]
    require(len(found) == 1, f"data.column: {path} has {'several columns' if found else 'no column'} that could hold prompts; "
            f"name it. There are: {', '.join(names) or 'none'}.")
    return found[0]
