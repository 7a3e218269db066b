"""Every row against dense in the measures that judge images on their own: as good, worse, or not to be told.

A gap that no test finds is not yet equivalence: with few images no test finds anything. So each measure has a window
around dense, and a row is *equivalent* only where the whole interval of the gap lies inside.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.reporting.paired import Comparison, compare_any, corrected
from harness.reporting.rows import Row, SweepResults, heading
from harness.reporting.tables import markdown, number, ordered
from harness.reporting.words import one_training, p_words

GROUPS = ("fidelity", "prompt", "image")
WORDS = {"better": "**better**", "worse": "worse", "noise": "no difference shown"}


def window(dense: Row, name: str) -> float:
    """Half width of the window of measure `name` around the value of dense, as the measure says."""
    kind, size = dense.traits(name).window or ("share", 0.0)
    return size * abs(dense.value(name)) if kind == "share" else size


def equivalent(c: Comparison) -> bool:
    """Whether the whole 95 % interval of the gap lies inside the window (stricter than two one-sided tests at 5 %)."""
    half = window(c.other, c.metric) if not c.refused else 0.0
    return not c.refused and -half < c.low and c.high < half


def dense_comparisons(sweep: SweepResults) -> list[Comparison]:
    """Every finished row against dense in every measure that dense has too, once: not extrapolated again. One Holm family."""
    if sweep.dense is None:
        return []
    names = [name for name in sweep.metrics if sweep.traits(name).group in GROUPS and sweep.traits(name).window
             and sweep.dense.value(name) is not None]
    rows = [row for row in ordered(sweep) if not row.is_dense and row.status in ("done", "partial")]
    return corrected([_compared(row, sweep.dense, name) for row in rows for name in names if row.value(name) is not None])


def _compared(row: Row, dense: Row, name: str) -> Comparison:
    """Paired by image where the metric recorded it: per image, or as a gap of distances with its permutation test."""
    gap = row.notes(name).get("to_dense")
    found = compare_any(row, dense, name)
    if not gap or gap["p"] is None or row.members or found.refused:
        return found
    return Comparison(row, dense, name, gap["difference"], *gap["interval"], gap["p"], found.n, found.better)


def dense_section(sweep: SweepResults) -> str:
    """The table of gaps, and the spread of distances over halves of the images; '' when there is nothing to compare."""
    comparisons = dense_comparisons(sweep)
    if not comparisons:
        return ""
    names = list(dict.fromkeys(c.metric for c in comparisons))
    heads = [f"{heading(sweep, name, brief=True)}, window ±{number(window(sweep.dense, name))}" for name in names]
    cells = {(c.row.trial_id, c.metric): _cell(c) for c in comparisons}
    rows = list({c.row.trial_id: c.row for c in comparisons}.values())
    table = markdown(["trial minus dense", *heads], [[row.label, *(cells.get((row.trial_id, name), _absent(row, name))
                                                                for name in names)] for row in rows])
    text = ("Gap to dense with its 95 % interval and p, Holm-corrected over "
            f"{len(comparisons)} comparisons: paired by image where the metric has values per image (sign-flip test) or records "
            "its gap (the two models' images swapped at random), else from the rows' own intervals. *Equivalent*: the whole "
            "interval is inside the window. *No difference shown*: neither a gap nor equivalence is shown; more images may tell. "
            "All of it holds for the trainings and the machine of this sweep" + _once(rows) + ".")
    return "\n\n".join(part for part in ("## As good as dense?", text, table, _halves(sweep, names)) if part)


def _absent(row: Row, name: str) -> str:
    reason = row.unavailable(name)
    return f"unavailable: {reason}" if reason else "–"


def _cell(c: Comparison) -> str:
    if c.refused:
        return f"not compared: {c.refused}"
    words = WORDS[c.verdict]
    if equivalent(c):
        words = "**equivalent**" + ("" if c.verdict == "noise" else f", though {c.verdict}")
    return f"{c.difference:+.3g} [{c.low:+.3g}, {c.high:+.3g}], {p_words(c.p)} {words}"


def _once(rows: Sequence[Row]) -> str:
    once = [f"`{row.label}`" for row in rows if one_training(row)]
    return f"; from one training each, which another may overturn: {', '.join(once)}" if once else ""


def _halves(sweep: SweepResults, names: Sequence[str]) -> str:
    """'mean ± SD' of each distance over seeded halves of the images, where the metric recorded it."""
    rows = [row for row in ordered(sweep) if row.status in ("done", "partial")]
    names = [name for name in names if any(row.notes(name).get("subsets") for row in rows)]
    if not names:
        return ""
    first = next(row.notes(name)["subsets"] for name in names for row in rows if row.notes(name).get("subsets"))
    lines = [[row.label, *(_half(row, name) for name in names)] for row in rows]
    return (f"Over {first['count']} random halves ({first['size']} images, so more biased than the whole), mean ± SD:\n\n"
            + markdown(["trial", *(heading(sweep, name, brief=True) for name in names)], lines))


def _half(row: Row, name: str) -> str:
    found = row.notes(name).get("subsets")
    return f"{number(found['mean'])} ± {number(found['sd'])}" if found and row.value(name) is not None else _absent(row, name)
