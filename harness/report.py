"""results/<sweep>/*.json -> report.md, table.csv, table.tex and figures. A pure function of the folder; imports no torch.

Run: python -m harness.report results/<sweep>
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.api import ConfigError
from harness.reporting import claims, grid, plots, protocol, tables
from harness.reporting.paired import image_metrics
from harness.reporting.rows import SweepResults, comparable, load_sweep

log = logging.getLogger(__name__)

FIGURES = ("pareto.png", "pareto_dense.png", "grid.png", "keep_ratio.png", "training.png")


def write_report(results_dir: Path) -> Path:
    """Write the report of a results folder beside its results; returns the path of report.md.

    Raises ConfigError when the folder holds no sweep. Failed, partial and missing trials are rows of the report.
    """
    sweep = load_sweep(results_dir)
    figures = _figures(sweep)
    comparisons = claims.control_comparisons(sweep)
    sections = [
        _head(sweep), claims.summary(sweep, comparisons), "## Results\n\n" + tables.main_table(sweep),
        _picture(figures, "pareto.png", "Quality against compute and latency", _pareto_caption(sweep)),
        _picture(figures, "pareto_dense.png", "Drift from dense against compute and latency",
                 "The same against the dense model's own images: drift, not quality."),
        claims.control_section(sweep, comparisons), claims.ablation_section(sweep), _grid(figures), _maps(figures),
        _training(figures), _costs(sweep), protocol.protocol_section(sweep)]
    _write(sweep.folder / "table.csv", tables.csv_text(sweep))
    _write(sweep.folder / "table.tex", tables.latex_text(sweep))
    return _write(sweep.folder / "report.md", "\n\n".join(s for s in sections if s) + "\n")


def _write(path: Path, text: str) -> Path:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _figures(sweep: SweepResults) -> set[str]:
    """Draw what can be drawn; names of the files that exist now. Older figures that no longer apply are removed."""
    for name in FIGURES:
        (sweep.folder / name).unlink(missing_ok=True)
    second = next((name for name in image_metrics(sweep.rows) if name != sweep.quality), None)
    paths = [plots.pareto_figure(sweep, sweep.quality, sweep.folder / "pareto.png") if sweep.quality else None,
             plots.pareto_figure(sweep, second, sweep.folder / "pareto_dense.png") if second else None,
             grid.grid_figure(sweep, sweep.folder / "grid.png"),
             plots.heat_maps_figure(sweep, sweep.rows, sweep.folder / "keep_ratio.png"),
             plots.training_figure(sweep, sweep.folder / "training.png")]
    return {path.name for path in paths if path is not None}


def _picture(figures: set[str], name: str, title: str, caption: str) -> str:
    return f"![{title}]({name})\n\n*{caption}*" if name in figures else ""


def _head(sweep: SweepResults) -> str:
    counts = Counter(row.status for row in sweep.rows)
    lines = [f"# {sweep.name}", *([f"**{sweep.question}**"] if sweep.question else []),
             f"{len(sweep.rows)} trials: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + "."]
    holes = [f"- `{row.label}`: {row.note}" for row in sweep.rows if row.note]
    if holes:
        lines.append("**Not everything is here.** These trials are rows of the table and part of no ranking they lack numbers "
                     "for:\n\n" + "\n".join(holes))
    lines += [f"> {note}" for note in sweep.notes]
    if sweep.dense is None:
        lines.append("> **No finished dense trial**: there is no reference row to read the others against.")
    return "\n\n".join([*lines, _how_to_read(sweep)])


def _how_to_read(sweep: SweepResults) -> str:
    points = ["Compare rows of equal compute. FLOPs cuts are *executed*: counted over the tokens that were really computed.",
              "Brackets are 95 % intervals. **Bold** is the best of its budget, only where its interval is outside all others."]
    if any(row.contaminated for row in sweep.rows):
        points.append("† other work ran on the machine during this timing; it is in no ranking.")
    if any(row.missed_budget for row in sweep.rows):
        points.append("‡ executed compute is more than 1.5 points from the asked one; the row is in no budget's ranking.")
    if any("setting" in head for _, head, _ in tables.quality_columns(sweep)):
        points.append("A metric in several columns was measured with other sample counts, references or samplers: never compare "
                      "across.")
    if protocol.is_embedded(sweep):
        points.append(protocol.EMBEDDED)
    return "How to read it:\n\n" + "\n".join(f"- {point}" for point in points)


def _pareto_caption(sweep: SweepResults) -> str:
    if sweep.quality is None:
        return ""
    others = sum(map(len, comparable(sweep.rows, sweep.quality)[1:]))
    left_out = f" {others} row(s) with another reference or sample count are not drawn." if others else ""
    return (f"{plots.metric_title(sweep.quality)} against executed FLOPs cut and measured latency, with 95 % intervals. "
            "Dashed: dense. Left, points of the same cut are set side by side. Names tell what departs from a method's defaults."
            f"{left_out}")


def _grid(figures: set[str]) -> str:
    text = _picture(figures, "grid.png", "Pictures of every trial",
                    "Same seeds and prompts in every line; the columns are evenly spaced over the images, nobody picked them.")
    return f"## Pictures\n\n{text}" if text else ""


def _maps(figures: set[str]) -> str:
    text = _picture(figures, "keep_ratio.png", "Executed keep ratio by sampling step and block",
                    "Share of image tokens that each block's attention really computed, by sampling step (step 0 is pure noise).")
    return f"## Where the tokens went\n\n{text}" if text else ""


def _training(figures: set[str]) -> str:
    text = _picture(figures, "training.png", "Training curves",
                    "Training curves of the trained rows; series of more than 100 points are averaged into 100 bins.")
    return f"## Training\n\n{text}" if text else ""


def _costs(sweep: SweepResults) -> str:
    if not sweep.metrics:
        return ""
    return (f"## Cost in detail\n\n{tables.cost_table(sweep)}\n\nEvery number with every digit: `table.csv`. For a paper: "
            "`table.tex`.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m harness.report", description="Write the report of a results folder.")
    parser.add_argument("results", type=Path, help="results/<sweep>")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        log.info("%s", write_report(parser.parse_args(arguments).results))
    except ConfigError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
