"""Report and figure of the study of intervals, from its data alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from harness.reporting.plots import PALETTE, STYLE
from harness.study.writing import picture, table

KINDS = {
    "mean_interval": "Means and paired differences: the farther end of Student's t and of the bootstrap of t. Truth: the mean.",
    "median_interval": "Medians, such as latency ratios: between order statistics. Truth: the median.",
    "proportion_interval": "Shares, such as precision: Clopper and Pearson, conservative by construction. Truth: the share.",
    "jackknife_interval": "Distances and their gaps to dense: jackknife over images. Truth: the expectation at that n to this "
                          "reference, which holds the bias; it is not the distance at infinity.",
    "extrapolated_interval": "Distances extrapolated to infinitely many images. Truth: the closed form of what was drawn from.",
    "combined_interval": "Sums of variances: trainings and images (Student's t by Welch and Satterthwaite), and large samples."}


def report(data: dict[str, Any]) -> str:
    """The findings in words, a table for each kind and a figure."""
    parts = [_opening(data), _conclusion(data)]
    for kind, text in KINDS.items():
        rows = [row for row in data["rows"] if row["kind"] == kind]
        parts += [f"## {kind}", text, _table(rows)]
    return "\n\n".join([*parts, picture("intervals.png", "Coverage of every case", "Share of intervals that held the truth, with "
                                        "its own 95 % interval; shaded, the bar.")])


def _opening(data: dict[str, Any]) -> str:
    low, high = data["bar"]
    return ("**Do the 95 % intervals that the tables print hold the truth in 95 of 100 cases?**\n\n"
            f"{len(data['rows'])} cases of {data['draws']:,} draws each, made by the code that the tables use, at the n where "
            f"such numbers are printed. Bar: {100 * low:g} to {100 * high:g} %. *conservative*: above it, so wider than need be. "
            "*short*: below it. Width: the median width over that of the central 95 % of the estimates. Skewness of the values: "
            "1.75 for the lognormal of sigma 0.5, 2 for the exponential, 6.2 for the lognormal of sigma 1. Fewer than 8 values "
            "print no interval of a mean, fewer than 6 none at all.")


def _conclusion(data: dict[str, Any]) -> str:
    counts = {word: [row for row in data["rows"] if row["verdict"] == word] for word in ("held", "conservative", "short")}
    lines = [f"- {len(counts['held'])} of {len(data['rows'])} are within the bar."]
    lines += [f"- *{word}*: " + "; ".join(f"{row['printed']}, n = {row['n']}, {row['values']} ({_percent(row['covered'])})"
                                         for row in counts[word]) + "." for word in ("conservative", "short") if counts[word]]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["printed as", "n", "values", "covered", "truth below", "truth above", "width", ""]
    return table(head, [[row["printed"], f"{row['n']:,}", row["values"],
                         f"{_percent(row['covered'])} [{', '.join(_percent(end) for end in row['covered_interval'])}]",
                         _percent(row["too_high"]), _percent(row["too_low"]), f"{row['width']:.2f}", _word(row["verdict"])]
                        for row in rows])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _word(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "short" else verdict


def figures(data: dict[str, Any]) -> dict[str, Figure]:
    """intervals.png."""
    rows = data["rows"]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 0.24 * len(rows) + 1), layout="constrained")
        axis.axvspan(*(100 * end for end in data["bar"]), color=PALETTE[2], alpha=0.15)
        axis.axvline(95, color="#222222", linewidth=0.8, linestyle=":")
        colours = dict(zip(KINDS, PALETTE, strict=False))
        for place, row in enumerate(rows):
            low, high = row["covered_interval"]
            axis.errorbar(100 * row["covered"], -place, xerr=[[100 * max(0.0, row["covered"] - low)],
                                                              [100 * max(0.0, high - row["covered"])]],
                          fmt="o", markersize=4, color=colours[row["kind"]], elinewidth=1)
        names = [f"{row['printed']}, n = {row['n']:,}, {row['values']}" for row in rows]
        axis.set_yticks(-np.arange(len(rows)), names, fontsize=7)
        axis.set_xlabel("intervals that held the truth, %")
        axis.margins(y=0.01)
        return {"intervals.png": figure}
