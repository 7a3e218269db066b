"""A budget in wall-clock time: which sweep files may ask for one, and that the knob follows what the clock says."""

import math
from types import SimpleNamespace

import pytest
import torch

from harness import speedup
from harness.api import METHODS, ConfigError
from harness.ledger import Job
from harness.metrics.latency import Round
from harness.speedup import solve_speedup


@pytest.fixture
def clock(monkeypatch):
    """Dense takes a second; a method what `law(keep_ratio)` says. Returns a setter of the law and the list of timings taken."""
    taken = []
    law = {"of": lambda keep: keep}

    def rounds(dense, method, count, retakes, progress):
        taken.append((method.config.keep_ratio, torch.get_num_threads()))
        seconds = law["of"](method.config.keep_ratio)
        return [Round(dense=[1.0], method=[seconds], foreign=0.0)] * count

    monkeypatch.setattr(speedup, "prepare_loop", lambda backbone, method, subject, batch_size: method)
    monkeypatch.setattr(speedup, "take_rounds", rounds)
    return SimpleNamespace(law=law, taken=taken)


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


def test_a_real_clock_finds_a_knob_on_the_tiny_model(tiny_backbone, monkeypatch):
    monkeypatch.setattr(speedup, "TOLERANCE", math.inf)  # other processes may share this machine; the search itself must run
    from harness.sampler import SamplerConfig

    subject = SimpleNamespace(backbone=tiny_backbone, student=tiny_backbone, sampler=SamplerConfig(num_steps=2), prompts=["a"],
                              seeds=[0], progress=lambda *args: None)
    try:
        solution = solve_speedup(subject, "random_drop", {}, 1.02, threads=1)
    except ConfigError as error:
        assert "cannot be" in str(error)  # 64 tokens: routing may cost more than it saves
    else:
        assert 0 < solution.value <= 1 and METHODS.build("random_drop", {"keep_ratio": solution.value})
