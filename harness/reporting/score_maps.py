"""What a router scores highly: maps over blocks and steps on generated pictures, and histograms. No torch.

After Shiva-DiT, Fig. 5 (maps) and Fig. 7 (histograms with stratified and uniform keep ratios). A router's scale is arbitrary, for
only the order of its scores matters: both figures show scores standardised within each map, so they compare shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from harness.reporting.plots import DPI, INK, STYLE, TITLE_CHARACTERS, wrapped
from harness.reporting.rows import Row, SweepResults
from harness.storage import arrays

LIMIT = 3.0
"""Standard deviations at which the colours of the maps and the histograms end."""


@dataclass(frozen=True)
class ScoreMaps:
    """scores: (images, steps, blocks, N), NaN at blocks that are not routed. images: (images, height, width, 3) uint8."""

    row: Row
    scores: np.ndarray
    steps: list[int]
    noise_levels: list[float]
    grid: tuple[int, int]
    images: np.ndarray
    prompts: list[str]

    @property
    def standardised(self) -> np.ndarray:
        """Scores with mean 0 and standard deviation 1 within each map; a map of equal scores is 0 throughout."""
        spread = self.scores.std(-1, keepdims=True)
        return (self.scores - self.scores.mean(-1, keepdims=True)) / np.where(spread > 0, spread, 1.0)

    @property
    def routed(self) -> list[int]:
        """Blocks that have scores."""
        return [block for block in range(self.scores.shape[2]) if not np.isnan(self.scores[:, :, block]).all()]


def stored_scores(sweep: SweepResults) -> list[ScoreMaps]:
    """The scores that the rows left behind; of a row of several trainings, the first one's."""
    found = []
    for row in sweep.rows:
        relative = (row.result.get("artifacts") or {}).get("scores")
        scores = _read(row, sweep.folder / relative) if relative else None
        if scores is not None:
            found.append(scores)
    return found


def _read(row: Row, path: Path) -> ScoreMaps | None:
    """None where the file is not there, or is something else; the report says of which rows (see `report`)."""
    try:
        found = arrays.load(path)
        scores = ScoreMaps(row, found["scores"].astype(np.float64), found["steps"].tolist(), found["noise_levels"].tolist(),
                           tuple(found["grid"].tolist()), found["images"], [str(prompt) for prompt in found["prompts"]])
    except (FileNotFoundError, arrays.Unreadable, KeyError, TypeError, ValueError):
        return None
    images, steps, _, tokens = scores.scores.shape if scores.scores.ndim == 4 else (0, 0, 0, 0)
    fits = (images and len(scores.grid) == 2 and tokens == scores.grid[0] * scores.grid[1] and scores.images.ndim == 4
            and steps == len(scores.steps) == len(scores.noise_levels) and images == len(scores.images) == len(scores.prompts))
    return scores if fits else None


def score_maps_figure(found: ScoreMaps, path: Path, image: int = 0) -> Path:
    """The picture, then one map per block (to the right) and step (downwards), of one image."""
    blocks, (height, width) = found.routed, found.grid
    across, down = width * 1.08, height * 1.3  # from one map to the next, in tokens
    kept = (found.row.result.get("executed") or {}).get("kept_attention")
    with plt.rc_context({**STYLE, "axes.grid": False}):
        size = (1.15 * (len(blocks) + 1) + 1.7, 1.4 * len(found.steps) + 0.8)
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        place = {"ha": "center", "va": "top", "fontsize": 7, "color": INK}
        for line, step in enumerate(found.steps):
            axis.text(-0.08 * width, line * down + height / 2, f"step {step}\nnoise {found.noise_levels[line]:.2f}",
                      rotation=90, ha="right", va="center", fontsize=8, color=INK)
            for column, block in enumerate(blocks, start=1):
                corner = (column * across, line * down)
                drawn = _draw(axis, found.standardised[image, line, block].reshape(found.grid), corner, found.grid)
                if kept:
                    axis.text(corner[0] + width / 2, corner[1] + 1.02 * height, f"keeps {100 * kept[step][block]:.0f} %", **place)
        _draw(axis, found.images[image], (0, 0), found.grid)
        for column, name in enumerate(["picture", *(f"block {block}" for block in blocks)]):
            axis.text(column * across + width / 2, -0.06 * height, name, **{**place, "va": "bottom", "fontsize": 8.5})
        axis.set(xlim=(-0.5 * width, (len(blocks) + 1) * across), ylim=(len(found.steps) * down, -0.25 * height))
        axis.axis("off")
        figure.colorbar(drawn, ax=axis, shrink=0.7, label="router score (SD within map)")
        figure.suptitle(f"{found.row.label}: “{found.prompts[image]}”", fontsize=9)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path


def _draw(axis: Axes, values: np.ndarray, corner: tuple[float, float], grid: tuple[int, int]) -> AxesImage:
    """A map or a picture over `grid` (height, width) of the axis, its upper left corner at `corner` (x, y)."""
    x, y = corner
    return axis.imshow(values, extent=(x, x + grid[1], y + grid[0], y), vmin=-LIMIT, vmax=LIMIT, cmap="RdBu_r",
                       interpolation="nearest", aspect="equal")


def histogram_figure(all_scores: Sequence[ScoreMaps], path: Path) -> Path | None:
    """One panel per row: densities of the scores over tokens, blocks and images, a line per step. None without scores."""
    if not all_scores:
        return None
    columns = min(3, len(all_scores))
    lines = -(-len(all_scores) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns + 0.6, 2.5 * lines + 0.3), sharex=True, sharey=True,
                                    squeeze=False, layout="constrained")
        for axis, found in zip(axes.flat, all_scores, strict=False):
            _histogram(axis, found)
        for axis in list(axes.flat)[len(all_scores):]:
            axis.axis("off")
        for axis in axes[:, 0]:
            axis.set_ylabel("density of tokens")
        scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), "viridis")
        figure.colorbar(scale, ax=axes, shrink=0.8, label="noise level (1 = pure noise)")
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return path


def _histogram(axis: Axes, found: ScoreMaps) -> None:
    edges = np.linspace(-LIMIT, LIMIT, 49)
    middle = (edges[1:] + edges[:-1]) / 2
    for line, level in enumerate(found.noise_levels):
        values = found.standardised[:, line]
        values = np.clip(values[np.isfinite(values)], -LIMIT, LIMIT)
        density = np.histogram(values, edges, density=True)[0]
        axis.plot(middle, density, color=plt.get_cmap("viridis")(level), linewidth=1.3)
    raw = (found.row.measure("router/score_std") or {}).get("value")
    axis.set_title(wrapped(found.row.label, TITLE_CHARACTERS), fontsize=8.5)
    axis.set_xlabel("router score, SD within map" + ("" if raw is None else f"   (raw SD {raw:.3g})"))
