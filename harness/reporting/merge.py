"""Several sweeps as one report: equal trials once, and only rows of one protocol together.

A protocol is what `protocol.SETTINGS` and the seeds say of a row: backbone, sampler, data, seeds; and the reference its images
were measured against. Rows that differ there are kept apart as wholes, for sections such as the front, the paired tests and the
best of a budget speak of all rows of a report at once. Within a protocol `Row.comparison_key` still guards single metrics: rows
that differ in threads, which change times only, share a table but no column of times.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.api import require
from harness.reporting.markup import mark
from harness.reporting.protocol import SETTINGS, flat
from harness.reporting.rows import Row, SweepResults, load_sweep
from harness.reporting.tables import markdown
from harness.storage.durable import unwritable

PROTOCOL = tuple(key for key in SETTINGS if key != "threads") + ("seeds",)
NOT_A_SETTING = (*PROTOCOL, "metrics", "threads")
MEASURED_ANEW = ("latency", "memory")
"""Groups of metrics that differ between two measurements of the same trial by nature."""


@dataclass
class _Group:
    """Rows of one protocol, each with the name of its sweep. references: {metric: reference id}."""

    protocol: str
    references: dict[str, str]
    rows: list[tuple[str, Row]]


def merge(folders: Sequence[Path], out: Path) -> list[SweepResults]:
    """One SweepResults per protocol, the largest first, to be reported in `out`.

    Raises ConfigError for a folder that holds no sweep or is named twice, and when `out` is a sweep's own folder.
    """
    require(len({folder.resolve() for folder in folders}) == len(folders), "a results folder is named twice")
    wrong = unwritable(out)
    require(not wrong, f"--out {out}: {wrong}; name a folder that you may write to")
    require(not (out / "sweep.json").exists() and out.resolve() not in {folder.resolve() for folder in folders},
            f"--out {out} is a sweep's own folder; its report would be overwritten. Name another, such as results/merged")
    sweeps = {_name(folder, folders): load_sweep(folder) for folder in folders}
    groups: list[_Group] = []
    for name, sweep in sweeps.items():
        for row in sweep.rows:
            if row.trial:
                _put(groups, name, _anchored(row, sweep.folder))
    for name, sweep in sweeps.items():  # a row without a file has no protocol: it stays with most rows of its sweep
        strays = [row for row in sweep.rows if not row.trial]
        home = max(groups, key=lambda group, name=name: sum(n == name for n, _ in group.rows), default=None)
        require(home is not None, "none of the sweeps holds a readable result")
        home.rows += [(name, row) for row in strays]
    groups.sort(key=lambda group: -len(group.rows))
    return [_merged(group, sweeps, out) for group in groups]


def _name(folder: Path, folders: Sequence[Path]) -> str:
    alone = sum(other.name == folder.name for other in folders) == 1
    return folder.name if alone else f"{folder.parent.name}/{folder.name}"


def _anchored(row: Row, folder: Path) -> Row:
    """The row with artifacts that are found from any folder."""
    paths = {name: str((folder / path).resolve()) for name, path in (row.result.get("artifacts") or {}).items()}
    return replace(row, result={**row.result, "artifacts": paths})


# ---------------------------------------------------------------------------------------------- one protocol


def _put(groups: list[_Group], name: str, row: Row) -> None:
    protocol, references = json.dumps({key: row.trial.get(key) for key in PROTOCOL}, sort_keys=True), _references(row)
    for group in groups:
        if group.protocol == protocol and all(group.references.get(key, value) == value for key, value in references.items()):
            group.references.update(references)
            group.rows.append((name, row))
            return
    groups.append(_Group(protocol, references, [(name, row)]))


def _references(row: Row) -> dict[str, str]:
    """{metric: id of the reference images it was measured against}."""
    notes = {name: row.notes(name).get("reference_id") for name in row.result.get("metrics") or {}}
    return {name: str(value) for name, value in notes.items() if value is not None}


def differences(sweeps: Sequence[SweepResults]) -> str:
    """A table of what tells the protocols apart."""
    flats = [flat({**{key: row.trial.get(key) for key in PROTOCOL}, "reference": _all_references(sweep)})
             for sweep in sweeps for row in [next(row for row in sweep.rows if row.trial)]]
    keys = [key for key in dict.fromkeys(key for one in flats for key in one) if len({str(one.get(key)) for one in flats}) > 1]
    lines = [[f"setting {i + 1}", str(len(sweep.rows)), *(str(one.get(key, "–")) for key in keys)]
             for i, (sweep, one) in enumerate(zip(sweeps, flats, strict=True))]
    return markdown(["protocol", "rows", *keys], lines)


def _all_references(sweep: SweepResults) -> str:
    return ", ".join(sorted({value for row in sweep.rows for value in _references(row).values()})) or "none"


def _merged(group: _Group, sweeps: Mapping[str, SweepResults], out: Path) -> SweepResults:
    names = list(dict.fromkeys(name for name, _ in group.rows))
    question = " ".join(dict.fromkeys(sweeps[name].question for name in names if sweeps[name].question))
    same: dict[str, list[tuple[str, Row]]] = {}
    for name, row in group.rows:
        key = json.dumps({k: v for k, v in row.trial.items() if k != "metrics"}, sort_keys=True) if row.trial else row.trial_id
        same.setdefault(key, []).append((name, row))
    rows = [(found[0][0], _joined([row for _, row in found])) for found in same.values()]
    notes = [*(f"{mark(name)}: {note}" for name in names for note in sweeps[name].notes), *_told(list(same.values()))]
    defaults: dict[str, dict[str, object]] = {}
    for name in names:
        for method, options in sweeps[name].defaults.items():
            defaults[method] = {**defaults.get(method, {}), **options}
    return SweepResults(" + ".join(names), question, out, tuple(_varied(_told_apart(rows))), tuple(notes), defaults=defaults)


# ---------------------------------------------------------------------------------------------- equal trials


def _joined(rows: Sequence[Row]) -> Row:
    """Equal trials as one row: the newest whole result, completed by metrics that only another of the same code measured."""
    best, *others = sorted(rows, key=lambda row: (row.status != "done", row.status != "partial",
                                                  -(row.result.get("timestamp_ms") or 0)))
    if not best.trial:
        return best
    result = {**best.result, "trial": {key: value for key, value in best.trial.items() if key != "metrics"}}
    for other in others:
        if other.result.get("code") != best.result.get("code"):
            continue
        for key in ("metrics", "per_image", "executed", "series", "artifacts"):
            result[key] = _filled(result.get(key) or {}, other.result.get(key) or {})
        result["environment"] = _completed(result.get("environment") or {}, other.environment)
    return replace(best, result=result)


def _filled(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Both, mine first; but a number stands before the reason why there is none."""
    lacking = {name for name, value in mine.items() if isinstance(value, Mapping) and value.get("unavailable")}
    return {**theirs, **{name: value for name, value in mine.items() if name not in lacking or name not in theirs}}


def _completed(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What each job recorded, mine first."""
    return {job: {**theirs[job], **mine.get(job, {})} if isinstance(theirs.get(job), Mapping) else mine[job]
            for job in {**mine, **theirs}}


def _told(same: Sequence[Sequence[tuple[str, Row]]]) -> Iterator[str]:
    several = [found for found in same if len(found) > 1]
    if several:
        names = ", ".join(f"`{mark(found[0][1].label)}`" for found in several)
        yield f"In several sweeps and here once, with the newest whole result: {names}."
    for found in several:
        if odd := sorted(_disagreeing([row for _, row in found])):
            where = mark(" and ".join(name for name, _ in found))
            yield (f"**`{mark(found[0][1].label)}` gave other numbers** in {where} ({mark(', '.join(odd))}): code or machine "
                   "changed in between.")


def _disagreeing(rows: Sequence[Row]) -> set[str]:
    values: dict[str, set[float]] = {}
    for row in rows:
        for name in row.result.get("metrics") or {}:
            if row.traits(name).group not in MEASURED_ANEW and row.value(name) is not None:
                values.setdefault(name, set()).add(float(f"{row.value(name):.6g}"))
    return {name for name, found in values.items() if len(found) > 1}


# ---------------------------------------------------------------------------------------------- names


def _told_apart(rows: Sequence[tuple[str, Row]]) -> list[Row]:
    """Labels are short within their own sweep; where two settings share one here, it names the sweep."""
    names: dict[str, set[str]] = {}
    settings: dict[str, set[str]] = {}
    for name, row in rows:
        names.setdefault(_stem(row), set()).add(name)
        settings.setdefault(_stem(row), set()).add(_setting(row))
    shared = {stem for stem in names if len(names[stem]) > 1 and len(settings[stem]) > 1}
    return [replace(row, label=f"{row.label} ({name})") if _stem(row) in shared else row for name, row in rows]


def _stem(row: Row) -> str:
    return re.sub(r" seed=\d+", "", row.label)


def _setting(row: Row) -> str:
    train = row.trial.get("train")
    trial = {key: value for key, value in row.trial.items() if key != "metrics"}
    return json.dumps({**trial, "train": train and {**train, "seed": None}}, sort_keys=True) if trial else row.trial_id


def _varied(rows: Sequence[Row]) -> list[Row]:
    """What differs is another question over several sweeps: told anew, for a method's options within the method."""
    flats = [flat({key: value for key, value in row.trial.items() if key not in NOT_A_SETTING and value is not None})
             for row in rows]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for one in flats:
        for key, value in one.items():
            counts.setdefault(_scope(key, one), Counter())[json.dumps(value, sort_keys=True)] += 1
    return [replace(row, result={**row.result, "varied": _kept(one, counts)}) if row.trial else row
            for row, one in zip(rows, flats, strict=True)]


def _scope(key: str, one: Mapping[str, Any]) -> tuple[str, str]:
    return key, str(one["method.name"]) if key.startswith("method.") and key != "method.name" else ""


def _kept(one: Mapping[str, Any], counts: Mapping[tuple[str, str], Counter[str]]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key == "method.name" or len(counts[_scope(key, one)]) > 1}
