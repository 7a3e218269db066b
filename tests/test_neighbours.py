"""A burst of other work beside a timing is seen and its round dropped; what cannot be seen is unknown, and that is not clean."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from harness.api import disturbance, disturbed
from harness.hardware import neighbours
from harness.hardware.neighbours import MachineReader, Neighbours, Reading, Seen, judge
from harness.metrics.cost import latency
from harness.metrics.cost.latency import TimedRound, take_rounds, verdict

OWN = 1.0
"""Cores that a loop of the stand-in takes itself."""


def silent(stage: str, done: int, total: int) -> None:
    """No progress bar."""


class StandIn:
    """A machine whose every reading is made up. others(second): cores that others use; beside them a loop runs `slowed` times as
    long."""

    def __init__(self, others, slowed: float = 2.0, first: float = 0.0) -> None:
        self.others, self.slowed, self.now = others, slowed, first
        self.busy = self.own = 0.0
        self.watch = Neighbours(lambda second: Reading(second, self.busy + self.own, self.own), period_s=None)

    def loop(self, seconds: float):
        """A loop that takes `seconds` on the quiet machine, which is read each tenth of a second."""
        def run() -> None:
            done = 0.0
            while done < seconds - 1e-9:
                cores = self.others(self.now)
                step = min(0.01, (seconds - done) * (self.slowed if cores >= 0.5 else 1))
                done += step / (self.slowed if cores >= 0.5 else 1)
                self.now, self.busy, self.own = self.now + step, self.busy + cores * step, self.own + OWN * step
                if int(self.now * 10) != int((self.now - step) * 10):
                    self.watch.mark()
        return run

    def rounds(self, monkeypatch, dense: float, method: float, retakes: int = 8, count: int = 8) -> list[TimedRound]:
        """Rounds taken on it."""
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)
        return take_rounds(self.loop(dense), self.loop(method), count, retakes, silent, self.watch)


def bursts(second: float) -> float:
    """A core taken 0.3 s in every 2 s, on a machine that is otherwise idle as measured."""
    return 1.0 if second % 2 < 0.3 else 0.05


@pytest.mark.parametrize("method", [0.2, 0.3])
@pytest.mark.parametrize("first", [0.0, 0.45, 1.3])
def test_short_bursts_are_seen_and_what_lies_between_them_is_kept(monkeypatch, first, method):
    rounds = StandIn(bursts, first=first).rounds(monkeypatch, dense=0.3, method=method)
    assert verdict(rounds) is False and len(rounds) == 8 and sum(one.dropped for one in rounds) > 0
    assert sorted(one.ratio for one in rounds)[4] == pytest.approx(method / 0.3, rel=0.03)
    assert max(one.foreign for one in rounds) < 0.2


def test_bursts_that_leave_no_room_between_them_are_in_the_verdict(monkeypatch):
    """Loops longer than the pause: their mean of 0.15 cores is that of bursts, and each loop holds one."""
    rounds = StandIn(bursts).rounds(monkeypatch, dense=3.0, method=2.5)
    assert verdict(rounds) is True and all(one.contaminated for one in rounds) and len(rounds) == 8
    assert max(one.worst_window_s for one in rounds) >= 0.25
    assert sum(one.dropped for one in rounds) == 4 * 8, "no more was thrown away than was granted"


@pytest.mark.parametrize("seconds", [0.01, 0.3, 5.0])
def test_an_idle_machine_is_clean_at_once(monkeypatch, seconds):
    """With as much beside it as was measured on idle machines, 0.08 cores; where that comes all at once, after some retakes."""
    rounds = StandIn(lambda second: 0.08).rounds(monkeypatch, dense=seconds, method=seconds)
    assert verdict(rounds) is False and not any(one.dropped for one in rounds)
    rounds = StandIn(lambda second: 0.4 if second % 1 < 0.2 else 0.0).rounds(monkeypatch, dense=seconds, method=seconds)
    assert verdict(rounds) is False


def test_errors_of_the_clock_as_measured_disturb_nothing(monkeypatch):
    machine = StandIn(lambda second: 0.0)
    ticks = iter(range(10**6))
    machine.watch._read = lambda second: Reading(second, machine.own + (0.0, 0.02, 0.0, -0.01)[next(ticks) % 4], machine.own)
    assert verdict(machine.rounds(monkeypatch, dense=0.3, method=0.3)) is False


def test_a_round_is_dropped_whole_and_at_its_first_disturbed_loop(monkeypatch):
    """A disturbed loop alone taken again would leave the arms at different times of a drifting machine."""
    calls = []
    machine = StandIn(lambda second: 2.0 if 5.2 < second < 5.6 else 0.0)  # in the second loop of the first round
    dense, method = machine.loop(1.0), machine.loop(1.5)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: machine.now)
    rounds = take_rounds(lambda: (calls.append("A"), dense()), lambda: (calls.append("B"), method()), 2, 1, silent, machine.watch)
    assert "".join(calls) == "ABAB" + "A" + "ABBA" * 2 or "".join(calls) == "ABAB" + "AB" + "ABBA" * 2
    assert [one.ratio for one in rounds] == pytest.approx([1.5, 1.5]) and rounds[0].dropped in (1, 2)


def test_what_is_unknown_is_not_clean_and_not_taken_again(monkeypatch):
    machine, asked = StandIn(lambda second: 0.0), []
    machine.watch._read = lambda second: asked.append(second)
    rounds = machine.rounds(monkeypatch, dense=0.3, method=0.3)
    assert verdict(rounds) is None and asked and not any(one.dropped for one in rounds)
    assert all(one.foreign is None and one.worst_window_s is None for one in rounds)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_moment_that_a_telling_machine_lost_costs_a_round_and_no_mark(monkeypatch, lost):
    calm, unknown = Seen(0.0, 0.0, disturbed=False), Seen(None, None)
    told = iter([calm, unknown, calm, calm] * lost)
    monkeypatch.setattr(Neighbours, "seen", lambda watch, begin, end: next(told, calm))
    rounds = StandIn(lambda second: 0.0).rounds(monkeypatch, dense=0.3, method=0.3)
    assert verdict(rounds) is False and sum(one.dropped for one in rounds) == 4 * lost


def test_a_loop_shorter_than_a_window_is_judged_as_one():
    readings = [Reading(0.0, 0.0, 0.0), Reading(0.2, 0.32, 0.2)]
    assert judge(readings).window_s == pytest.approx(0.12) and judge(readings).disturbed


def test_one_unknown_reading_makes_its_loop_unknown():
    readings = [Reading(0.0, 0.0, 0.0), None, Reading(1.0, 1.0, 1.0)]
    assert judge(readings) == Seen(None, None) and judge(readings[::2]).disturbed is False
    assert judge([]).disturbed is None and judge(readings[:1]).disturbed is None


def test_a_machine_that_does_not_even_show_our_own_work_tells_nothing():
    """As in sandboxes, where every count of the machine stays at 0."""
    assert judge([Reading(0.0, 0.0, 0.0), Reading(1.0, 0.0, 1.0)]).disturbed is None


def test_stolen_time_counts_where_the_kernel_books_it_as_ours():
    seen = judge([Reading(0.0, 0.0, 0.0), Reading(1.0, 1.0, 1.0, stolen=0.4)])
    assert seen.disturbed and seen.cores == pytest.approx(0.4)


def test_a_processor_that_slowed_itself_down_disturbs():
    assert judge([Reading(0.0, 0.0, 0.0, throttled=3), Reading(1.0, 1.0, 1.0, throttled=4)]).disturbed
    assert judge([Reading(0.0, 0.0, 0.0, throttled=3), Reading(1.0, 1.0, 1.0, throttled=3)]).disturbed is False


@pytest.mark.parametrize(("noted", "word"), [(True, "disturbed"), (False, "clean"), (None, "unknown")])
def test_a_note_has_three_values(noted, word):
    of = {"timing": {"latency/ratio_to_dense": {"contaminated": noted}, "threads": 2}}
    assert disturbance(of) == disturbance(of["timing"]) == word and disturbed(of) == (noted is not False)


def test_a_reading_that_was_unknown_is_unknown_in_results_of_before():
    assert disturbance({"timing": {"latency/x": {"contaminated": False, "foreign_cpu_cores": [0.0, None]}}}) == "unknown"
    assert disturbance({"timing": {"budget": {"contaminated": True}, "latency/x": {"contaminated": None}}}) == "disturbed"
    assert disturbance({}) == "clean"


# ---------------------------------------------------------------------------------------------- this machine


BURN = "import time\nprint(1, flush=True)\nend = time.process_time() + SECONDS\nwhile time.process_time() < end: pass"


def burn(seconds: float) -> subprocess.Popen:
    """A process that is not of the watched tree once it burns."""
    process = subprocess.Popen([sys.executable, "-c", BURN.replace("SECONDS", str(seconds))], stdout=subprocess.PIPE)
    process.stdout.read(1)
    return process


@pytest.fixture
def one_core():
    """This process on one processor; those beside it may be anywhere."""
    mine = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, mine[:1])
    yield mine
    os.sched_setaffinity(0, mine)


linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to a processor")


@pytest.mark.processes
@linux
def test_a_real_burst_is_seen_on_a_processor_that_is_not_ours(one_core):
    if len(one_core) < 2:
        pytest.skip("one processor")
    with Neighbours(period_s=0.05) as watch:
        begin = watch.mark()
        started = burn(0.3)
        os.sched_setaffinity(started.pid, one_core[1:])
        started.wait()  # its own time is booked with ours then, so the watch must have seen it while it ran
        windows = list(watch._readings)
        end = watch.mark()
    assert max(neighbours._windows([reading for _, reading in windows])) > neighbours.WINDOW_LIMIT_S
    assert watch.seen(begin, end).disturbed


@pytest.mark.processes
@linux
def test_our_own_work_and_that_of_our_children_is_not_foreign():
    child = psutil.Process(burn(1000).pid)
    try:
        machine = MachineReader()
        before, began, of_child = machine.read(time.perf_counter()), time.process_time(), child.cpu_times().user
        while time.process_time() < began + 0.3:
            pass
        while child.cpu_times().user < of_child + 0.3:
            time.sleep(0.02)
        after, spent = machine.read(time.perf_counter()), time.process_time() - began
    finally:
        child.kill()
        child.wait()
    assert after.own - before.own > spent + 0.3 - 0.05
    # others may be at work on this machine: what we did must not be counted as theirs
    assert before.foreign_until(after) <= (after.second - before.second) * psutil.cpu_count() - spent - 0.3 + 0.1


def test_every_processor_is_watched_whatever_this_process_may_use(monkeypatch):
    cores = [SimpleNamespace(user=1.0, system=0.5, steal=0.25), SimpleNamespace(user=2.0, system=0.0, steal=0.0)]
    every = SimpleNamespace(user=3.0, system=0.5, steal=0.25)
    monkeypatch.setattr(neighbours.psutil, "cpu_times", lambda percpu=False: cores if percpu else every)
    monkeypatch.setattr(neighbours.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert MachineReader().read(0.0).busy == 3.75


def test_the_system_is_asked_through_psutil_where_it_has_no_stolen_time(monkeypatch):
    monkeypatch.setattr(neighbours.psutil, "cpu_times", lambda: SimpleNamespace(user=3.0, system=1.0, idle=9.0))
    assert MachineReader().read(0.0).busy == 4.0

    def refused() -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(neighbours.psutil, "cpu_times", refused)
    assert MachineReader().read(0.0) is None and neighbours.foreign_cpu_seconds() is None
