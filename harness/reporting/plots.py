"""The report's figures, from rows: quality against cost, keep-ratio maps. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from harness.reporting.front import front_rows
from harness.reporting.rows import CONTROL, CUT, DENSE, LATENCY, Row, SweepResults, comparable, title

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#7B5EA7", "#8C564B")
"""Okabe-Ito, darkened where it is too light on white. Grey is the control, black the dense model."""
FIXED = {DENSE: "#222222", CONTROL: "#757575"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
INK, FAINT = "#222222", "#c8c8c8"
NAME_CHARACTERS = 44
"""Of a point's name in a front; longer ones leave no room for the points where there is one panel."""
TITLE_CHARACTERS = 36
"""Of a line over a panel of 3.3 inches."""
CHARACTER = 0.02
"""Width of a character of a name, as a share of what the points span."""
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#555555", "axes.labelcolor": INK, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.grid": True,
    "grid.color": "#ececec", "grid.linewidth": 0.8, "axes.axisbelow": True, "xtick.color": "#555555", "ytick.color": "#555555",
    "figure.facecolor": "white", "savefig.facecolor": "white", "legend.frameon": False,
    "text.parse_math": False}  # a $ in a label is a $
DPI = 150


def colours(sweep: SweepResults) -> dict[str, str]:
    """{method: colour}, the same in every figure of the sweep."""
    free = iter(PALETTE * 4)
    return {method: FIXED.get(method) or next(free) for method in sweep.methods}


# ---------------------------------------------------------------------------------------------- quality against cost


def wrapped(name: str, characters: int) -> str:
    """A name in lines of about `characters`: broken at spaces, and a long option after its '='."""
    words = [part for word in name.split() for part in (re.split("(?<==)", word) if len(word) > characters - 6 else [word])]
    lines = [""]
    for word in words:
        glue = "" if lines[-1].endswith("=") or not lines[-1] else " "
        if lines[-1] and len(lines[-1] + glue + word) > characters:
            lines.append(word)
        else:
            lines[-1] += glue + word
    return "\n".join(lines)


def shortened(name: str, characters: int) -> str:
    """A name of at most `characters`, cut between words; a search numbers its trials first, so it stays tellable."""
    return name if len(name) <= characters else name[:characters - 1].rpartition(" ")[0] + " …"


def pareto_figure(sweep: SweepResults, metric: str, path: Path) -> Path | None:
    """`metric` against executed FLOPs cut and, where it was timed, against latency. None when nothing can be drawn.

    Only the largest set of comparable rows is drawn; rows whose timing was disturbed are hollow and not on the front.
    """
    rows = next(iter(comparable(sweep.rows, metric)), [])
    panels = [(CUT, "executed FLOPs cut (% of dense)", lambda v: 100 * v, False),
              (LATENCY, "measured latency (dense = 1)", lambda v: v, True)]
    panels = [panel for panel in panels if any(row.value(panel[0]) is not None for row in rows)]
    if not rows or not panels:
        return None
    with plt.rc_context(STYLE):
        size = (5.6 * len(panels), 4.6 + 0.2 * max(0, len(rows) - 14))  # a line of text for each name
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, (cost, words, scale, small_is_good) in zip(axes[0], panels, strict=True):
            _pareto_panel(axis, sweep, rows, (metric, cost), scale, small_is_good)
            axis.set_xlabel(f"{words}   {'← better' if small_is_good else 'better →'}")
        lower = rows[0].measure(metric)["better"] == "lower"
        words, _, detail = title(sweep, metric).partition(" (")
        axes[0][0].set_ylabel(f"{words}   {'← better' if lower else 'better →'}" + (f"\n({detail}" if detail else ""))
        _pareto_legend(figure, sweep, rows)
        _widen(figure)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return path


def _pareto_panel(axis: Axes, sweep: SweepResults, rows: Sequence[Row], names: tuple[str, str], scale: Any, small: bool) -> None:
    metric, cost = names
    colour, points = colours(sweep), []
    rows = [row for row in rows if row.value(cost) is not None and np.isfinite(row.value(metric))]
    measured = [scale(row.value(cost)) for row in rows]
    for row, x in zip(rows, measured if small else _side_by_side(measured), strict=True):
        y = row.value(metric)
        hollow = cost == LATENCY and row.contaminated
        axis.errorbar(x, y, xerr=_bars(row, cost, scale), yerr=_bars(row, metric, lambda v: v), fmt=_marker(sweep, row.method),
                      color=colour[row.method], markersize=8 if row.is_dense else 6.5,
                      markerfacecolor="white" if hollow else None,
                      markeredgecolor=colour[row.method] if hollow else "white", markeredgewidth=1.2 if hollow else 0.7,
                      elinewidth=1.1, capsize=2, alpha=0.95, zorder=3)
        points.append((x, y, row, hollow))
        if row.is_dense:
            axis.axhline(y, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            if small:
                axis.axvline(1.0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    whole = [row for _, _, row, hollow in points if not hollow]
    front = [(scale(row.value(cost)), row.value(metric)) for row in front_rows(sweep, whole, (metric, cost))]  # not as drawn
    if len(front) > 1:  # a staircase: nothing was measured between two points
        axis.step(*zip(*front, strict=True), where="post" if small else "pre", color=FAINT, linewidth=3.5, zorder=0.5)
    # the colour tells the method, so a variant's name need not
    names = [(x, y, shortened(row.short_name.removeprefix(f"{row.method} "), NAME_CHARACTERS), colour[row.method])
             for x, y, row, _ in points]
    bars = [_bars(row, cost, scale) for _, _, row, _ in points]
    _label_points(axis, names, max((bar[1][0] for bar in bars if bar), default=0.0))


def _side_by_side(values: Sequence[float]) -> list[float]:
    """The values, those within 1.5 % of the span of each other set 0.7 % apart, or their error bars would hide each other."""
    span = (max(values) - min(values)) or 1.0
    moved = list(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for cluster in _clusters([(values[i], i) for i in order], 0.015 * span):
        middle = sum(value for value, _ in cluster) / len(cluster)
        for place, (_, index) in enumerate(cluster if len(cluster) > 1 else []):
            moved[index] = middle + 0.007 * span * (place - (len(cluster) - 1) / 2)
    return moved


def _bars(row: Row, name: str, scale: Any) -> list[list[float]] | None:
    ends = row.spread(name) or row.interval(name)  # the spread between trainings is what a reader should see first
    if ends is None:
        return None
    value = row.value(name)
    below, above = scale(value) - scale(ends[0]), scale(ends[1]) - scale(value)
    return [[max(0.0, below)], [max(0.0, above)]]  # an interval between order statistics need not hold a median


def _marker(sweep: SweepResults, method: str) -> str:
    return "*" if method == DENSE else MARKERS[[m for m in sweep.methods if m != DENSE].index(method) % len(MARKERS)]


def _label_points(axis: Axes, points: Sequence[tuple[float, float, str, str]], bar: float) -> None:
    """Name the points in columns, one column right of each cluster in x, spread in y so that no two names overlap.

    bar: length of the longest error bar to the right, which the columns clear.
    """
    low, high = axis.get_xlim()
    span = high - low
    axis.set_xlim(low - 0.02 * span, high + 0.34 * span)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom - 0.04 * (top - bottom), top + 0.06 * (top - bottom))
    bottom, top = axis.get_ylim()
    line = 0.046 * 4.6 / axis.figure.get_figheight() * (top - bottom)  # height of a line of text in the axis's unit
    for group in _beside(_clusters(sorted(points), 0.13 * span), max(0.045 * span, bar + 0.015 * span), CHARACTER * span):
        heights = _spread([p[1] for _, p in group], line, bottom + line, top - line)
        for (column, (x, y, name, colour)), height in zip(group, heights, strict=True):
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4}
            axis.annotate(name, (x, y), (column, height), fontsize=7.5, color=colour, va="center", zorder=2.5, arrowprops=leader,
                          bbox={"boxstyle": "square,pad=0.08", "facecolor": "white", "edgecolor": "none", "alpha": 0.8})


def _widen(figure: Figure) -> None:
    """Make room for names that would leave the figure on the right."""
    for _ in range(12):  # a wider figure moves the columns too, so once need not do
        figure.draw_without_rendering()
        ends = [Text.get_window_extent(name).x1 for axis in figure.axes for name in axis.texts]  # without their leaders
        missing = max(ends, default=0.0) - figure.bbox.width
        if missing <= 0:
            return
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + 1.5 * missing / figure.dpi + 0.1, height)


def _beside(clusters: Sequence[list[tuple]], offset: float, character: float) -> list[list[tuple[float, tuple]]]:
    """(column, point), lowest first, in groups that share their heights: names of one column may reach into the next.

    offset: of a column from its cluster. character: width of one, in the axis's unit.
    """
    groups: list[list[tuple[float, tuple]]] = []
    reach = float("-inf")
    for cluster in clusters:
        column = max(p[0] for p in cluster) + offset
        if column > reach:
            groups.append([])
        groups[-1] += [(column, p) for p in cluster]
        reach = max(reach, *(column + character * len(p[2]) for p in cluster))
    return [sorted(group, key=lambda placed: placed[1][1]) for group in groups]


def _clusters(points: Sequence[tuple], gap: float) -> list[list[tuple]]:
    groups: list[list[tuple]] = []
    for point in points:
        if groups and point[0] - groups[-1][-1][0] <= gap:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near `wanted` (sorted), at least `gap` apart, within [low, high] when they fit."""
    heights = np.array(wanted, float)
    for _ in range(200):
        for i in range(len(heights) - 1):
            short = gap - (heights[i + 1] - heights[i])
            if short > 0:
                heights[i] -= short / 2
                heights[i + 1] += short / 2
        heights += max(0.0, low - heights[0]) if len(heights) else 0.0
        heights -= max(0.0, heights[-1] - high) if len(heights) else 0.0
    return heights.tolist()


def _pareto_legend(figure: Figure, sweep: SweepResults, rows: Sequence[Row]) -> None:
    colour = colours(sweep)
    shown = [method for method in sweep.methods if any(row.method == method for row in rows)]
    handles = [plt.Line2D([], [], marker=_marker(sweep, m), color=colour[m], linestyle="", markersize=7, label=m) for m in shown]
    handles.append(plt.Line2D([], [], color=FAINT, linewidth=3.5, label="Pareto front (point estimates)"))
    if any(row.contaminated for row in rows):
        handles.append(plt.Line2D([], [], marker="o", markerfacecolor="white", color="#555555", linestyle="",
                                  label="timing disturbed"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(max(2, int(figure.get_figwidth() / 1.7)), len(handles)),
                  fontsize=8.5)


# ---------------------------------------------------------------------------------------------- keep-ratio maps


def kept_map(row: Row) -> np.ndarray | None:
    """(steps, blocks) executed keep ratio of the attention where it was chosen by training or differs over the map."""
    kept = row.result.get("executed", {}).get("kept_attention")
    if not kept:
        return None
    kept = np.asarray(kept, float)
    learned = bool(row.trial.get("train"))
    return kept if kept.ndim == 2 and (learned or len(np.unique(kept[:, 1:])) > 1) else None


def heat_maps_figure(sweep: SweepResults, rows: Sequence[Row], path: Path) -> Path | None:
    """One panel per row with a keep-ratio map: sampling step downwards, block to the right, one colour scale."""
    maps = [(row, kept_map(row)) for row in rows if kept_map(row) is not None]
    if not maps:
        return None
    columns = min(3, len(maps))
    lines = -(-len(maps) // columns)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        size = (3.3 * columns + 0.6, 2.75 * lines)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        low = min(float(kept.min()) for _, kept in maps)
        for axis, (row, kept) in zip(axes.flat, maps, strict=False):
            image = _heat_map(axis, row, kept, low)
        for axis in list(axes.flat)[len(maps):]:
            axis.axis("off")
        figure.colorbar(image, ax=axes, shrink=0.8, label="executed share of tokens kept (1 = all)")
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return path


def _heat_map(axis: Axes, row: Row, kept: np.ndarray, low: float) -> AxesImage:
    image = axis.imshow(kept, vmin=low, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set_title(wrapped(row.label, TITLE_CHARACTERS), fontsize=8.5)
    axis.set_xlabel(f"block   (mean kept {kept.mean():.3f})")
    axis.set_ylabel("sampling step (0: pure noise)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def heat_map_image(row: Row) -> np.ndarray | None:
    """(height, width, 3) uint8: the keep-ratio map of one trial on the scale 0 to 1; None where there is none."""
    kept = kept_map(row)
    if kept is None:
        return None
    figure = Figure(figsize=(4.4, 3.4), dpi=110, layout="constrained")  # without pyplot: the mirror draws on its own thread
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    figure.colorbar(_heat_map(axis, row, kept, 0.0), ax=axis, label="share of tokens kept")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
