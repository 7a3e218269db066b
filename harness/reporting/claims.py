"""What may be claimed, in words: who beats random_drop at equal compute, and what matters inside a method.

A sentence that rests on one training of a row says so itself: another training, on another processor too, may overturn it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.reporting.paired import Comparison, against_control, compare, corrected, image_metrics, intervals_overlap
from harness.reporting.rows import CONTROL, CUT, LATENCY, Row, SweepResults, budgets, heading
from harness.reporting.tables import ARROWS, cell, markdown, number
from harness.reporting.words import no_difference, one_training, over_seeds_words, p_words

UNEQUAL = 0.005
"""Executed cuts that differ by more than half a point are told with the verdict."""


OVER_SEEDS = ("Rows of several training seeds: the mean over seeds; interval and p are of a t test whose variance is that "
              "between trainings plus that over images. Trainings that overlap with the other row's value: nothing is claimed.")


@dataclass(frozen=True)
class Verdict:
    """One row against random_drop at its budget.

    beats: True in some metric, False in none, None when nothing was compared. mixed: better in one metric, worse in another.
    """

    row: Row
    beats: bool | None
    sentence: str
    mixed: bool = False


# ---------------------------------------------------------------------------------------------- against chance


def control_comparisons(sweep: SweepResults) -> list[Comparison]:
    """Every row against random_drop at its budget, in every metric with values per image; one Holm family."""
    return against_control(budgets(sweep.rows), image_metrics(sweep.rows))


TOO_FEW = " *too few images*: all of them differ the same way, and no test of so few could have said more."


def control_section(sweep: SweepResults, comparisons: Sequence[Comparison]) -> str:
    """The table of differences and one plain sentence per row; '' when the sweep has no competitors."""
    title = "## Does it beat chance?\n\n"
    competitors = [row for group in budgets(sweep.rows) for row in group.rows if row.method != CONTROL]
    if not comparisons:
        why = (f"no `{CONTROL}` row shares a budget with another method" if image_metrics(sweep.rows) else
               "no metric has values per image")
        return f"{title}Not answered by this sweep: {why}." if competitors else ""
    compared = {c.row.trial_id for c in comparisons}
    without = [f"`{row.label}`" for row in competitors if row.trial_id not in compared]
    text = [f"Difference to `{CONTROL}` at the same budget over the same images: 95 % interval of the paired mean, p "
            f"of a sign-flip test, Holm-corrected over {len(comparisons)} comparisons. *not shown*: no difference shown at 5 %, "
            "which is not that there is none."
            + (TOO_FEW if any(c.too_few for c in comparisons) else "")
            + (" " + OVER_SEEDS if any(c.apart is not None for c in comparisons) else ""),
            _control_table(comparisons),
            "\n".join(f"- {verdict.sentence}" for verdict in verdicts(sweep, comparisons))]
    if without:
        text.append(f"No `{CONTROL}` at the budget of {', '.join(without)}: nothing is claimed about them.")
    return title + "\n\n".join(text)


def _by_row(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault(c.row.trial_id, []).append(c)
    return list(groups.values())


def _control_table(comparisons: Sequence[Comparison]) -> str:
    metrics = dict.fromkeys(c.metric for c in comparisons)
    told = {c.metric: c for c in sorted(comparisons, key=lambda c: not c.refused)}  # one that was made, where there is any
    heads = [heading(c.row, c.metric) + ("" if c.refused else f" (n = {c.n}){ARROWS[c.better]}") for c in map(told.get, metrics)]
    lines = []
    for mine in _by_row(comparisons):
        row, control = mine[0].row, mine[0].other
        cells = {c.metric: _difference(c) for c in mine}
        cuts = f"{number(row.cut, True)} / {number(control.cut, True)}"
        lines.append([row.label, cuts, *(cells.get(m, "–") for m in metrics)])
    return markdown(["trial", f"FLOPs cut / of {CONTROL}", *heads], lines)


def _difference(c: Comparison) -> str:
    if c.refused:
        return f"not compared: {c.refused}"
    word = "too few images" if c.too_few else {"better": "**better**", "worse": "worse", "noise": "not shown"}[c.verdict]
    overlap = " (seeds overlap)" if c.apart is False else ""
    return f"{c.difference:+.3g} [{c.low:+.3g}, {c.high:+.3g}], {p_words(c.p)} {word}{overlap}"


def verdicts(sweep: SweepResults, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """One verdict per compared row, in the order of budgets."""
    return [_verdict(sweep, mine) for mine in _by_row(comparisons)]


def _verdict(sweep: SweepResults, mine: Sequence[Comparison]) -> Verdict:
    row, control = mine[0].row, mine[0].other
    found: dict[str, list[str]] = {"better": [], "worse": [], "noise": [], "few": [], "refused": []}
    for name, outcome in [_outcome(c) for c in mine] + _headline(sweep, row, control):
        found[outcome].append(name)
    words = {outcome: "; ".join(names) for outcome, names in found.items()}
    if not any(words[outcome] for outcome in ("better", "worse", "noise", "few")):
        return Verdict(row, None, f"`{row.label}` could not be compared with `{CONTROL}`.")
    heads = {"worse": "worse in", "noise": "in", "few": "too few images to tell in", "refused": "not comparable in"}
    lost = "; ".join(f"{head} {words[outcome]}" for outcome, head in heads.items() if words[outcome])
    once = ", from one training, which another may overturn" if one_training(row, control) else ""
    if not words["better"]:
        sentence = f"**`{row.label}` is not shown to beat `{CONTROL}`** at the same budget{once}: {lost}."
    else:
        sentence = f"`{row.label}` beats `{CONTROL}` in {words['better']}{once}" + (f"; but {lost}." if lost else ".")
    if abs(row.cut - control.cut) > UNEQUAL:
        sentence += f" It executed {number(row.cut, True)} fewer FLOPs, `{CONTROL}` {number(control.cut, True)}."
    return Verdict(row, bool(words["better"]), sentence, bool(words["better"] and words["worse"]))


def _outcome(c: Comparison) -> tuple[str, str]:
    """(what is said of one metric, outcome)."""
    name = heading(c.row, c.metric)
    if c.refused or c.verdict != "noise":
        return name, c.verdict
    return (f"{name}", "few") if c.too_few else (f"{name} {no_difference(c)}", "noise")


def _headline(sweep: SweepResults, row: Row, control: Row) -> list[tuple[str, str]]:
    """(name, outcome) of the headline metric where it has no values per image and only its intervals can speak."""
    name = sweep.quality
    overlap = None if name is None or row.per_image(name) else intervals_overlap(row, control, name)
    if overlap is None:
        return []
    ahead = (row.value(name) < control.value(name)) == (row.measure(name)["better"] == "lower")
    short = heading(sweep, name, brief=True)
    if overlap:
        return [(f"{short} no difference shown ({cell(row, name)} and {cell(control, name)}, intervals overlap)", "noise")]
    return [(f"{short} (intervals apart)", "better" if ahead else "worse")]


# ---------------------------------------------------------------------------------------------- in short


def summary(sweep: SweepResults, comparisons: Sequence[Comparison]) -> str:
    """A few lines for who reads nothing else; '' when there is nothing to say."""
    found, lines = verdicts(sweep, comparisons), []
    heads = {(True, False): f"Beat `{CONTROL}` at equal compute in at least one measure and lose in none",
             (True, True): f"**Better than `{CONTROL}` in one measure and worse in another**",
             (False, False): f"**Not shown to beat `{CONTROL}`**"}
    for outcome, head in heads.items():
        mine = [verdict for verdict in found if (verdict.beats, verdict.mixed) == outcome]
        for once in (False, True):
            names = [f"`{one.row.label}`" for one in mine if one_training(one.row, *_controls(comparisons, one.row)) == once]
            if names:
                lines.append(f"- {head}{ONE_TRAINING if once else ''}, on the machine of this sweep: {', '.join(names)}.")
    saving = [row for row in sweep.rows if row.interval(LATENCY) and (row.cut or 0) > UNEQUAL]
    timed = [row for row in saving if not row.contaminated]
    no_gain = [f"`{row.label}` ({cell(row, LATENCY)})" for row in timed if row.interval(LATENCY)[1] >= 1]
    if no_gain:
        lines.append(f"- **Fewer FLOPs, no speed-up over dense shown** on the machine of this sweep: {', '.join(no_gain)}.")
    elif timed:
        lines.append("- Every row with a clean timing that saves FLOPs also saves time on the machine of this sweep (the whole "
                     "interval of its ratio is below 1).")
    if unsure := [row for row in sweep.rows if row.value(LATENCY) is not None and not row.interval(LATENCY)]:
        lines.append(f"- {len(unsure)} timings have too few rounds for an interval: nothing is claimed about their speed.")
    if len(timed) < len(saving):
        lines.append(f"- {len(saving) - len(timed)} of {len(saving)} timings were disturbed by other work, or may have been (†): "
                     "nothing is claimed about their speed.")
    return "## In short\n\n" + "\n".join(lines) if lines else ""


ONE_TRAINING = " after **one training** of each, which another may overturn"


def _controls(comparisons: Sequence[Comparison], row: Row) -> list[Row]:
    return [c.other for c in comparisons if c.row is row]


# ---------------------------------------------------------------------------------------------- ablations


def ablation_section(sweep: SweepResults) -> str:
    """For each option that varied within a method: rows that differ in that option only, against that with its default."""
    parts = []
    for method in sweep.methods:
        rows = [row for row in sweep.rows if row.method == method and row.status in ("done", "partial")]
        for key in dict.fromkeys(key for row in rows for key in row.varied):
            sets = [] if key in ("method", "method.name") or key.startswith("budget") else only_differ_in(rows, key)
            if sets:
                default = sweep.defaults.get(method, {})
                parts.append(_ablation_part(sweep, method, key, [based(group, key, default) for group in sets]))
    head = "## What matters inside a method\n\nEach table holds everything else equal; other values are compared with the first."
    return f"{head}\n\n" + "\n\n".join(parts) if parts else ""


def only_differ_in(rows: Sequence[Row], key: str) -> list[list[Row]]:
    """Sets of at least two rows whose varied options agree in everything but `key`, in the order of the sweep."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        rest = {k: v for k, v in row.varied.items() if k != key}
        sets.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    return [group for group in sets.values() if len({json.dumps(row.varied.get(key)) for row in group}) > 1]


def based(group: Sequence[Row], key: str, defaults: Mapping[str, Any]) -> list[Row]:
    """The rows, the baseline first: that with the default of `key`, else the first of the sweep; others by value."""
    baseline = next((row for row in group if key in defaults and row.varied.get(key) == defaults[key]), group[0])
    return [baseline, *sorted((row for row in group if row is not baseline), key=lambda row: _sortable(row.varied.get(key)))]


def _sortable(value: object) -> tuple:
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else 0, str(value))


def _ablation_part(sweep: SweepResults, method: str, key: str, sets: list[list[Row]]) -> str:
    image_metric = image_metrics(sweep.rows)[:1]
    metrics = list(dict.fromkeys([m for m in (sweep.quality, *image_metric) if m]))
    shown = [*metrics, *(c for c in (CUT, LATENCY) if c in sweep.metrics)]
    short, defaults = key.rsplit(".", 1)[-1], sweep.defaults.get(method, {})
    lines = [[_shown(row.varied, key) + (" (default)" if key in defaults and row.varied.get(key) == defaults[key] else ""),
              _rest(row.varied, key), *(cell(row, name) for name in shown)] for group in sets for row in group]
    table = markdown([short, "with", *(heading(sweep, name, brief=True) for name in shown)], lines)
    claims = _against_baseline(sets, key, image_metric[0], sweep.quality) if image_metric else []
    return f"### {method}: {short}\n\n{table}" + ("\n\n" + "\n".join(f"- {claim}" for claim in claims) if claims else "")


def _shown(varied: Mapping, key: str) -> str:
    return str(varied.get(key, "–"))


def _rest(varied: Mapping, key: str) -> str:
    rest = [f"{k.rsplit('.', 1)[-1]} {v}" for k, v in varied.items() if k not in (key, "method", "method.name")]
    return ", ".join(rest) or "–"


def _against_baseline(sets: Sequence[Sequence[Row]], key: str, metric: str, quality: str | None) -> list[str]:
    """Each level against the first of its set, paired by image, Holm over the option."""
    comparisons = [compare(row, group[0], metric) for group in sets for row in group[1:] if row.value(metric) is not None]
    return [_ablation_line(c, key, quality) for c in corrected(comparisons)]


def _ablation_line(c: Comparison, key: str, quality: str | None) -> str:
    levels = (f"{key.rsplit('.', 1)[-1]} {_shown(c.row.varied, key)} against {_shown(c.other.varied, key)} "
              f"({_rest(c.row.varied, key)})")
    name = heading(c.row, c.metric)
    if c.refused:
        return f"{levels}: not compared, {c.refused}."
    outcome = f"**{no_difference(c)}**" if c.verdict == "noise" else f"{c.verdict} by {abs(c.difference):.3g}"
    overlap = intervals_overlap(c.row, c.other, quality) if quality and quality != c.metric else None
    tail = "" if overlap is None else f"; {heading(c.row, quality, brief=True)} intervals {'overlap' if overlap else 'are apart'}"
    return f"{levels}: {name} {outcome} ({p_words(c.p)}{over_seeds_words(c)}){tail}."
