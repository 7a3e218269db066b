"""A compute budget, turned into the value of a method's knob by counting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.api import METHODS, ConfigError, require
from harness.cost.flops import Meter

KNOB_STEPS = 10_000
"""A knob is solved to this many steps of its range (0, 1]: fine enough for 4096 tokens, and a number one can read."""
CLOSE_ENOUGH = 1e-4
"""Of the executed cut to the one asked for, when the search may stop: a hundredth of a percentage point."""


@dataclass(frozen=True)
class Solution:
    """A knob that meets a budget.

    asked, executed: fraction of dense FLOPs to save, and the one the value really saves; or both as a measured speed-up.
    contaminated: whether other work ran beside the timings of a speed-up; None where that is unknown.
    """

    knob: str
    value: float
    asked: float
    executed: float
    unit: Literal["flops_cut", "speedup"] = "flops_cut"
    contaminated: bool | None = False


def solve_budget(meter: Meter, name: str, options: Mapping[str, Any], flops_cut: float, where: str = "budget") -> Solution:
    """The value of the method's knob whose executed cut is nearest to `flops_cut`.

    Token counts are integers, so a cut is met only to a granularity; both numbers are returned. Raises ConfigError when the
    method has no knob, when the options set it already, or when the cut is out of reach (with the reachable range).
    """
    knob = METHODS.get(name, where).knob
    require(0 < flops_cut < 1, f"{where}.flops_cut must lie in (0, 1), got {flops_cut}")
    require(knob is not None, f"{where}: method '{name}' has no knob to solve a budget for; remove the budget or the method")
    require(knob not in options, f"{where}: method '{name}' already sets {knob}={options.get(knob)!r}, which the budget would "
            f"solve for; remove one of the two")

    def cut_at(position: int) -> float:
        return meter.cut(METHODS.build(name, {**options, knob: position / KNOB_STEPS}))

    low, high = reach_of(meter, name, options)
    check_reach(meter, name, options, (low, high, flops_cut), where)
    halve = False
    while high[0] - low[0] > 1 and low[1] != high[1] and min(abs(low[1] - flops_cut), abs(high[1] - flops_cut)) > CLOSE_ENOUGH:
        # false position and bisection in turn: a count takes seconds, and cuts are close to straight lines of the knob
        share = 0.5 if halve else (low[1] - flops_cut) / (low[1] - high[1])
        middle = min(max(round(low[0] + share * (high[0] - low[0])), low[0] + 1), high[0] - 1)
        point = (middle, cut_at(middle))
        low, high, halve = (point, high, not halve) if point[1] >= flops_cut else (low, point, not halve)
    position, executed = min(low, high, key=lambda point: abs(point[1] - flops_cut))
    return Solution(knob, position / KNOB_STEPS, flops_cut, executed)


def reach_of(meter: Meter, name: str, options: Mapping[str, Any]) -> tuple[tuple[int, float], tuple[int, float]]:
    """(position of the knob, executed cut) at both its ends, the deepest cut first."""
    knob = METHODS.get(name).knob
    ends = (lowest_valid(name, options, knob), KNOB_STEPS)
    low, high = ((end, meter.cut(METHODS.build(name, {**options, knob: end / KNOB_STEPS}))) for end in ends)
    return low, high


def check_reach(meter: Meter, name: str, options: Mapping[str, Any],
                found: tuple[tuple[int, float], tuple[int, float], float], where: str = "budget") -> None:
    """ConfigError where a cut is beyond one of the ends. found: both ends as `reach_of` gives them, and the cut asked for."""
    low, high, asked = found
    if low[1] < asked - 0.005:
        raise ConfigError(_out_of_reach(meter, name, options, (*low, asked), where))
    require(high[1] <= asked + 0.005, f"{where}.flops_cut: {asked:g}, but method '{name}' saves {high[1]:.1%} even at "
            f"{METHODS.get(name).knob}=1; ask for at least {high[1]:.2f}")


def lowest_valid(name: str, options: Mapping[str, Any], knob: str) -> int:
    """Smallest position of the knob that the method's Config accepts; 1 must be accepted, and the valid set have no hole."""
    low, high = 0, KNOB_STEPS
    METHODS.config(name, {**options, knob: 1.0})
    while high - low > 1:
        middle = (low + high) // 2
        try:
            METHODS.config(name, {**options, knob: middle / KNOB_STEPS})
            high = middle
        except ConfigError:
            low = middle
    return high


def _out_of_reach(meter: Meter, name: str, options: Mapping[str, Any], found: tuple[int, float, float], where: str) -> str:
    lowest, reach, asked = found
    knob = METHODS.get(name).knob
    most = math.floor(max(reach, 0) * 100) / 100
    remedy = f"ask for at most {most:.2f}" if most else "it saves nothing here: remove the row or draw larger images"
    config = METHODS.config(name, {**options, knob: 1.0})
    for field in dataclasses.fields(config):
        if getattr(config, field.name) is False:  # an option that is off may be what keeps the method from going further
            wider = {**options, field.name: True}
            position = lowest_valid(name, wider, knob)
            if meter.cut(METHODS.build(name, {**wider, knob: position / KNOB_STEPS})) >= asked:
                remedy = f"set {field.name}: true, or {remedy}"
                break
    return (f"{where}.flops_cut: {asked:g}, but method '{name}' cannot cut {asked:.1%} of the FLOPs; with {knob} in "
            f"[{lowest / KNOB_STEPS:g}, 1] it reaches 0 to {max(reach, 0):.1%}; {remedy}")
