"""Curves over training, a line per setting: the mean over training seeds, with a band from least to greatest. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from harness.reporting.plots import DPI, PALETTE, STYLE
from harness.reporting.rows import Row

BINS = 100
TITLES = {"val/diffusion_mse": ("validation loss", "MSE to the target"),
          "val/dense_mse": ("distance to dense", "MSE to the dense prediction"),
          "val/keep_ratio": ("share of tokens computed", "fraction, all blocks"),
          "train/mean_keep_ratio": ("mean keep ratio", "share of tokens kept")}
LINES = ("-", "--", ":", "-.")


def training_figure(rows: Sequence[Row], path: Path) -> Path | None:
    """One panel per train/* series; long series are averaged into 100 bins. None without series."""
    return _curves(rows, "train/", path)


def validation_figure(rows: Sequence[Row], path: Path) -> Path | None:
    """One panel per val/* series (Shiva-DiT, Fig. 4a). None without series."""
    return _curves(rows, "val/", path)


def _curves(rows: Sequence[Row], group: str, path: Path) -> Path | None:
    shown = [row for row in rows if any(name.startswith(group) for name in row.result.get("series") or {})]
    names = list(dict.fromkeys(name for row in shown for name in row.result["series"] if name.startswith(group)))
    if not names:
        return None
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    wide = 3.9 if len(names) > 1 else 6.4
    with plt.rc_context(STYLE):
        size = (wide * columns, (2.7 if len(names) > 1 else 3.4) * lines + 0.2 * -(-len(shown) // 2) + 0.3)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, name in zip(axes.flat, names, strict=False):
            _panel(axis, shown, name)
        for axis in list(axes.flat)[len(names):]:
            axis.axis("off")
        handles = [plt.Line2D([], [], color=colour, linestyle=line, label=row.label)
                   for row, (colour, line) in zip(shown, _styles(len(shown)), strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(2 if wide < 5 else 1, len(handles)), fontsize=8)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return path


def _panel(axis: Axes, rows: Sequence[Row], name: str) -> None:
    for row, (colour, line) in zip(rows, _styles(len(rows)), strict=True):
        steps, curves = over_seeds(row, name)
        if curves is not None:
            axis.plot(steps, curves.mean(0), color=colour, linestyle=line, linewidth=1.3)
            if len(curves) > 1:
                axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.18, linewidth=0)
    title, unit = TITLES.get(name, (name.partition("/")[2].replace("_", " "), ""))
    axis.set_title(title)
    axis.set_xlabel("optimiser step, all stages")
    axis.set_ylabel(unit or _unit(name))


def _unit(name: str) -> str:
    """A loss has no unit; a gradient's norm is not a loss."""
    return "norm" if name.endswith("norm") else "mean squared error" if name.endswith("_mse") else "value"


def _styles(count: int) -> list[tuple[str, str]]:
    return [(PALETTE[i % len(PALETTE)], LINES[i // len(PALETTE) % len(LINES)]) for i in range(count)]


def over_seeds(row: Row, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Steps (n,) and values (seeds, n) of a series of every training behind `row`; None where no training has it."""
    found = [one.result["series"][name] for one in (row.members or (row,)) if (one.result.get("series") or {}).get(name)]
    binned = [_binned(series) for series in found]
    if not binned:
        return np.empty(0), None
    steps = binned[0][0]
    return steps, np.stack([np.interp(steps, x, y) for x, y in binned])


def _binned(series: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    points = np.asarray(series, float)
    if len(points) <= BINS:
        return points[:, 0], points[:, 1]
    parts = np.array_split(points, BINS)
    return np.array([p[:, 0].mean() for p in parts]), np.array([p[:, 1].mean() for p in parts])
