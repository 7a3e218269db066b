"""The report's tables: markdown for people, CSV with every digit, LaTeX for papers. From rows alone."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from harness.api import disturbance
from harness.reporting.paired import clear_best
from harness.reporting.rows import CUT, LATENCY, Budget, Row, SweepResults, budgets, comparable, heading
from harness.reporting.seeds import seed_count

COSTS = ("compute/gflops_per_image", CUT, LATENCY, "memory/peak_mib")
"""Always printed together: FLOPs alone have sold many a method that was slower."""
QUALITY = ("fidelity", "dense", "prompt", "image", "other")
"""Groups of metrics that speak of images; all others speak of cost."""
ARROWS = {"lower": " ↓", "higher": " ↑", "none": ""}


def number(value: float | None, percent: bool = False) -> str:
    """Four significant digits, or a percentage with one decimal."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    if percent:
        return f"{100 * value:.1f} %"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 5)}f}"


def cell(row: Row, name: str) -> str:
    """Value with its interval, rounded to the interval's width; a disturbed timing carries a dagger.

    A mean over training seeds stands with the least and greatest value of a training instead: 'mean (least–greatest)'.
    """
    value, spread = row.value(name), row.spread(name)
    ends = spread or row.interval(name)
    if value is None:
        return f"unavailable: {row.unavailable(name)}" if row.unavailable(name) else "–"
    said = row.traits(name)
    percent, text = said.percent, number(value, said.percent)
    if ends is not None and not percent and all(map(math.isfinite, (value, *ends))) and (not spread or ends[0] < ends[1]):
        width = ends[1] - ends[0]
        digits = min(6, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 3
        low, high = f"{ends[0]:.{digits}f}", f"{ends[1]:.{digits}f}"
        text = f"{value:.{digits}f} " + (f"({low}–{high})" if spread else f"[{low}, {high}]")
    return text + (" †" if said.group == "latency" and row.contaminated else "")


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table; first column left, the others right."""
    rule = ["---", *["---:" for _ in heads[1:]]]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in [heads, rule, *lines])


def ordered(sweep: SweepResults) -> list[Row]:
    """Dense first, then by asked (else executed) cut, then as in the sweep; rows without numbers last."""
    rank = {row.trial_id: index for index, row in enumerate(sweep.rows)}

    def key(row: Row) -> tuple:
        cut = row.asked if row.asked is not None else row.cut
        return (not row.is_dense, cut is None, cut or 0.0, rank[row.trial_id])
    return sorted(sweep.rows, key=key)


def quality_columns(sweep: SweepResults) -> list[tuple[str, str, list[Row]]]:
    """(metric, head, rows) of each quality column; a metric measured in ways that cannot be compared gets several columns.

    Rows where it is unavailable are in its first column, which there is even when no row has a value.
    """
    columns = []
    for name in (name for name in sweep.metrics if sweep.traits(name).group in QUALITY):
        words = heading(sweep, name, brief=True)
        without = [row for row in sweep.rows if row.unavailable(name)]
        for index, rows in enumerate(comparable(sweep.rows, name) or [[]]):
            measure = rows[0].measure(name) if rows else {"better": "none"}
            count = f", n = {measure['n']}" if measure.get("n") and not _counted(words, measure["n"]) else ""
            setting = "" if index == 0 else f", setting {index + 1}"
            head = words + count + setting + ARROWS[measure["better"]]
            columns.append((name, head, rows + without if index == 0 else rows))
    return columns


def _counted(words: str, n: int) -> bool:
    """Whether a heading tells the sample count: 'fid_32', 'fid_5k'."""
    return words.endswith(f"_{n}") or (n % 1000 == 0 and words.endswith(f"_{n // 1000}k"))


def main_table(sweep: SweepResults) -> str:
    """One line per row: cost (FLOPs, latency and memory together), then quality; the clear best of a budget in bold."""
    groups, columns = budgets(sweep.rows), quality_columns(sweep)
    costs = [name for name in COSTS if name in sweep.metrics]
    best = {(name, id(rows)): _best(groups, name, rows) for name, _, rows in columns}
    best_latency = _best(groups, LATENCY, [row for row in sweep.rows if not row.contaminated])
    seeds = any(row.members for row in sweep.rows)
    heads = ["trial", *(["training seeds"] if seeds else []), "asked cut",
             *(heading(sweep, c) + ("" if c != LATENCY else " ↓") for c in costs), *(head for _, head, _ in columns)]
    lines = []
    for row in ordered(sweep):
        if row.status not in ("done", "partial"):
            lines.append([f"{row.label} — **{row.note}**", *[""] * (len(heads) - 1)])
            continue
        note = row.note or row.remark
        name = row.label + (f" — *{note}*" if note else "")
        asked = number(row.asked, True) + (" ‡" if row.missed_budget else "")
        line = [name, *([str(seed_count(row) or "–")] if seeds else []), asked]
        line += [_bold(cell(row, c), c == LATENCY and row.trial_id in best_latency) for c in costs]
        line += [_bold(cell(row, m), row.trial_id in best[m, id(rows)]) if any(row is r for r in rows) else "–"
                 for m, _, rows in columns]
        lines.append(line)
    return markdown(heads, lines)


def _best(groups: Sequence[Budget], name: str, rankable: Sequence[Row]) -> set[str]:
    allowed = {row.trial_id for row in rankable}
    winners = [clear_best([row for row in group.rows if row.trial_id in allowed], name) for group in groups]
    return {row.trial_id for row in winners if row is not None}


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def cost_table(sweep: SweepResults) -> str:
    """The remaining cost metrics, one line per trial."""
    names = [name for name in sweep.metrics if sweep.traits(name).group not in QUALITY and name not in (CUT, LATENCY)]
    rows = [row for row in ordered(sweep) if row.status in ("done", "partial")]
    heads = ["trial", "solved keep ratio", *(heading(sweep, n) for n in names)]
    solved = [(row.result.get("executed") or {}).get("keep_ratio_solved") for row in rows]
    return markdown(heads, [[row.label, number(k), *(cell(row, n) for n in names)] for row, k in zip(rows, solved, strict=True)])


_DISTURBED = {"clean": False, "disturbed": True, "unknown": "unknown"}


def csv_text(sweep: SweepResults) -> str:
    """One line per trial, in the sweep's order, every metric with `.lo` and `.hi`; numbers as in the JSON, digit for digit."""
    varied = list(dict.fromkeys(key for row in sweep.rows for key in row.varied))
    heads = ["trial_id", "label", "status", "note", "method", *varied, "asked_flops_cut", "timing_disturbed", "num_images"]
    heads += [name + end for name in sweep.metrics for end in ("", ".lo", ".hi")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(heads)
    for row in sweep.rows:
        line: list[Any] = [row.trial_id, row.label, row.status, row.note, row.method, *(row.varied.get(key) for key in varied),
                           row.asked, _DISTURBED[disturbance(row.environment)], row.num_images]
        for name in sweep.metrics:
            reason = row.unavailable(name)
            line += [f"unavailable: {reason}" if reason else row.value(name), *(row.interval(name) or (None, None))]
        writer.writerow(["" if value is None else repr(value) if isinstance(value, float) else value for value in line])
    return stream.getvalue()


def latex_text(sweep: SweepResults) -> str:
    """The main numbers as a booktabs table, without intervals; \\input it."""
    columns = quality_columns(sweep)
    costs = [name for name in COSTS if name in sweep.metrics]
    heads = ["trial", *(heading(sweep, c) for c in costs), *(head for _, head, _ in columns)]
    lines = []
    for row in ordered(sweep):
        cells = [number(row.value(c), row.traits(c).percent) for c in costs]
        cells += [cell(row, m) if row.unavailable(m) else number(row.value(m)) if any(row is r for r in rows) else "–"
                  for m, _, rows in columns]
        note = "" if row.status == "done" else f" ({row.status})"
        lines.append([row.label + note, *cells])
    body = "\n".join(" & ".join(map(_tex, line)) + r" \\" for line in lines)
    means = ", means over training seeds" if any(row.members for row in sweep.rows) else ""
    return (f"% {sweep.name}; generated by harness.report{means}, intervals in table.csv\n"
            f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}\n"
            f"\\toprule\n{' & '.join(map(_tex, heads))} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n")


_TEX = {"\\": r"\textbackslash ", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde ", "^": r"\textasciicircum ", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "–": "--",
        "∞": r"$\infty$", "−": "$-$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)
