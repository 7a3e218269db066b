"""Timing arms against each other: interleaved rounds, so that a drift of the machine's speed falls on all arms alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from harness.hardware.neighbours import foreign_cpu_seconds
from harness.metrics.cost.latency import wait_for
from harness.statistics.intervals import Interval, median_interval

SLOT_SECONDS = 0.05
"""An arm faster than this is called several times per slot."""


@dataclass
class Times:
    """seconds, cpu_seconds: {arm: wall time and this process's CPU time per call, for each round}. calls: of each arm per slot.

    foreign: cores that other processes used meanwhile. On a shared machine wall time is what a user waits and CPU time is what
    the arm costs; where the two ratios disagree, the machine was not calm enough.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    foreign: float | None = None
    load_average: float = 0.0

    def median_ms(self, arm: str) -> float:
        """Median over the rounds, in milliseconds per call."""
        return 1000 * statistics.median(self.seconds[arm])

    def ratio(self, arm: str, other: str) -> tuple[float, Interval | None]:
        """Median over the rounds of time(arm) / time(other), and its 95 % interval; None for fewer than 6 rounds."""
        ratios = [a / b for a, b in zip(self.seconds[arm], self.seconds[other], strict=True)]
        return statistics.median(ratios), median_interval(ratios)

    def cpu_ratio(self, arm: str, other: str) -> float:
        """`ratio` by CPU time; says nothing about work on an accelerator."""
        return statistics.median(a / b for a, b in zip(self.cpu_seconds[arm], self.cpu_seconds[other], strict=True))

    def facts(self) -> dict:
        """JSON-able: everything that was measured, and how disturbed the machine was."""
        return {"seconds_per_call": self.seconds, "cpu_seconds_per_call": self.cpu_seconds, "calls_per_slot": self.calls,
                "foreign_cpu_cores": self.foreign, "load_average": self.load_average}


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> Times:
    """Time every arm `rounds` times after a warm-up; a round runs all arms forth and back (A-B-B-A).

    device: waited for before and after every slot. A round's time of an arm is the mean of its two slots.
    """
    times = Times({name: [] for name in arms}, {name: [] for name in arms})
    for name, arm in arms.items():
        first, _ = _slot(arm, 1, device)  # the warm-up; a slow arm needs no second look to know that one call fills a slot
        times.calls[name] = 1 if first > 10 * SLOT_SECONDS else max(1, round(SLOT_SECONDS / _slot(arm, 1, device)[0]))
    before, started = foreign_cpu_seconds(), time.perf_counter()
    for _ in range(rounds):
        slots: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for name in (*arms, *reversed(list(arms))):
            slots[name].append(_slot(arms[name], times.calls[name], device))
        for name, ((wall_1, cpu_1), (wall_2, cpu_2)) in slots.items():
            times.seconds[name].append((wall_1 + wall_2) / 2)
            times.cpu_seconds[name].append((cpu_1 + cpu_2) / 2)
    after, wall = foreign_cpu_seconds(), time.perf_counter() - started
    if before is not None and after is not None:
        times.foreign = round(max(0.0, after - before) / wall, 3)
    times.load_average = os.getloadavg()[0]
    return times


def _slot(arm: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    wait_for(torch.device(device))
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(calls):
        arm()
    wait_for(torch.device(device))
    return (time.perf_counter() - started) / calls, (time.process_time() - cpu_started) / calls
