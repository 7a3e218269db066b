"""Trainings that differ in their seed only, as one row: mean, spread, and an interval that holds both kinds of chance.

Two things vary: which images were drawn (within a training; the same images for every row) and how the training went (between
seeds). Their variances add: Var(mean) = s^2 / S over the S seeds, plus that of the mean over images. Intervals use Student's t
with the degrees of freedom of Welch and Satterthwaite, since three seeds tell their own spread badly.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import stdtr

from harness.reporting.rows import Row, SweepResults
from harness.statistics.intervals import Part, combined_interval, freedom, part_behind

SEED = "train.seed"
_SEED_IN_LABEL = re.compile(r" seed=\d+")


def over_seeds(sweep: SweepResults) -> SweepResults:
    """The sweep with every set of rows that differ in the training seed only as one row; other rows as they are."""
    sets: dict[str, list[Row]] = {}
    for row in sweep.rows:
        sets.setdefault(_setting(row), []).append(row)
    return replace(sweep, rows=tuple(rows[0] if len(rows) == 1 else pooled(rows) for rows in sets.values()))


def _setting(row: Row) -> str:
    train = row.trial.get("train")
    if not train:  # not trained, or a row without a file: alone
        return row.trial_id
    return json.dumps({**row.trial, "train": {**train, "seed": None}}, sort_keys=True)


def pooled(rows: Sequence[Row]) -> Row:
    """One row of means over `rows`, in the order of their seeds; pictures and keep-ratio maps are those of the first."""
    rows = sorted(rows, key=lambda row: row.trial["train"].get("seed", 0))
    whole = [row for row in rows if row.result.get("metrics")]
    first = whole[0] if whole else rows[0]
    lost = [row for row in rows if row.note]
    note = f"{len(lost)} of {len(rows)} training seeds not whole" if lost else ""
    status = "done" if not lost else "partial" if whole else rows[0].status
    names = dict.fromkeys(name for row in whole for name in row.result["metrics"])
    result: dict[str, Any] = {
        **first.result, "varied": {key: value for key, value in first.varied.items() if key != SEED},
        "metrics": {name: _pooled_measure(whole, name) for name in names},
        "per_image": {name: _pooled_images(whole, name) for name in first.result.get("per_image") or {}}}
    return Row(first.trial_id, _SEED_IN_LABEL.sub("", first.label), status, result, note, tuple(whole))


def seed_count(row: Row) -> int:
    """Trainings behind a row: 0 when nothing was trained."""
    return len(row.members) or int(bool(row.trial.get("train")))


def _measuring(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows that measured `name`; of a timing the undisturbed ones, where there are any."""
    rows = [row for row in rows if row.value(name) is not None]
    if rows and rows[0].traits(name).group == "latency":
        return [row for row in rows if not row.contaminated] or rows
    return rows


def _pooled_measure(rows: Sequence[Row], name: str) -> Mapping[str, Any]:
    used = _measuring(rows, name)
    if not used:  # unavailable in every training
        return next(row.result["metrics"][name] for row in rows if name in row.result["metrics"])
    values = [row.value(name) for row in used]
    mean = float(np.mean(values))
    within = _standard_error(used, name)
    interval = None if within is None else list(combined_interval(mean, [seed_part(values), within]))
    return {**used[0].measure(name), "value": mean, "interval": interval}


def _pooled_images(rows: Sequence[Row], name: str) -> list[float]:
    """Mean over seeds of each image's value; the images are the same in every training of a setting."""
    values = [row.per_image(name) for row in rows if row.per_image(name) is not None]
    return np.mean([v for v in values if len(v) == len(values[0])], axis=0).tolist()


# ---------------------------------------------------------------------------------------------- variances that add


def seed_part(values: Sequence[float]) -> Part:
    """Of a mean over training seeds; (0, inf) where nothing was trained, and so nothing varies."""
    return (float(np.var(values, ddof=1)) / len(values), len(values) - 1) if len(values) > 1 else (0.0, math.inf)


def _standard_error(rows: Sequence[Row], name: str) -> Part | None:
    """Of the images, from the rows' own intervals: their mean variance, as all seeds share the images. None without intervals."""
    ends = [row.interval(name) for row in rows]
    if any(end is None for end in ends):
        return None
    parts = [part_behind(end, row.measure(name).get("n")) for row, end in zip(rows, ends, strict=True)]
    return float(np.mean([variance for variance, _ in parts])), min(df for _, df in parts)


def difference(row: Row, other: Row, metric: str, per_image: np.ndarray | None) -> tuple[float, float, float, float]:
    """(mean, low, high, p) of row - other over training seeds and images, where at least one was trained with several seeds.

    per_image: differences of the means over seeds, image by image; None for a metric without values per image, whose intervals
    are then taken as independent (too wide rather than too narrow, for the images are shared).
    """
    a, b = (r.seed_values(metric) or [r.value(metric)] for r in (row, other))
    mean = float(np.mean(a) - np.mean(b))
    parts = [seed_part(a), seed_part(b)]
    if per_image is not None:
        mean = float(per_image.mean())
        parts.append((float(per_image.var(ddof=1)) / len(per_image), len(per_image) - 1))
    else:
        parts += [part for part in (_standard_error(r.members or (r,), metric) for r in (row, other)) if part is not None]
    error = math.sqrt(sum(variance for variance, _ in parts))
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    p = 2 * float(stdtr(min(freedom(parts), 1e6), -abs(mean) / error))
    return mean, *combined_interval(mean, parts), p


def apart(row: Row, other: Row, metric: str) -> bool | None:
    """Whether the values over training seeds lie apart; None unless both are known and one has several seeds.

    A row that is not trained is the point of its value: its uncertainty is that of the images, which the test weighs.
    """
    a, b = (r.seed_values(metric) or ([] if r.value(metric) is None else [r.value(metric)]) for r in (row, other))
    if not a or not b or len(a) + len(b) < 3:
        return None
    return max(a) < min(b) or max(b) < min(a)
