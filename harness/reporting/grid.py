"""The picture grid: one line per trial, one column per image, the same seeds and prompts in every line. No torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from harness.reporting.pictures import Pictures, picks, stored
from harness.reporting.plots import INK, STYLE, colours, wrapped
from harness.reporting.rows import Row, SweepResults

COLUMNS = 8
LABEL_CHARACTERS = 26
LABEL_PX, CAPTION_PX, GAP_PX, SIDE_PX = 250, 62, 6, 128


def grid_figure(sweep: SweepResults, path: Path) -> Path | None:
    """The grid over all trials with pictures of the same seeds and prompts, dense first. None when there are no pictures.

    Columns are evenly spaced over the trial's images: nobody picked them.
    """
    shown = list(alike(sweep))
    if not shown:
        return None
    first = shown[0][1]
    chosen = picks(len(first.seeds), COLUMNS)
    canvas = np.full((len(shown) * (SIDE_PX + GAP_PX), len(chosen) * (SIDE_PX + GAP_PX), 3), 255, np.uint8)
    for line, (_, pictures) in enumerate(shown):
        for column, pick in enumerate(chosen):
            y, x = line * (SIDE_PX + GAP_PX), column * (SIDE_PX + GAP_PX)
            canvas[y:y + SIDE_PX, x:x + SIDE_PX] = _resized(pictures.images[pick])
    _save(sweep, [row for row, _ in shown], [first.captions[i] for i in chosen], canvas, path)
    return path


def alike(sweep: SweepResults) -> Iterator[tuple[Row, Pictures]]:
    """Rows with their pictures, dense first, then by asked cut: those of the same seeds and prompts as the first."""
    first = None
    for row in sorted(sweep.rows, key=lambda row: (not row.is_dense, row.asked or 0.0)):
        pictures = stored(sweep.folder, row.result)
        first = first or (pictures and (pictures.seeds, pictures.captions))
        if pictures is not None and (pictures.seeds, pictures.captions) == first:
            yield row, pictures


def _resized(image: np.ndarray) -> np.ndarray:
    """(SIDE_PX, SIDE_PX, 3): whole pixels repeated for small images, box averages for large ones."""
    side = image.shape[0]
    if SIDE_PX % side == 0 and side == image.shape[1]:
        return image.repeat(SIDE_PX // side, 0).repeat(SIDE_PX // side, 1)
    from PIL import Image  # only other sizes need a filter

    return np.asarray(Image.fromarray(image).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX))


def _save(sweep: SweepResults, rows: Sequence[Row], captions: Sequence[str], canvas: np.ndarray, path: Path) -> None:
    height, width = canvas.shape[0] + CAPTION_PX, canvas.shape[1] + LABEL_PX
    colour = colours(sweep)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
        figure.figimage(canvas, LABEL_PX, 0, origin="upper")
        for column, caption in enumerate(captions):
            x = (LABEL_PX + column * (SIDE_PX + GAP_PX) + SIDE_PX / 2) / width
            text = "\n".join(textwrap.wrap(caption, 21)[:4])
            figure.text(x, 1 - (CAPTION_PX - 6) / height, text, ha="center", va="bottom", fontsize=7, color=INK, linespacing=1.1)
        for line, row in enumerate(rows):
            y = 1 - (CAPTION_PX + line * (SIDE_PX + GAP_PX) + SIDE_PX / 2) / height
            cut = "full compute" if row.is_dense else "" if row.cut is None else f"{100 * row.cut:.1f} % fewer FLOPs"
            name = wrapped(row.label if row.cut is None else row.short_name, LABEL_CHARACTERS)
            x = (LABEL_PX - 12) / width
            figure.text(x, y, name, ha="right", va="bottom", fontsize=10, color=colour[row.method], weight="bold")
            figure.text(x, y - 5 / height, cut, ha="right", va="top", fontsize=8.5, color="#555555")
        figure.savefig(path, dpi=100)
        plt.close(figure)
