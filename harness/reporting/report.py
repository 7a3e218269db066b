"""results/<sweep>/*.json -> report.md, report.html, tables and figures. A pure function of the folder; imports no torch.

Run: python -m harness.report results/<sweep>
     python -m harness.report results/<sweep> results/<other> --out results/merged
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.api import ConfigError, require
from harness.reporting import claims, curves, equivalence, grid, html, pictures, plots, protocol, score_maps, search, tables
from harness.reporting.markup import as_markdown, mark, marked
from harness.reporting.merge import differences, merge
from harness.reporting.paired import image_metrics
from harness.reporting.paper import paper_section
from harness.reporting.rows import LATENCY, SweepResults, comparable, load_sweep, title
from harness.reporting.seeds import over_seeds
from harness.reporting.words import one_training
from harness.storage.durable import is_within, put_text

log = logging.getLogger(__name__)

FIGURES = ("pareto.png", "pareto_dense.png", search.FIGURE, "grid.png", "keep_ratio.png", "training.png", "validation.png",
           "score_histograms.png")
SCORE_MAPS = "scores_*.png"


def write_report(results_dir: Path) -> Path:
    """Write the report of a results folder beside its results; returns the path of report.md.

    Raises ConfigError when the folder holds no sweep. Failed, partial and missing trials are rows of the report.
    """
    return _write_one(load_sweep(results_dir))


def write_merged(folders: Sequence[Path], out: Path) -> Path:
    """Write one report of several sweeps into `out`; returns the path of report.md.

    Rows of different protocols (see `merge`) are separate parts of it, each with its tables and figures in `out`/setting-<i>.
    """
    sweeps = merge(folders, out)
    if len(sweeps) == 1:
        return _write_one(sweeps[0])
    parts = [_part(replace(sweep, name=f"Setting {index}: {sweep.name}", folder=out / f"setting-{index}"))
             for index, sweep in enumerate(sweeps, 1)]
    title = out.name
    intro = (f"# {mark(title)}\n\n**The sweeps were run under {len(sweeps)} protocols. Rows of one are never ranked with rows of "
             f"another**: each protocol has its own tables below.\n\n{differences([marked(sweep) for sweep in sweeps])}")
    text = [intro, *(_linked(part) for part in parts)]
    _write(out / "report.html", html.page(title, parts, intro))
    return _write(out / "report.md", as_markdown("\n\n".join(text)) + "\n")


def _linked(part: html.Part) -> str:
    """The part's sections, its figures linked from the folder above."""
    names = "|".join(map(re.escape, part.figures))
    text = "\n\n".join(part.sections)
    return re.sub(rf"\]\(({names})\)", rf"]({part.sweep.folder.name}/\1)", text) if names else text


def _write_one(trials: SweepResults) -> Path:
    part = _part(trials)
    _write(trials.folder / "report.html", html.page(trials.name, [part]))
    return _write(trials.folder / "report.md", as_markdown("\n\n".join(part.sections)) + "\n")


def _part(trials: SweepResults) -> html.Part:
    """Draw the figures and write the tables of rows under one protocol; their sections, for both reports."""
    trials.folder.mkdir(parents=True, exist_ok=True)
    sweep = over_seeds(trials)  # one row per setting from here on; every trial has its line in table.csv and at the end
    figures = _figures(sweep) | _front_figure(trials)
    sections = _sections(marked(trials), marked(sweep), figures)
    _write(sweep.folder / "table.csv", tables.csv_text(trials))
    _write(sweep.folder / "table.tex", tables.latex_text(sweep))
    return html.Part(trials, sweep, [section for section in sections if section], figures)


def _sections(trials: SweepResults, sweep: SweepResults, figures: set[str]) -> list[str]:
    """The report in markdown, from rows whose texts are marked (see `markup`)."""
    comparisons = claims.control_comparisons(sweep)
    return [
        _head(trials, sweep), claims.summary(sweep, comparisons), paper_section(sweep), _results(sweep),
        _picture(figures, "pareto.png", f"Quality against {_costs_drawn(sweep)}", _pareto_caption(sweep)),
        _picture(figures, "pareto_dense.png", f"Drift from dense against {_costs_drawn(sweep)}",
                 "The same against the dense model's own images: drift, not quality."),
        search.search_section(trials, search.FIGURE in figures),
        claims.control_section(sweep, comparisons), equivalence.dense_section(sweep), claims.ablation_section(sweep),
        _grid(figures), _maps(figures),
        _scores(figures, sweep), _training(figures), _costs(sweep), _every_trial(trials, sweep),
        protocol.protocol_section(trials)]


def _write(path: Path, text: str) -> Path:
    put_text(path, text)
    return path


def _figures(sweep: SweepResults) -> set[str]:
    """Draw what can be drawn; names of the files that exist now. Older figures that no longer apply are removed."""
    for path in [*(sweep.folder / name for name in FIGURES), *sweep.folder.glob(SCORE_MAPS)]:
        path.unlink(missing_ok=True)
    scores = score_maps.stored_scores(sweep)
    drift = (name for name in image_metrics(sweep.rows) if sweep.traits(name).group == "dense" and name != sweep.quality)
    second = next(drift, None)
    paths = [plots.pareto_figure(sweep, sweep.quality, sweep.folder / "pareto.png") if sweep.quality else None,
             plots.pareto_figure(sweep, second, sweep.folder / "pareto_dense.png") if second else None,
             grid.grid_figure(sweep, sweep.folder / "grid.png"),
             plots.heat_maps_figure(sweep, sweep.rows, sweep.folder / "keep_ratio.png"),
             curves.training_figure(sweep.rows, sweep.folder / "training.png"),
             curves.validation_figure(sweep.rows, sweep.folder / "validation.png"),
             score_maps.histogram_figure(scores, sweep.folder / "score_histograms.png"),
             *(score_maps.score_maps_figure(one, sweep.folder / _score_maps_name(one.row.trial_id)) for one in scores)]
    return {path.name for path in paths if path is not None}


def _front_figure(trials: SweepResults) -> set[str]:
    """The front of a search, of which every trial is a point, whatever its training seed."""
    path = search.front_figure(trials, trials.folder / search.FIGURE)
    return {path.name} if path else set()


def _score_maps_name(trial_id: str) -> str:
    return SCORE_MAPS.replace("*", trial_id)


def _picture(figures: set[str], name: str, title: str, caption: str) -> str:
    return f"![{title}]({name})\n\n*{caption}*" if name in figures else ""


def _head(trials: SweepResults, sweep: SweepResults) -> str:
    counts = Counter(row.status for row in trials.rows)
    settings = f" of {len(sweep.rows)} settings" if len(sweep.rows) < len(trials.rows) else ""
    lines = [f"# {sweep.name}", *([f"**{sweep.question}**"] if sweep.question else []),
             f"{len(trials.rows)} trials{settings}: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + "."]
    holes = [f"- `{row.label}`: {row.note}" for row in trials.rows if row.note and row.status != "stopped"]
    if holes:
        lines.append("**Not everything is here.** These trials are rows of the table and part of no ranking they lack numbers "
                     "for:\n\n" + "\n".join(holes))
    if missing := trials.unavailable:
        lines.append("**Not everything could be measured:**\n\n" + "\n".join(
            f"- `{name.rpartition('/')[2]}`: unavailable: {reason} ({len(rows)} of {len(trials.rows)} trials)"
            for name, reasons in missing.items() for reason, rows in reasons.items()))
    if lost := pictures.lost(trials):
        lines.append("**Some pictures cannot be read** and are in no figure; the numbers are whole. Run the sweep again to have "
                     "them made again:\n\n" + "\n".join(lost))
    lines += [f"> {note}" for note in sweep.notes]
    if sweep.dense is None:
        lines.append("> **No finished dense trial**: there is no reference row to read the others against.")
    return "\n\n".join([*lines, _how_to_read(sweep)])


def _results(sweep: SweepResults) -> str:
    title = "Results over training seeds" if _seeded(sweep) else "Results"
    return f"## {title}\n\n{tables.main_table(sweep)}"


def _seeded(sweep: SweepResults) -> bool:
    return any(row.members for row in sweep.rows)


def _how_to_read(sweep: SweepResults) -> str:
    points = ["Compare rows of equal compute. FLOPs cuts are *executed*: counted over the tokens that were really computed.",
              "Brackets are 95 % intervals; those of a distance hold what it is on average at this number of images. **Bold** is "
              "the best of its budget, only where its interval is outside all others"
              + (" (a row that was trained once rests on that training)." if one_training(*sweep.rows) else ".")]
    if _seeded(sweep):
        points.append("Rows of several **training seeds** are means over them, with the (least–greatest) training in round "
                      "brackets. Two settings whose trainings overlap are not told apart. Three trainings against three lie "
                      "apart by chance in 1 of 10 cases, so p must be small too.")
    if any(row.contaminated for row in sweep.rows):
        points.append("† other work ran on the machine during this timing, or the machine does not tell whether any did "
                      "(`timing_disturbed` in table.csv is then `unknown`); it is in no ranking. On a quiet machine, "
                      "`python -m harness.run SWEEP.yaml --retake` takes it again.")
    if any(row.missed_budget for row in sweep.rows):
        points.append("‡ executed compute is more than 1.5 points from the asked one; the row is in no budget's ranking.")
    if any("setting" in head for _, head, _ in tables.quality_columns(sweep)):
        points.append("A metric in several columns was measured with other sample counts, references or samplers: never compare "
                      "across.")
    points += _other_references(sweep)
    if protocol.is_embedded(sweep):
        points.append(protocol.EMBEDDED)
    return "How to read it:\n\n" + "\n".join(f"- {point}" for point in points)


def _other_references(sweep: SweepResults) -> list[str]:
    """A warning that names the real images, where rows were compared with different ones."""
    ids = {name: sorted({str(row.notes(name)["reference_id"]) for row in sweep.rows if row.notes(name).get("reference_id")})
           for name in sweep.metrics}
    told = "; ".join(f"{name} against {' and '.join(f'`{one}`' for one in found)}" for name, found in ids.items()
                     if len(found) > 1)
    return [f"**The real images differ between rows**: {told}. Each has a column of its own, and rows of different references "
            "are never ranked together, for a distance means nothing against another reference."] if told else []


def _pareto_caption(sweep: SweepResults) -> str:
    if sweep.quality is None:
        return ""
    others = sum(map(len, comparable(sweep.rows, sweep.quality)[1:]))
    left_out = f" {others} row(s) with another reference or sample count are not drawn." if others else ""
    return (f"{title(sweep, sweep.quality)} against {_costs_drawn(sweep)}, with 95 % intervals. "
            f"{_spread_words(sweep)}Dashed: dense. Points of the same cut are set side by side. Names tell what departs "
            "from a method's defaults."
            f"{left_out}")


def _costs_drawn(sweep: SweepResults) -> str:
    timed = any(row.value(LATENCY) is not None for row in sweep.rows)
    return "executed FLOPs cut and measured latency" if timed else "executed FLOPs cut"


def _spread_words(sweep: SweepResults) -> str:
    return "Bars of trained rows: least to greatest over training seeds. " if _seeded(sweep) else ""


def _grid(figures: set[str]) -> str:
    text = _picture(figures, "grid.png", "Pictures of every trial",
                    "Same seeds and prompts in every line; the columns are evenly spaced over the images, nobody picked them.")
    return f"## Pictures\n\n{text}" if text else ""


def _maps(figures: set[str]) -> str:
    text = _picture(figures, "keep_ratio.png", "Executed keep ratio by sampling step and block",
                    "Share of image tokens that each block's attention really computed, by sampling step (step 0 is pure noise).")
    return f"## Where the tokens went\n\n{text}" if text else ""


def _scores(figures: set[str], sweep: SweepResults) -> str:
    maps = [_picture(figures, _score_maps_name(row.trial_id), f"Score maps of {row.label}",
                     f"{row.label}: router scores on the trial's first picture, by block (to the right) and sampling step "
                     "(downwards), standardised within each map; below each, the share of tokens kept there.")
            for row in sweep.rows]
    histograms = _picture(figures, "score_histograms.png", "Histograms of router scores",
                          "Router scores over tokens, blocks and the saved pictures, standardised within each map; a line per "
                          "sampling step, coloured by its noise level. Values beyond 3 SD are in the outermost bin.")
    text = "\n\n".join(part for part in (histograms, *maps) if part)
    first = " Of a setting with several training seeds, the first is shown." if _seeded(sweep) else ""
    return f"## What the router looks at\n\nA picture is not evidence: nobody picked these.{first}\n\n{text}" if text else ""


def _training(figures: set[str]) -> str:
    parts = [_picture(figures, "validation.png", "Validation loss over training",
                      "Validation loss over training, without noise on scores or ratios, on the same images, noise and timesteps "
                      "for every row. Line: mean over training seeds, band: least to greatest. Rows computed different "
                      "shares of the tokens on the way (last panel); only the sampled model meets the budget exactly."),
             _picture(figures, "training.png", "Training curves",
                      "Training curves of the trained rows: mean over training seeds, band from least to greatest; series of "
                      "more than 100 points are averaged into 100 bins.")]
    text = "\n\n".join(part for part in parts if part)
    return f"## Training\n\n{text}" if text else ""


def _every_trial(trials: SweepResults, sweep: SweepResults) -> str:
    return f"## Every trial\n\n{tables.main_table(trials)}" if len(sweep.rows) < len(trials.rows) else ""


def _costs(sweep: SweepResults) -> str:
    if not sweep.metrics:
        return ""
    return (f"## Cost in detail\n\n{tables.cost_table(sweep)}\n\nEvery number with every digit: `table.csv`. For a paper: "
            "`table.tex`.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m harness.report", description="Write the report of a results folder, or one "
                                     "report of several.")
    parser.add_argument("results", type=Path, nargs="+", help="results/<sweep>, one or several")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report of several sweeps, such as results/merged")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        require(len(options.results) == 1 or options.out is not None,
                "several results folders: say where their report goes, such as --out results/merged")
        log.info("%s", write_merged(options.results, options.out) if options.out else write_report(options.results[0]))
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        folders = [*options.results, *([options.out] if options.out else [])]
        if not any(is_within(error, folder) for folder in folders):
            raise
        log.error("%s: %s. A report is written beside its results: take away what is in the way, give yourself the right to "
                  "write there, or copy the results", error.filename, error.strerror)
        return 2
    return 0
