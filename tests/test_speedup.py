"""A budget in wall-clock time: which sweep files may ask for one, and that the knob follows what the clock says."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import fake_sweep
import pytest
import torch

from harness import api
from harness.api import METHODS, ConfigError
from harness.cost import speedup
from harness.cost.budget import Solution
from harness.cost.flops import Meter
from harness.cost.speedup import solve_speedup
from harness.engine.sampler import SamplerConfig
from harness.execution import worker
from harness.execution.results_folder import Job, ResultsFolder
from harness.hardware.neighbours import Seen
from harness.metrics.cost.latency import TimedRound
from harness.storage.store import Store
from harness.sweep.file import load
from harness.sweep.resolve import resolve


@pytest.fixture
def clock(monkeypatch):
    """Dense takes a second; a method what `law(keep_ratio)` says. Returns a setter of the law and the list of timings taken."""
    taken, seen = [], {}
    law = {"of": lambda keep: keep}

    def rounds(dense, method, count, retakes, progress):
        taken.append((method.config.keep_ratio, torch.get_num_threads()))
        seconds = law["of"](method.config.keep_ratio)
        return [TimedRound([1.0], [seconds], [Seen(0.0, 0.0, disturbed=seen.get(len(taken), False))])] * count

    monkeypatch.setattr(speedup, "prepare_loop", lambda backbone, method, subject, batch_size: method)
    monkeypatch.setattr(speedup, "take_rounds", rounds)
    return SimpleNamespace(law=law, taken=taken, seen=seen)


SUBJECT = SimpleNamespace(backbone=None, progress=lambda *args: None)


@pytest.mark.parametrize("asked", [1.05, 1.25, 2.0])
def test_the_knob_is_where_the_clock_meets_the_speedup(clock, asked):
    clock.law["of"] = lambda keep: 0.2 + 0.8 * keep
    solution = solve_speedup(SUBJECT, "random_drop", {}, asked, threads=1)
    assert solution.value == pytest.approx((1 / asked - 0.2) / 0.8, abs=0.01)
    assert solution.executed == pytest.approx(asked, rel=0.01)
    assert (solution.unit, solution.asked, solution.knob) == ("speedup", asked, "keep_ratio")


def test_a_speedup_out_of_reach_names_the_one_in_reach(clock):
    clock.law["of"] = lambda keep: 0.8 + 0.2 * keep
    with pytest.raises(ConfigError, match=r"random_drop.*cannot be 1\.5 times as fast.*1\.25 times"):
        solve_speedup(SUBJECT, "random_drop", {}, 1.5, threads=1)


def test_timings_that_do_not_repeat_are_refused(clock):
    noise = iter(range(1000))
    clock.law["of"] = lambda keep: (0.3 + 0.7 * keep) * (1.5 if next(noise) == 7 else 1.0)  # the eighth timing is the last
    with pytest.raises(ConfigError, match="too unsteady"):
        solve_speedup(SUBJECT, "random_drop", {}, 1.5, threads=1)


@pytest.mark.parametrize(("beside", "word"), [({}, False), ({1: True}, True), ({4: True, 5: None}, True), ({8: None}, None)])
def test_a_solution_says_whether_any_timing_behind_it_was_disturbed(clock, beside, word):
    clock.seen |= beside
    assert solve_speedup(SUBJECT, "random_drop", {}, 1.5, threads=1).contaminated is word and len(clock.taken) == 8


def test_disturbed_rounds_of_a_search_are_taken_again(monkeypatch):
    asked = []

    def rounds(dense, method, count, retakes, progress):
        asked.append(retakes)
        raise KeyboardInterrupt

    monkeypatch.setattr(speedup, "prepare_loop", lambda *given, **options: None)
    monkeypatch.setattr(speedup, "take_rounds", rounds)
    with pytest.raises(KeyboardInterrupt):
        solve_speedup(SUBJECT, "random_drop", {}, 1.5, threads=1)
    assert asked == [speedup.RETAKES] and speedup.RETAKES > 0


def test_a_method_without_a_knob_is_refused():
    with pytest.raises(ConfigError, match="dense.*no knob"):
        solve_speedup(SUBJECT, "dense", {}, 1.5, threads=1)


def test_it_times_on_the_asked_threads_and_puts_them_back(clock):
    before = torch.get_num_threads()
    solve_speedup(SUBJECT, "random_drop", {}, 1.25, threads=before + 1)
    assert {threads for _, threads in clock.taken} == {before + 1}
    assert torch.get_num_threads() == before


def test_a_job_that_solves_for_a_speedup_has_its_node_to_itself():
    jobs = [Job(kind, "t", "label", "code", 1, {"budget": budget}) for kind, budget in
            (("score", None), ("score", {"flops_cut": 0.2}), ("score", {"speedup": 1.2, "threads": None}), ("timing", None))]
    assert [job.alone for job in jobs] == [False, False, True, True]


SWEEP = """
name: fast
seeds: 0-1
backbone: nothing
sampler: {num_steps: 4}
metrics: [probe]
methods:
  - {name: random_drop, speedup: 1.5}
  - {name: random_drop, first_block: true, speedup: 1.5}
"""


@pytest.fixture
def fast(tmp_path, monkeypatch):
    """`fast()` runs a sweep of two trials, whose solutions lie in the store as they would; returns their knobs in each job.

    fast.solved: knobs to find, in order, each with whether it was disturbed.
    """
    fake_sweep.install(monkeypatch)
    file = tmp_path / "fast.yaml"
    file.write_text(SWEEP)
    sweep, folder = resolve(load(file)), ResultsFolder(tmp_path / "results" / "fast")

    def timed(job, trial, store, progress, out_dir) -> dict:
        inputs = {"method": trial["method"]}

        def make(folder: Path) -> None:
            value, disturbed = fast.solved.pop(0)
            (folder / "solution.json").write_text(json.dumps([value, disturbed]))

        folder = store.get_or_make("budget", inputs, make)
        value, disturbed = json.loads((folder / "solution.json").read_text())
        part = fake_sweep.run_job(job, trial | {"method": {**trial["method"], "keep_ratio": value}}, store, progress, out_dir)
        return part | {"executed": {"knob_solved": value, "speedup_calibrated": 1 / value},
                       "environment": {"budget": {"contaminated": disturbed, "solution": folder.name}}}

    def fast(results: ResultsFolder = folder) -> list[list[float]]:
        results.begin(sweep)
        for job in results.missing(sweep):
            assert worker.run(job, results.path, timed)
        return [[results.part(f"{entry.trial_id}.{kind}")["executed"]["knob_solved"] for kind in ("score", "timing")]
                for entry in sweep.entries]

    fast.sweep, fast.folder = sweep, folder
    return fast


@pytest.mark.parametrize("disturbed", [True, None])
def test_a_disturbed_solution_is_solved_again_on_retake_and_all_that_rests_on_it_is_redone(fast, disturbed):
    fast.solved = [(0.4, disturbed), (0.6, False)]
    assert fast() == [[0.4, 0.4], [0.6, 0.6]]
    result = fast.folder.merge(fast.sweep.entries[0], "fast")
    assert api.disturbed(result["environment"]), "it is not ranked"
    assert not api.disturbed(fast.folder.merge(fast.sweep.entries[1], "fast")["environment"])
    fast.solved = [(0.5, False)]
    assert fast()[0] == [0.4, 0.4], "a plain run leaves it"
    assert fast.folder.set_aside_disturbed(fast.sweep) == 1
    assert fast() == [[0.5, 0.5], [0.6, 0.6]] and not fast.solved
    assert fast.folder.set_aside_disturbed(fast.sweep) == 0
    assert len(list(fast.folder.path.glob("parts/*.disturbed"))) == 2


def test_parts_of_two_solutions_are_never_one_result(fast):
    """A neighbour sweep with the same trial had it solved again, between this one's score and timing."""
    fast.solved = [(0.4, True), (0.6, False)]
    fast()
    entry = fast.sweep.entries[0]
    fast.folder.part_path(f"{entry.trial_id}.timing").unlink()
    shutil.rmtree(fast.folder.path.parent / ".cache" / "budget")
    fast.solved = [(0.5, False), (0.6, False)]
    assert fast()[0] == [0.4, 0.5]
    assert fast()[0] == [0.5, 0.5]


def test_a_score_that_rests_on_a_timing_is_not_taken_over_from_another_sweep(fast):
    fast.solved = [(0.4, False), (0.6, False)]
    fast()
    other = ResultsFolder(fast.folder.path.parent / "other")
    other.begin(fast.sweep)
    assert len(other.missing(fast.sweep)) == 4


def test_the_part_of_a_real_job_says_how_its_budget_was_solved(tiny_backbone, tmp_path, monkeypatch):
    from harness.trial import build

    solution = Solution("keep_ratio", 0.5, 1.5, 1.49, unit="speedup", contaminated=True)
    monkeypatch.setattr(build, "backbone_of", lambda trial: (tiny_backbone, Meter(tiny_backbone, SamplerConfig(num_steps=2))))
    monkeypatch.setattr(build, "solve_speedup", lambda *given: solution)
    monkeypatch.setattr(build, "prompts_of", lambda data, seeds: ["a"] * len(seeds))
    trial = {"method": {"name": "random_drop"}, "budget": {"speedup": 1.5, "threads": 1}, "seeds": [0, 0], "backbone": {},
             "sampler": {"num_steps": 2}, "data": {}}
    _, found = build.subject_of(trial, Store(tmp_path), build.Clock(lambda *given: None), lambda *given: None)
    noted = found["environment"]["budget"]
    assert noted["contaminated"] is True and (tmp_path / "budget" / noted["solution"] / "solution.json").exists()


def test_a_real_clock_finds_a_knob_on_the_tiny_model(tiny_backbone, monkeypatch):
    monkeypatch.setattr(speedup, "RETAKES", 0)
    monkeypatch.setattr(speedup, "TOLERANCE", math.inf)  # other processes may share this machine; the search itself must run
    subject = SimpleNamespace(backbone=tiny_backbone, student=tiny_backbone, sampler=SamplerConfig(num_steps=2), prompts=["a"],
                              seeds=[0], progress=lambda *args: None)
    try:
        solution = solve_speedup(subject, "random_drop", {}, 1.02, threads=1)
    except ConfigError as error:
        assert "cannot be" in str(error)  # 64 tokens: routing may cost more than it saves
    else:
        assert 0 < solution.value <= 1 and METHODS.build("random_drop", {"keep_ratio": solution.value})
