"""Successive halving of trainings: who goes on from a rung. Synchronous, so that the answer depends on the values alone.

Source: Jamieson and Talwalkar 2016, arXiv:1502.07943 (successive halving); Li et al. 2020, arXiv:1810.05934 (ASHA).
Differs: ASHA promotes as soon as a row is among the best of those that have come so far, so whom it stops depends on which
worker was faster. Here a rung waits for all its rows: a run that is repeated or continued stops the same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Trial = Mapping[str, Any]


def group_key(trial: Trial) -> str:
    """Trainings are compared where this text is equal: one method, model, data, budget and validation set.

    Methods differ in their stages, and in the middle of a warm-up a loss says little. A larger budget leaves a lower loss
    whatever the setting, and batches of another size see the held-out images at other noise levels.
    """
    options = trial["train"]
    parts = [trial["method"]["name"], trial["backbone"], trial["data"], trial["budget"], options["validation_images"],
             options["batch_size"]]
    return json.dumps(parts, sort_keys=True)


def survivors(losses: Mapping[str, float], factor: float) -> list[str]:
    """The best ceil(n / factor) of {row: loss}, best first, and those that are equal to the last of them.

    Equal to the last digit are rows that share their training so far, and differ in what acts only in a later stage.
    """
    ranked = sorted(losses, key=lambda row: losses[row])  # stable
    count = math.ceil(len(ranked) / factor)
    return [row for row in ranked if losses[row] <= losses[ranked[count - 1]]]


def counts(num_rows: int, num_rungs: int, factor: float) -> list[int]:
    """Rows at each rung and, last, at the end of the training, where no two are equal."""
    numbers = [num_rows]
    for _ in range(num_rungs):
        numbers.append(math.ceil(numbers[-1] / factor))
    return numbers


def loss_at(series: Mapping[str, Sequence[Sequence[float]]], metric: str) -> float | None:
    """The last point of `metric` of a training that was paused; None where it has none."""
    points = series.get(metric) or []
    return float(points[-1][1]) if points else None
