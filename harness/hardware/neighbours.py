"""Whether other work ran on the machine while something was timed.

Watched is the whole machine, also the processors that this process may not use: they share its memory, its caches and its heat.
What others used is the machine's busy time less that of our own process tree. It is read several times a second, so that a burst
does not hide in the mean of a long loop. Where the system does not tell, the answer is that it is unknown, which is not clean.

The limits are measured. An idle machine with a sweep's own daemons on it has 0.02 to 0.08 cores busy; busy time, on a machine
whose every core was taken and so is known, is read with errors of up to 0.022 s over 0.1 to 2 s (two ticks of its clock).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CORES_LIMIT = 0.2
"""Cores that others may use on average over a loop: more than twice what an idle machine has."""
WINDOW_S, WINDOW_LIMIT_S = 0.25, 0.1
"""CPU seconds that others may use in a window of this length: all that an idle machine uses in a second, and the error."""
ERROR_S = 0.02
PERIOD_S = 0.1
"""Between two readings while a loop runs; one costs less than a millisecond."""
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Reading:
    """At `second` of the timing's clock: CPU seconds so far, up to a constant, of the machine, of us, and stolen from it.

    throttled: how often processors slowed themselves down because of heat; 0 where that is not told.
    """

    second: float
    busy: float
    own: float
    stolen: float = 0.0
    throttled: int = 0

    def foreign_until(self, later: Reading) -> float | None:
        """CPU seconds that others used up to `later`; None where the machine's count does not even hold our own."""
        own = later.own - self.own
        foreign = later.busy - self.busy - own
        if foreign < -0.1 * own - 2 * ERROR_S:  # sandboxes show a machine that never does anything
            return None
        return max(foreign, later.stolen - self.stolen, 0.0)  # some kernels book stolen time as ours


@dataclass(frozen=True)
class Seen:
    """What was seen beside one loop. cores: that others used on average; window_s: CPU seconds, the most in any window.

    None where it is unknown. throttled: a processor slowed itself down.
    """

    cores: float | None
    window_s: float | None = 0.0
    throttled: bool = False
    disturbed: bool | None = None


class Neighbours:
    """`with Neighbours() as watch: ...; watch.seen(begin, end)`: what ran beside the time between two `watch.mark()`.

    read: a Reading for a second of the clock, or None where it is unknown. period_s: None for readings at the marks alone.
    """

    def __init__(self, read: Callable[[float], Reading | None] | None = None, period_s: float | None = PERIOD_S) -> None:
        self._read, self._period_s = read or MachineReader().read, period_s
        self._readings: list[tuple[float, Reading | None]] = []
        self._lock, self._stop = threading.Lock(), threading.Event()

    def __enter__(self) -> Neighbours:
        if self._period_s:
            self._thread = threading.Thread(target=self._loop, daemon=True, name="neighbours")
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._period_s:
            self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._period_s):
            self.mark()

    def mark(self) -> float:
        """Read the machine; returns the second of the clock."""
        with self._lock:
            second = time.perf_counter()
            self._readings.append((second, self._read(second)))
        return second

    def seen(self, begin: float, end: float) -> Seen:
        """What was seen from the mark `begin` to the mark `end`; earlier readings are forgotten."""
        with self._lock:
            self._readings = [one for one in self._readings if one[0] >= begin]
            readings = [reading for second, reading in self._readings if second <= end]
        return judge(readings)


def judge(readings: Sequence[Reading | None]) -> Seen:
    """What the readings of one loop, from its begin to its end, say of it."""
    known = [reading for reading in readings if reading is not None]
    if len(known) < len(readings) or len(known) < 2:
        return Seen(None, None)
    first, last = known[0], known[-1]
    foreign, wall = first.foreign_until(last), last.second - first.second
    if foreign is None:
        return Seen(None, None)
    window_s = max(_windows(known), default=foreign)  # a loop shorter than a window is one itself
    throttled = last.throttled > first.throttled
    disturbed = foreign > CORES_LIMIT * wall + ERROR_S or window_s > WINDOW_LIMIT_S or throttled
    return Seen(round(foreign / wall, 4) if wall > 0 else 0.0, round(window_s, 4), throttled, disturbed)


def _windows(readings: Sequence[Reading]) -> list[float]:
    """CPU seconds of others in the shortest window of at least WINDOW_S from each reading on."""
    found, end = [], 0
    for begin in readings:
        while end < len(readings) and readings[end].second - begin.second < WINDOW_S:
            end += 1
        if end == len(readings):
            break
        found.append(begin.foreign_until(readings[end]) or 0.0)
    return found


class MachineReader:
    """Reads this machine and the process tree that is ours when it is made; what is started later counts as foreign."""

    def __init__(self) -> None:
        self._throttles = _throttle_counts()
        self._children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error, OSError):  # unseen children count as foreign
            self._children = psutil.Process().children(recursive=True)

    def read(self, second: float) -> Reading | None:
        """The state now; None where the system does not tell."""
        try:
            times = psutil.cpu_times()
            throttled = sum(int(path.read_text(encoding="utf-8")) for path in self._throttles)
        except (psutil.Error, OSError, ValueError, AttributeError):
            return None
        return Reading(second, sum(getattr(times, name, 0.0) for name in _BUSY), self._own(), getattr(times, "steal", 0.0),
                       throttled)

    def _own(self) -> float:
        reaped = os.times()
        seconds = time.process_time() + reaped.children_user + reaped.children_system
        for child in self._children:
            with contextlib.suppress(psutil.Error, OSError):  # it ended, and is counted with those that were waited for
                of = child.cpu_times()
                seconds += of.user + of.system + of.children_user + of.children_system
        return seconds


def _throttle_counts() -> list[Path]:
    """One file for each socket; none in virtual machines and outside Linux."""
    sockets = {}
    for count in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/package_throttle_count"):
        with contextlib.suppress(OSError):
            sockets[(count.parent.parent / "topology" / "physical_package_id").read_text(encoding="utf-8")] = count
    return list(sockets.values())


def foreign_cpu_seconds() -> float | None:
    """CPU seconds that other processes have used on this machine so far, up to a constant; None where it does not tell."""
    reading = MachineReader().read(time.perf_counter())
    return None if reading is None else reading.busy - reading.own
