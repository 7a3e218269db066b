"""What of a search can only be checked with the classes behind its names; before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.api import METRICS, did_you_mean, named, require
from harness.sweep.search.config import Asha, Search
from harness.sweep.search.draws import probes
from harness.sweep.search.space import Point

Trial = Mapping[str, Any]


def check_space(search: Search, resolve: Callable[[Point], Trial], where: str) -> None:
    """Every choice and both bounds of every parameter make a trial; also that the objectives are measured there.

    resolve: point -> resolved trial, which raises ConfigError for options that are unknown or out of range.
    """
    trials = [resolve(point) for point in probes(search.space)]
    for index, objective in enumerate(search.options.objectives):
        known = measured(trials[0])
        require(objective.metric in known, f"{where}.objectives[{index}].metric: '{objective.metric}' is not measured by the "
                f"metrics of this sweep.{did_you_mean(objective.metric, known)}")


def measured(trial: Trial) -> list[str]:
    """Names of what the metrics of a trial measure."""
    first, last = trial["seeds"]
    found = []
    for entry in trial["metrics"]:
        metric = METRICS.build(*named(entry), where="metrics")
        metric.alias = entry.get("as") or ""
        found += map(metric.called, metric.names(last - first + 1))
    return found


def check_rungs(asha: Asha, trials: Sequence[Trial], where: str) -> None:
    """Rows are trained, and have a point of the validation curve before the first rung."""
    trained = [trial for trial in trials if trial["train"]]
    require(bool(trained), f"{where}: no row of this sweep is trained, so there is nothing to halve; remove {where.split()[-1]}")
    for trial in trained:
        options = trial["train"]
        require(options["validate_every"] > 0, f"{where}.metric: '{asha.metric}' is a point of the validation curve, and "
                "train.validate_every is 0; set it, such as 20")
        steps = rung_steps(asha, trial)
        require(steps[0] >= options["validate_every"], f"{where}.rungs: the first rung is at step {steps[0]} of "
                f"{options['steps']}, before the first point of the validation curve at step {options['validate_every']}; lower "
                "train.validate_every or raise the rung")
        require(len(set(steps)) == len(steps), f"{where}.rungs: two of them are the same step {steps} of {options['steps']}; "
                "remove one")


def rung_steps(asha: Asha, trial: Trial) -> list[int]:
    """Training steps after which a trial is compared."""
    return [max(1, round(fraction * trial["train"]["steps"])) for fraction in asha.rungs]
