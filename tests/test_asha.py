"""ASHA promotes a training as soon as it has earned it, never leaves a worker idle for a rung, and loses nothing when killed."""

import heapq
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fake_search
import fake_sweep
import pytest
from fake_search import sweep as sweep
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.execution import pool
from harness.execution.asha import Promotions
from harness.execution.driver import DONE, FAILED, INTERRUPTED
from harness.execution.pool import _Turns
from harness.execution.results_folder import Job
from harness.sweep.search.config import Asha
from harness.sweep.search.halving import counts

HERE = Path(__file__).parent
ASHA = fake_search.ASHA.replace(", synchronous: true", "")
DRIVER = """
import sys
from pathlib import Path
import fake_search, fake_sweep
from rich.console import Console
from harness.execution.driver import Options, run_sweep

fake_sweep.install()
options = Options(results=Path(sys.argv[2]), run_job=fake_search.run_job, publish=False, workers=2)
sys.exit(run_sweep(sys.argv[1], options, Console(width=200)))
"""


def environment() -> dict[str, str]:
    """Of a driver in a process of its own."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return known | {"PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}


class Memory:
    """A results folder of outcomes only: {job key: loss, or None of a failure}."""

    def __init__(self):
        self.outcomes = {}

    def finished(self, job):
        return self.outcomes.get(job.key) is not None

    def failed(self, job):
        return job.key in self.outcomes and self.outcomes[job.key] is None

    def part(self, key):
        loss = self.outcomes[key]
        return {"error": {"job": "rung"}} if loss is None else {"series": {"val/diffusion_mse": [[0, 9.0], [1, loss]]}}


class Pool:
    """Workers that do the jobs of a `Promotions`, in simulated time; whoever is free asks."""

    def __init__(self, losses, factor, num_rungs, workers):
        rungs = tuple((i + 1) / (num_rungs + 1) for i in range(num_rungs))
        self.losses, self.factor, self.num_rungs, self.workers = losses, factor, num_rungs, workers
        self.asha, self.folder = Asha(rungs=rungs, reduction_factor=factor), Memory()
        kinds = [*(f"rung{i + 1}" for i in range(num_rungs)), "score"]
        self.ladders = {row: [Job(kind, row, row, "", 1, {}) for kind in kinds] for row in losses}
        self.promotions = self.fresh()

    def fresh(self):
        return Promotions(self.asha, self.folder, self.ladders, [list(self.losses)], [Job("score", "dense", "dense", "", 1, {})])

    def run(self, durations, lives=1, killed_after=0):
        """Yields each job that is given out, before it runs. A killed driver forgets what was running."""
        for life in range(lives):
            self.promotions, running, now, done = self.fresh(), [], 0.0, 0
            while True:
                while len(running) < self.workers and (job := self.promotions.following()):
                    yield job
                    heapq.heappush(running, (now + next(durations), job.key))
                if not running or (life < lives - 1 and done >= killed_after):
                    break
                now, key = heapq.heappop(running)
                row, _, kind = key.partition(".")
                self.folder.outcomes[key] = 0.0 if kind == "score" else self.losses[row]
                done += 1

    def ranked(self, index):
        done = [row for row in self.losses if self.ladders[row][index].key in self.folder.outcomes]
        return sorted((row for row in done if self.losses[row] is not None), key=lambda row: self.losses[row])


CASES = st.fixed_dictionaries({
    "losses": st.lists(st.one_of(st.none(), st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.floats(0, 1)), min_size=1, max_size=12),
    "factor": st.sampled_from([1.5, 2, 3, 4]), "num_rungs": st.integers(1, 3), "workers": st.integers(1, 4)})


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(case=CASES, lives=st.integers(1, 3), killed_after=st.integers(0, 6), seed=st.randoms(use_true_random=False))
def test_every_promotion_was_earned_and_the_best_of_every_rung_go_on(case, lives, killed_after, seed):
    pool = Pool(**{**case, "losses": {f"r{i}": loss for i, loss in enumerate(case["losses"])}})
    given_out, over = [], pool.folder.outcomes
    for job in pool.run(iter(lambda: seed.uniform(0.1, 3), None), lives, killed_after):
        assert job.key not in over, "nothing finished is done again"
        given_out.append(job.key)
        index = [one.key for one in pool.ladders.get(job.trial_id, [job])].index(job.key)
        if index:
            ranked = pool.ranked(index - 1)
            last = ranked[math.ceil(len(ranked) / pool.factor) - 1]
            assert pool.losses[job.trial_id] <= pool.losses[last], "it is among the best of those that have come"
    assert lives > 1 or max(Counter(given_out).values()) == 1
    assert pool.promotions.peek() is None and pool.fresh().peek() is None, "a finished search stays finished"
    assert "dense.score" in over and all(ladder[0].key in over for ladder in pool.ladders.values())
    for index in range(pool.num_rungs):
        ranked = pool.ranked(index)
        assert all(pool.ladders[row][index + 1].key in over for row in ranked[:math.ceil(len(ranked) / pool.factor)])
    told = dict(pool.promotions.stopped())
    failed = {row for row, loss in pool.losses.items() if loss is None}
    ended = {row for row, ladder in pool.ladders.items() if ladder[-1].key in over}
    assert told.keys() | ended | failed == pool.losses.keys() and not told.keys() & (ended | failed)


def test_one_worker_promotes_before_it_begins_another(sweep):
    assert sweep(ASHA) == DONE
    done = fake_sweep.diary(sweep.results)
    assert done == ["rung10 0.5", "rung10 0.2", "rung20 0.2", "rung10 0.4", "rung10 0.1", "rung20 0.1", "score 0.1", "rung10 0.3",
                    "rung20 0.3", "score 0.2", "score 1", "timing 1", "timing 0.2", "timing 0.1"]
    third = sweep.rows()["learner keep_ratio=0.3"]
    assert third["stopped"] == {"rung": 2, "of": 2, "step": 20, "metric": "val/diffusion_mse", "value": 0.3, "rank": 3, "rows": 3,
                                "went_on": 2}
    assert "at most 16 jobs" in sweep.output and "3 of 6 trials done, 3 stopped at a rung." in sweep.output
    before = {path: path.stat().st_mtime_ns for path in sweep.folder.glob("*.json") if path.name != "sweep.json"}
    assert sweep(ASHA) == DONE and fake_sweep.diary(sweep.results) == done
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_it_keeps_at_least_the_rows_that_a_synchronous_rung_would():
    pool = Pool({f"r{i}": loss for i, loss in enumerate([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])}, 2, 2, 1)
    given_out = Counter(job.kind for job in pool.run(iter(lambda: 1.0, None)))
    assert counts(6, 2, 2) == [6, 3, 2]
    assert given_out["rung1"] == 6 and given_out["rung2"] >= 3 and given_out["score"] - 1 >= 2
    assert given_out["rung2"] > 3, "rows that get better and better: each was the best when it came, which is ASHA's price"


def test_a_training_that_failed_is_an_outcome_and_a_score_that_failed_is_tried_again(sweep):
    sweep.orders("rung10 0.1 raise", "score 0.2 raise")
    assert sweep(ASHA) == FAILED
    rows = sweep.rows()
    assert {label.partition("=")[2]: row["error"]["job"] for label, row in rows.items() if row["error"]} == {
        "0.1": "rung10", "0.2": "score"}
    done = fake_sweep.diary(sweep.results)
    assert "score 0.1" not in done and "rung20 0.1" not in done and len(done) == len(set(done))
    sweep.orders()
    assert sweep(ASHA) == FAILED, "the training that failed is not tried again"
    assert fake_sweep.diary(sweep.results)[len(done):] == ["score 0.2", "timing 0.2"]
    assert sweep.rows()["learner keep_ratio=0.2"]["error"] is None


def test_an_interrupted_one_goes_on(sweep):
    sweep.orders("rung20 0.1 interrupt")
    assert sweep(ASHA) == INTERRUPTED
    sweep.orders()
    assert sweep(ASHA) == DONE
    done = fake_sweep.diary(sweep.results)
    assert len(done) == len(set(done)) == 14 and {"score 0.1", "score 0.2", "rung20 0.3"} <= set(done)


def test_a_job_is_decided_on_only_when_a_slot_is_free():
    jobs = iter([SimpleNamespace(key="a"), SimpleNamespace(key="b"), None, SimpleNamespace(key="c"), None])
    turns = _Turns(lambda: next(jobs), lambda: 2)
    assert turns.suggest("1") == {"job": "a"} and turns.suggest("2") == {"job": "b"}
    assert turns.suggest("3") is None and next(jobs) is None, "both slots are taken, so nothing was asked"
    turns.on_trial_complete("1")
    assert turns.suggest("3") == {"job": "c"}
    turns.on_trial_complete("2")
    jobs = iter([None, None])
    assert turns.suggest("4") is None, "a job that runs may still lead to another"
    turns.on_trial_complete("3")
    assert turns.suggest("4") == "FINISHED"


@pytest.mark.processes
def test_on_ray_a_training_is_promoted_while_others_are_at_the_rung_and_a_killed_driver_goes_on(sweep):
    """The first training hangs: what a rung would wait for. The driver is killed then, and the next one comes to the end."""
    sweep.file.write_text(ASHA)
    sweep.orders("rung10 0.5 hang")
    known = environment()
    command = [sys.executable, "-c", DRIVER, str(sweep.file), str(sweep.results)]
    driver = subprocess.Popen(command, env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 240
    while "score 0.1" not in fake_sweep.diary(sweep.results):
        if driver.poll() is not None or time.monotonic() > end:
            driver.kill()
            pytest.fail(f"nothing was promoted: {driver.communicate()[0]}")
        time.sleep(0.1)
    time.sleep(1)
    driver.kill()
    driver.communicate()
    first = fake_sweep.diary(sweep.results)
    assert "rung10 0.5" not in first and {"rung20 0.1", "score 0.1", "score 1"} <= set(first)

    sweep.orders()
    driver = subprocess.Popen(command, env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    timer = threading.Timer(240, driver.kill)
    timer.start()
    said, _ = driver.communicate()
    timer.cancel()
    assert driver.returncode == DONE, said
    done = fake_sweep.diary(sweep.results)
    assert done[:len(first)] == first and max(Counter(done).values()) == 1 and "Traceback" not in said
    status = {label: row["status"] for label, row in sweep.rows().items()}
    assert status["learner keep_ratio=0.1"] == "done" and status["learner"] == "stopped"
    assert set(status.values()) == {"done", "stopped"}
    assert json.loads((sweep.folder / "sweep.json").read_text())["asha"]["synchronous"] is False


@pytest.mark.parametrize("free, again", [([1], False), ([0.5, 0.5, 1], False), ([0.5] * 1000, True)],
                         ids=["free", "free after a while", "never free"])
def test_what_tune_leaves_behind_does_not_hold_up_the_next_round(monkeypatch, free, again):
    """An actor that was still starting when the last job of a round ended keeps its share; timings ask for the whole node.

    Ray is played: that a cluster of our own ends with its connection is shown where drivers are killed.
    """
    done, told = [], iter(free)
    monkeypatch.setattr(pool, "FREE_S", 0.3)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(
        available_resources=lambda: {"node_slot": next(told)}, cluster_resources=lambda: {"node_slot": 1},
        shutdown=lambda: done.append("shutdown")))
    cluster = pool.Cluster(pool.Share(workers=2, cpus=1, gpus=0))
    monkeypatch.setattr(cluster, "_start", lambda: done.append("start"))
    cluster.address = None
    cluster._free()
    assert done == ["shutdown", "start"] * again
