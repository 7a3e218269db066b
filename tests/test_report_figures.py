"""Figures can be read: names, legends and titles stay where they belong."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from fake_reports import finished as finished
from fake_results import make_sweep, write_result
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from harness.reporting import plots
from harness.reporting.grid import LABEL_CHARACTERS
from harness.reporting.rows import load_sweep


@pytest.mark.parametrize(("name", "lines"), [
    ("shiva ratio_policy=structure_first rejected=cache", ["shiva ratio_policy=", "structure_first", "rejected=cache"]),
    ("shiva estimator=eq7", ["shiva estimator=eq7"]), ("x" * 40, ["x" * 40])])
def test_long_names_break_between_words(name, lines):
    assert plots.wrapped(name, LABEL_CHARACTERS).split("\n") == lines


@pytest.mark.parametrize("timed", [True, False])
def test_the_legend_of_the_front_lies_inside_the_figure(tmp_path, monkeypatch, timed):
    """Without latency there is one panel, half as wide, and as many methods."""
    results = make_sweep(tmp_path / "ablation", images=24, artifacts=False)
    for result in results:
        if not timed:
            result["metrics"] = {name: one for name, one in result["metrics"].items() if not name.startswith("latency/")}
        write_result(tmp_path / "ablation", result)
    sweep, seen = load_sweep(tmp_path / "ablation"), []
    monkeypatch.setattr(plots.plt, "close", seen.append)
    metric = next(name for name in results[0]["metrics"] if name.startswith("fidelity/fd"))
    plots.pareto_figure(sweep, metric, tmp_path / "front.png")
    (figure,) = seen
    box = figure.legends[0].get_window_extent()
    assert len(figure.axes) == 1 + timed and box.x0 >= 0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize(("characters", "width"), [(plots.NAME_CHARACTERS, 6), (90, 12)])
def test_a_name_of_the_front_that_says_everything_does_not_leave_the_figure(finished, tmp_path, monkeypatch, characters, width):
    sweep, seen = load_sweep(finished), []
    monkeypatch.setattr(plots, "NAME_CHARACTERS", characters)
    options = "router_width=32 router_lr=0.00284 ratio_policy=structure_first policy_lr=0.00017"
    rows = [replace(row, label=f"#{i} {row.method} {options}") for i, row in enumerate(sweep.rows)
            if "-24%" not in row.label]
    for row in rows:
        row.result["metrics"] = {name: one for name, one in row.result["metrics"].items() if not name.startswith("latency/")}
    monkeypatch.setattr(plots.plt, "close", seen.append)
    plots.pareto_figure(replace(sweep, rows=tuple(rows)), sweep.quality, tmp_path / "front.png")
    edge = np.asarray(Image.open(tmp_path / "front.png").convert("L"))[:, -2:]
    assert edge.min() == 255 and seen[0].get_figwidth() < width


def test_no_name_of_the_front_covers_another():
    """Also where a long name of one column reaches into the next."""
    figure = Figure(figsize=(5.6, 4.6))
    axis = figure.subplots()
    places = [(0.84, 239, "shiva"), (0.87, 233, "ratio_policy=structure_first rejected=cache"), (0.85, 302, "random_drop"),
              (0.88, 233, "ratio_policy=structure_first"), (1.03, 231, "shiva"), (1.05, 187, "dense"), (1.16, 231, "tomesd")]
    points = [(*place, "black") for place in places]
    axis.scatter(*zip(*[point[:2] for point in points], strict=True))
    plots._label_points(axis, points, 0.05)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # of the words, without their leader
    assert len(boxes) == len(points)
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.shrunk(0.98, 0.8).overlaps(b.shrunk(0.98, 0.8))]


def test_the_titles_of_the_heat_maps_stay_over_their_panels(finished, tmp_path, monkeypatch):
    sweep, seen = load_sweep(finished), []
    rows = [replace(row, label=f"{row.label} ratio_policy=structure_first rejected=cache") for row in sweep.rows]
    monkeypatch.setattr(plots.plt, "close", seen.append)
    assert plots.heat_maps_figure(sweep, rows, tmp_path / "kept.png")
    *maps, bar = [axis for axis in seen[0].axes if axis.axison]
    right = bar.get_window_extent().x0
    assert len(maps) >= 3 and all(axis.title.get_window_extent().x1 < right for axis in maps)
