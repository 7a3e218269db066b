"""The results folder as rows: one row per trial of the sweep, in its order, whatever became of it.

Reads JSON only (no torch, no ray, no mlflow). A trial without a file, with an unreadable file or with an error is a row that
says so. What may stand in one ranking is decided here, by `comparison_key`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.api import ConfigError, MeasureRecord, Result, Traits, Trial, disturbed, require
from harness.reporting.markup import mark
from harness.storage import records
from harness.storage.durable import is_folder
from harness.storage.measures import traits

SCHEMA = 1
CONTROL = "random_drop"
DENSE = "dense"
CUT = "compute/flops_cut"
GFLOPS = "compute/gflops_per_image"
LATENCY = "latency/ratio_to_dense"
BUDGET_TOLERANCE = 0.015
"""Two executed FLOPs cuts within 1.5 points count as one budget; further from its asked budget a row has missed it."""
FEW_IMAGES = 1280
"""Up to this many images (the features of the extractor) a Frechet distance is dominated by its bias, common to all methods."""


@dataclass(frozen=True)
class Row:
    """One trial. status: done, partial, failed, stopped (its training, at a rung), missing (no file) or unreadable."""

    trial_id: str
    label: str
    status: str
    result: Result = field(default_factory=dict)
    note: str = ""
    """Why the row is not whole, in one line; empty when it is."""
    members: tuple[Row, ...] = ()
    """The trainings behind a row of means over training seeds (see `seeds`); empty for a single trial."""

    @property
    def trial(self) -> Trial:
        """The resolved trial."""
        return self.result.get("trial") or {}

    @property
    def method(self) -> str:
        """Name of the method; '' when the file is missing."""
        return (self.trial.get("method") or {}).get("name", "")

    @property
    def varied(self) -> Mapping[str, Any]:
        """{dotted key: value} of what the sweep varied in this trial."""
        return self.result.get("varied") or {}

    @property
    def asked(self) -> float | None:
        """Asked FLOPs cut as a fraction; None when the trial had no budget."""
        return (self.trial.get("budget") or {}).get("flops_cut")

    @property
    def cut(self) -> float | None:
        """Executed FLOPs cut as a fraction of dense."""
        return self.value(CUT)

    @property
    def remark(self) -> str:
        """What must be known of a whole row's numbers; '' for most."""
        return "; ".join(f"FLOPs leave out {what}" for what in find(self.environment, "uncounted"))

    @property
    def short_name(self) -> str:
        """The label without its budget, for figures whose axis or subtitle tells it."""
        return self.label if self.asked is None else self.label.replace(f" -{100 * self.asked:g}%", "")

    @property
    def is_dense(self) -> bool:
        """The reference: the dense method at full compute (dense with fewer steps is a competitor)."""
        return self.method == DENSE and abs(self.cut or 0.0) <= BUDGET_TOLERANCE

    @property
    def missed_budget(self) -> bool:
        """Executed compute is further from the asked budget than BUDGET_TOLERANCE."""
        return self.asked is not None and self.cut is not None and abs(self.cut - self.asked) > BUDGET_TOLERANCE

    @property
    def contaminated(self) -> bool:
        """The timing job was disturbed by other work on the machine, by its own record, or could not tell."""
        return disturbed(self.environment)

    @property
    def environment(self) -> Mapping[str, Any]:
        """What the jobs recorded about code and machine."""
        return self.result.get("environment") or {}

    @property
    def num_images(self) -> int | None:
        """Images of the trial, from its inclusive seed range."""
        seeds = self.trial.get("seeds")
        return seeds[1] - seeds[0] + 1 if seeds else None

    def notes(self, name: str) -> Mapping[str, Any]:
        """What metric `name` recorded beside its value; empty when nothing."""
        jobs = (job for job in self.environment.values() if isinstance(job, Mapping))
        return next((job[name] for job in jobs if isinstance(job.get(name), Mapping)), {})

    def measure(self, name: str) -> MeasureRecord | None:
        """{"value", "better", "interval", "n"} of a metric, or None when it was not measured."""
        found = (self.result.get("metrics") or {}).get(name)
        return found if found and found.get("value") is not None else None

    def unavailable(self, name: str) -> str:
        """Why metric `name` could not be measured, in one line; '' when it was, or was not asked for."""
        return ((self.result.get("metrics") or {}).get(name) or {}).get("unavailable", "")

    def value(self, name: str) -> float | None:
        """Value of a metric, or None."""
        found = self.measure(name)
        return None if found is None else found["value"]

    def interval(self, name: str) -> tuple[float, float] | None:
        """(low, high) of a metric, or None."""
        found = self.measure(name)
        return None if found is None or not found.get("interval") else (found["interval"][0], found["interval"][1])

    def per_image(self, name: str) -> Sequence[float] | None:
        """Values per image, in the order of the trial's seeds, or None."""
        return (self.result.get("per_image") or {}).get(name)

    def spread(self, name: str) -> tuple[float, float] | None:
        """(least, greatest) value over training seeds; None for a single trial or where one seed alone measured it."""
        values = self.seed_values(name)
        return (min(values), max(values)) if len(values) > 1 else None

    def seed_values(self, name: str) -> list[float]:
        """The value of each training; empty for a single trial."""
        return [row.value(name) for row in self.members if row.value(name) is not None]

    def traits(self, name: str) -> Traits:
        """What metric `name` says of itself here."""
        return traits(name, (self.result.get("metrics") or {}).get(name) or {})

    def comparison_key(self, name: str) -> str:
        """Rows may stand in one ranking of metric `name` only when this text is equal. By the group that the metric says:

        fidelity: sample count, reference and data, and seeds where there are values per image. prompt, image: sample count,
        scorer, data and seeds. dense, other: sample count, backbone, sampler, data and seeds. latency, memory: backbone, sampler,
        and threads, batch and device of the timing job. cost: backbone and guidance.
        """
        trial, measure = self.trial, self.measure(name) or {}
        sampler, backbone = trial.get("sampler"), trial.get("backbone")
        group = self.traits(name).group
        if group == "fidelity":
            own = self.notes(name).get("reference_id")
            references = [str(own)] if own else sorted(map(str, find(self.environment, "reference_id")))
            causes = [measure.get("n"), references, trial.get("data"), *([trial.get("seeds")] if self.per_image(name) else [])]
        elif group in ("prompt", "image"):
            causes = [measure.get("n"), self.notes(name).get("scorer_id"), trial.get("data"), trial.get("seeds")]
        elif group in ("dense", "other"):
            causes = [measure.get("n"), backbone, sampler, trial.get("data"), trial.get("seeds")]
        elif group in ("latency", "memory"):
            machine = self.environment.get("timing", self.environment)
            keys = ("threads", "device", "batch_size")
            causes = [backbone, sampler, *(sorted(set(map(str, find(machine, key)))) for key in keys)]
        else:
            causes = [backbone, (sampler or {}).get("guidance_scale")]
        return json.dumps(causes, sort_keys=True)


@dataclass(frozen=True)
class SweepResults:
    """A sweep's rows in the order of its file. notes: what the reader must know about the folder itself."""

    name: str
    question: str
    folder: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    search: Mapping[str, Any] = field(default_factory=dict)
    """The options of its search and {trial_id: number}; empty without one."""
    asha: Mapping[str, Any] = field(default_factory=dict)
    """The options of its rungs; empty without."""
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{method: {dotted option: its default}} of the options that vary; empty for results of an older version."""

    @property
    def metrics(self) -> list[str]:
        """All measured names, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.result.get("metrics") or {}))

    @property
    def dense(self) -> Row | None:
        """The dense reference row, when it was measured."""
        return next((row for row in self.rows if row.is_dense and row.status in ("done", "partial")), None)

    @property
    def methods(self) -> list[str]:
        """Method names, dense first, then in the order of the sweep."""
        names = dict.fromkeys(row.method for row in self.rows if row.method)
        return sorted(names, key=lambda name: name != DENSE)

    @cached_property
    def quality(self) -> str | None:
        """The headline quality metric: a distance to real images when there is one, else the error to the dense model."""
        return headline_metric({name: self.traits(name) for name in self.metrics
                                if any(row.value(name) is not None for row in self.rows)})

    def traits(self, name: str) -> Traits:
        """What metric `name` says of itself in the first row with a value, else in the first that has it at all."""
        return traits_in(self.rows, name)

    @property
    def unavailable(self) -> dict[str, dict[str, list[Row]]]:
        """{metric: {reason: rows}} of what could not be measured."""
        found: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            for name in row.result.get("metrics") or {}:
                if reason := row.unavailable(name):
                    found.setdefault(name, {}).setdefault(reason, []).append(row)
        return found


@dataclass(frozen=True)
class Budget:
    """Rows that spent the same compute. cut: the asked FLOPs cut, or the mean executed one when none was asked."""

    cut: float
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """For readers: '24 % fewer FLOPs'."""
        return f"{100 * self.cut:.3g} % fewer FLOPs"


def headline_metric(known: Mapping[str, Traits], groups: Sequence[str] = ("fidelity", "dense")) -> str | None:
    """The metric that a sweep is first judged by: likeness to real images, else to dense; None when there is neither.

    known: {name: what it says of itself}, in order of appearance; within a group the one that leads is taken.
    """
    found = ([name for name, one in known.items() if one.group == group] for group in groups)
    return next((max(names, key=lambda name: known[name].lead) for names in found if names), None)


def traits_in(rows: Sequence[Row], name: str) -> Traits:
    """What metric `name` says of itself in the first of `rows` with a value, else in the first that has it at all."""
    having = [row for row in rows if name in (row.result.get("metrics") or {})]
    first = next((row for row in having if row.measure(name)), having[0] if having else None)
    return traits(name, {}) if first is None else first.traits(name)


def heading(of: Row | SweepResults, name: str, brief: bool = False) -> str:
    """A metric's column head with its unit. brief: where it says none, its name without what stands before the slash."""
    found = of.traits(name)
    return _with_unit(found.heading or (name.rpartition("/")[2] if brief else name), found.unit)


def title(of: Row | SweepResults, name: str) -> str:
    """A metric in words, for the axis of a figure: 'FD to real images (...)', 'PSNR to dense images, dB'."""
    found = of.traits(name)
    return _with_unit(found.title, found.unit) if found.title else heading(of, name)


def _with_unit(words: str, unit: str) -> str:
    return words if not unit or unit in words.replace(",", " ").split() else f"{words}, {unit}"


def find(tree: Any, key: str) -> Iterator[Any]:
    """Every value stored under `key` anywhere in nested mappings."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name == key:
                yield value
            else:
                yield from find(value, key)


def load_sweep(results_dir: Path) -> SweepResults:
    """The sweep in `results_dir`. ConfigError when the folder holds no sweep or another schema."""
    folder = Path(results_dir)
    require(is_folder(folder), f"{folder}: no such results folder. Run the sweep first: python -m harness.run SWEEP.yaml")
    header = _header(folder)
    present = sorted(p.stem for p in folder.glob("*.json") if p.name != "sweep.json")
    require(bool(header or present), f"{folder}: neither sweep.json nor a trial's JSON. Is this results/<sweep>?")
    ids, notes = header.get("trial_ids"), []
    if ids is None:
        ids = present
        notes.append("`sweep.json` is missing: a trial that left no file cannot be told from one that never was.")
    strays = [name for name in present if name not in ids]
    if strays:
        notes.append(f"{len(strays)} result(s) in the folder belong to an earlier version of the sweep file and are left out: "
                     f"{mark(', '.join(strays))}.")
    labels = header.get("labels") or {}
    rows = tuple(_row(folder, trial_id, labels.get(trial_id, trial_id)) for trial_id in ids)
    return SweepResults(header.get("name", folder.name), header.get("question") or "", folder, rows, tuple(notes),
                        header.get("search") or {}, header.get("asha") or {}, header.get("defaults") or {})


def _header(folder: Path) -> dict[str, Any]:
    path = folder / "sweep.json"
    try:
        return records.load(path, records.HEADER)
    except FileNotFoundError:
        return {}
    except records.Unreadable as error:
        raise ConfigError(f"{path}: {error}. Run the sweep again; finished trials are kept") from None


def _row(folder: Path, trial_id: str, label: str) -> Row:
    require(Path(trial_id).name == trial_id, f"{folder / 'sweep.json'}: '{trial_id}' is no trial id")
    path = folder / f"{trial_id}.json"
    try:
        result = records.load(path, records.both(_of_this_schema(path), records.result_of(trial_id)))
    except FileNotFoundError:
        return Row(trial_id, label, "missing", note="no result file: the trial was never finished")
    except records.Unreadable as error:
        return Row(trial_id, label, "unreadable", note=f"result file counts as missing: {error}")
    for name, file in (result.get("artifacts") or {}).items():
        require((folder / file).resolve().is_relative_to(folder.resolve()),
                f"{path}: artifacts.{name}: '{file}' lies outside the results folder; such a result is not to be trusted")
    return Row(trial_id, result.get("label") or label, result["status"], result, _note(result))


def _of_this_schema(path: Path) -> records.Check:
    def check(value: Any, place: str) -> None:
        records.MAPPING(value, place)
        require(value.get("schema") == SCHEMA, f"{path}: schema {value.get('schema')!r}, this report reads schema {SCHEMA}. "
                "Run the sweep again with the present version")

    return check


def _note(result: Result) -> str:
    error = result.get("error")
    if error:
        message = " ".join(str(error.get("message", "")).split())
        return f"{result['status']} in the {error.get('job')} job: {error.get('type')}: {message}"
    if result["status"] == "done":
        return ""
    if result["status"] == "stopped":
        at = result["stopped"]
        return (f"stopped at rung {at['rung']} of {at['of']}, after {at['step']} training steps: {at['metric']} "
                f"{at['value']:.4g}, place {at['rank']} of {at['rows']}, of which {at['went_on']} went on")
    lacking = [job for job in ("score", "timing") if job not in (result.get("stages") or {})]
    return f"{result['status']}: {' and '.join(lacking) or 'a'} job not finished"


def budgets(rows: Sequence[Row]) -> list[Budget]:
    """Rows of equal compute, by rising cut: equal asked budget, or executed within BUDGET_TOLERANCE.

    Left out: the dense reference, rows without an executed cut, and rows that missed their asked budget.
    """
    usable = [row for row in rows if not row.is_dense and row.cut is not None and not row.missed_budget]
    groups: dict[float, list[Row]] = {}
    for row in usable:
        if row.asked is not None:
            groups.setdefault(round(row.asked, 6), []).append(row)
    for row in (row for row in usable if row.asked is None):
        near = min(groups, key=lambda cut: abs(cut - row.cut), default=None)
        key = near if near is not None and abs(near - row.cut) <= BUDGET_TOLERANCE else round(row.cut, 6)
        groups.setdefault(key, []).append(row)
    return [Budget(cut, tuple(groups[cut])) for cut in sorted(groups)]


def comparable(rows: Sequence[Row], name: str) -> list[list[Row]]:
    """Rows that measured `name`, split into those that may be ranked together; the largest set first."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        if row.value(name) is not None:
            sets.setdefault(row.comparison_key(name), []).append(row)
    return sorted(sets.values(), key=len, reverse=True)
