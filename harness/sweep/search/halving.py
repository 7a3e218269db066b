"""Successive halving of trainings: which rows are compared, and who is best. When is decided by whoever asks.

Source: Jamieson and Talwalkar 2016, arXiv:1502.07943 (successive halving); Li et al. 2020, arXiv:1810.05934 (ASHA, which is in
`harness.execution.asha`).
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
    """The best ceil(n / factor) of {row: loss}, and those that are equal to the last of them.

    Equal to the last digit are rows that share their training so far, and differ in what acts only in a later stage.
    """
    return best(losses, math.ceil(len(losses) / factor))


def best(losses: Mapping[str, float], count: int) -> list[str]:
    """The best `count` of {row: loss}, best first, and those that are equal to the last of them."""
    ranked = sorted(losses, key=lambda row: losses[row])  # stable
    return [row for row in ranked if losses[row] <= losses[ranked[count - 1]]] if count else []


def counts(num_rows: int, num_rungs: int, factor: float) -> list[int]:
    """Rows at each rung and, last, at the end of the training, where no two are equal."""
    numbers = [num_rows]
    for _ in range(num_rungs):
        numbers.append(math.ceil(numbers[-1] / factor))
    return numbers


def loss_at(series: Mapping[str, Sequence[Sequence[float]]], metric: str) -> float | None:
    """The last point of `metric` of a training that was paused; None where it has none, infinity where it is no number."""
    points = series.get(metric) or []
    value = float(points[-1][1]) if points else None
    return math.inf if value is not None and math.isnan(value) else value  # nan sorts anywhere
