"""The report's section on a search: the plan, the front, the hypervolume, and what the rungs stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from harness.reporting.front import PERHAPS, Front, front_of
from harness.reporting.plots import DPI, FAINT, INK, PALETTE, STYLE
from harness.reporting.rows import SweepResults, heading, title
from harness.reporting.tables import cell, markdown, number

FIGURE = "front.png"
FRONT_WORDS = ("By point estimates; rows whose executed FLOPs are within 1.5 points of dense of each other are one budget. "
               "*Probability*: of being on the front, over 1,000 draws of images where all rows have values per image, else of "
               "each row's interval on its own. *Perhaps*: not on it, but with a probability of 0.05 or more.")


def search_section(sweep: SweepResults, drawn: bool) -> str:
    """Markdown; '' for a sweep without a search or rungs. drawn: whether FIGURE exists."""
    parts = [_plan(sweep.search) if sweep.search else "", _rungs(sweep)]
    front = front_of(sweep)
    if front is not None:
        parts.append(_front(front) if len(front.metrics) == 2 else _best(front))
        parts.append(f"![Front of the search]({FIGURE})\n\n*{_caption(front)}*" if drawn else "")
    elif sweep.search.get("objectives"):
        parts.append("No finished trial has all objectives yet, so there is no front.")
    text = "\n\n".join(part for part in parts if part)
    return f"## Search\n\n{text}" if text else ""


def _plan(options: Mapping[str, Any]) -> str:
    how = {"grid": "every point of the grid", "random": "random draws", "optuna": f"Optuna, sampler {options['sampler']}, "
           f"{options['parallel']} suggestions at once"}[options["algorithm"]]
    wanted = options["num_trials"] or len(options["numbers"])
    space = markdown(["parameter", "values"], [[f"`{name}`", text] for name, text in options["space"].items()])
    count = f"{len(options['numbers'])} different trials of {wanted}"
    return f"{how[0].upper()}{how[1:]}, seed {options['seed']}: {count}.\n\n{space}"


def _front(front: Front) -> str:
    heads = ["on the front", "trial", *(heading(front.points[0].row, name) + (" ↓" if sign > 0 else " ↑") for name, sign
                                        in zip(front.metrics, front.signs, strict=True)), "probability"]
    chances, best = dict(zip(map(id, front.points), front.probabilities, strict=True)), front.best
    perhaps = [point for point in front.points if not any(point is one for one in best) and chances[id(point)] >= PERHAPS]
    lines = [[point.row.label + ("" if any(point is one for one in best) else " (perhaps)"),
              f"#{point.number}" if point.number else "a row of methods", *(cell(point.row, name) for name in front.metrics),
              f"{chances[id(point)]:.2f}"] for point in [*best, *perhaps]]
    corner = " and ".join(f"{name} = {number(value)}" for name, value in zip(front.metrics, front.reference, strict=True))
    whence = "given in the sweep file" if front.given else \
        "the worst value found where the sweep file gives none: not to be compared with another search"
    volume = (f"**Hypervolume {number(front.volume())}**, in the product of both units, of the area up to the reference point "
              f"{corner} ({whence}). Point estimates; intervals stand in the table.")
    if not front.volume():
        volume += " It is 0 because no finished row is better than the reference point in both: move it to what is just bad."
    left = f" {front.left_out} finished row(s), measured otherwise or with a disturbed timing, are left out." if front.left_out \
        else ""
    return f"{markdown(heads, lines)}\n\n{FRONT_WORDS}\n\n{volume}{left}"


def _best(front: Front) -> str:
    point, name = front.best[0], front.metrics[0]
    chance = front.probabilities[front.points.index(point)]
    return f"Best {name}: `{point.row.label}` with {cell(point.row, name)}; the probability that it is the best is {chance:.2f}."


def _rungs(sweep: SweepResults) -> str:
    stopped = [row for row in sweep.rows if row.status == "stopped"]
    if not sweep.asha:
        return ""
    rungs = ", ".join(f"{100 * fraction:g} %" for fraction in sweep.asha["rungs"])
    lines = [[row.label, f"{at['rung']} of {at['of']}", str(at["step"]), number(at["value"]), f"{at['rank']} of {at['rows']}"]
             for row, at in ((row, row.result["stopped"]) for row in stopped)]
    table = markdown(["stopped", "at rung", "after step", sweep.asha["metric"], "rank there"], lines) if lines else ""
    factor = sweep.asha["reduction_factor"]
    went_on = f"one in {factor:g} went on when all had come (synchronous)" if sweep.asha.get("synchronous", True) else \
        f"a row went on as soon as it was in the best 1/{factor:g} of those that had come so far"
    return (f"Successive halving: trained rows of one method and budget were compared by {sweep.asha['metric']} at {rungs} "
            f"of their steps, and {went_on}. A stopped row is no failure, and is in no ranking: it was not trained to its end."
            f"\n\n{table}").strip()


def _caption(front: Front) -> str:
    fixed = "; grey: rows of methods" if any(not point.number for point in front.points) else ""
    return (f"Left: every finished trial, coloured by its place in the search{fixed}. Cross: reference point. Right: hypervolume "
            "over the trials tried so far.")


def front_figure(sweep: SweepResults, path: Path) -> Path | None:
    """All finished trials with the front, and the hypervolume over trials; None where there are not two objectives."""
    front = front_of(sweep)
    if front is None or len(front.metrics) != 2:
        return None
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 4.4), layout="constrained")
        _scatter(figure, left, front)
        steps = front.history()
        right.step(*zip(*steps, strict=True), where="post", color=PALETTE[0], linewidth=1.8)
        right.plot(*zip(*steps, strict=True), "o", color=PALETTE[0], markersize=3.5)
        right.set_xlabel("trials of the search")
        right.set_ylabel("hypervolume   better →")
        right.set_ylim(bottom=0)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return path


def _scatter(figure: Any, axis: Any, front: Front) -> None:
    fixed, tried = [p for p in front.points if not p.number], [p for p in front.points if p.number]
    if fixed:
        axis.scatter(*_columns([p.values for p in fixed]), color="#757575", marker="D", s=30, label="rows of methods", zorder=3)
    if tried:
        image = axis.scatter(*_columns([p.values for p in tried]), c=[p.number for p in tried], cmap="viridis", s=34, zorder=3)
        figure.colorbar(image, ax=axis, label="trial of the search")
    stairs = _columns([p.values for p in front.best])
    axis.step(*stairs, where="post", color=FAINT, linewidth=3.5, zorder=0.5, label="Pareto front (point estimates)")
    axis.plot(*front.reference, marker="x", color=INK, markersize=8, linestyle="", label="reference point")
    for name, sign, put in zip(front.metrics, front.signs, (axis.set_xlabel, axis.set_ylabel), strict=True):
        words, _, detail = title(front.points[0].row, name).partition(" (")
        put(f"{words}   {'← better' if sign > 0 else 'better →'}" + (f"\n({detail}" if detail else ""))
    axis.legend(fontsize=8)


def _columns(values: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    return [pair[0] for pair in values], [pair[1] for pair in values]
