"""A wall-clock budget, turned into the value of a method's knob by timing it on the machine that runs the trial.

The job that does this has its node to itself. A measured knob is not exact: the trial's own latency, taken anew, is the number
that counts, and both stand in the row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from harness.api import METHODS, ConfigError, Subject, require
from harness.cost.budget import KNOB_STEPS, Solution, lowest_valid
from harness.hardware import provenance
from harness.metrics.cost.latency import TimedRound, prepare_loop, take_rounds, verdict

log = logging.getLogger(__name__)

SEARCH_ROUNDS, FINAL_ROUNDS, RETAKES = 2, 4, 8
HALVINGS = 6
"""Of the knob's range: finer than the noise of a timing."""
TOLERANCE = 0.1
"""Of the speed-up measured at the solution from the one asked for, as a fraction of it; beyond it the search has failed."""


def solve_speedup(subject: Subject, name: str, options: Mapping[str, Any], speedup: float, threads: int | None,
                  where: str = "budget") -> Solution:
    """The value of the method's knob at which dense takes `speedup` times as long as the method.

    subject: the trial with the dense backbone; its method is not used. A trained method is timed with random parameters, which
    cost the same. threads: of torch while timing; None for every core. Raises ConfigError when the speed-up is out of reach
    (with the one that is in reach), or when it is not met at the value found. The solution says whether other work ran beside any
    of the timings that led to it.
    """
    knob = METHODS.get(name, where).knob
    require(knob is not None, f"{where}: method '{name}' has no knob to solve a speed-up for; remove the budget or the method")
    require(speedup > 1, f"{where}.speedup must be greater than 1, got {speedup}")
    with _threads(threads or provenance.num_cpus()):
        dense = prepare_loop(subject.backbone, METHODS.build("dense", {}), subject, batch_size=1)
        everything: list[TimedRound] = []

        def measured(position: int, rounds: int = SEARCH_ROUNDS) -> float:
            method = METHODS.build(name, {**options, knob: position / KNOB_STEPS})
            loop = prepare_loop(subject.backbone, method, subject, batch_size=1)
            taken = take_rounds(dense, loop, rounds, RETAKES, subject.progress)
            everything.extend(taken)
            found = 1 / float(np.median([one.ratio for one in taken]))
            log.info("%s=%g: %.3f times as fast as dense", knob, position / KNOB_STEPS, found)
            return found

        low, high = lowest_valid(name, options, knob), KNOB_STEPS
        reach = measured(low)
        require(reach >= speedup * 0.98, f"{where}: method '{name}' cannot be {speedup:g} times as fast as dense here; "
                f"with {knob}={low / KNOB_STEPS:g} it is {reach:.2f} times as fast; ask for less")
        ends = {low: reach, high: 1.0}
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            ends[middle] = measured(middle)
            low, high = (middle, high) if ends[middle] >= speedup else (low, middle)
        spread = ends[low] - ends[high]
        share = min(max((ends[low] - speedup) / spread, 0.0), 1.0) if spread > 0 else 0.5
        position = round(low + share * (high - low))
        executed = measured(position, FINAL_ROUNDS)
    if abs(executed / speedup - 1) > TOLERANCE:
        raise ConfigError(f"{where}: {knob}={position / KNOB_STEPS:g} was found for a speed-up of {speedup:g} of '{name}', but "
                          f"measured again it gives {executed:.2f}: timings are too unsteady here, or the method's speed "
                          "does not follow its knob; free the machine, or use flops_cut")
    return Solution(knob, position / KNOB_STEPS, speedup, executed, unit="speedup", contaminated=verdict(everything))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
