"""A search comes to the same trials whenever it is stopped, and rungs to the same decisions; nothing is computed twice."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_sweep
import pytest
from conftest import TinySD3, tiny_pipeline
from fake_search import ASHA, OPTUNA, RANDOM, Runner, run_job
from fake_search import sweep as sweep
from test_train import CONFIG
from test_train import data as data

from harness.api import METHODS, require
from harness.execution.driver import DONE, FAILED, INTERRUPTED
from harness.reporting.report import write_report
from harness.storage.store import Store
from harness.sweep import resolve
from harness.sweep.search.halving import counts, survivors
from harness.training.train import Training

ROOT = Path(__file__).parent.parent


def test_random_trials_are_trials_like_others(sweep):
    assert sweep(RANDOM) == DONE
    first = fake_sweep.diary(sweep.results)
    assert len(first) == 2 * 11 and sorted(sweep.header["search"]["numbers"].values()) == list(range(1, 11))
    assert [label.split()[0] for label in sweep.rows()] == ["dense", *(f"#{number}" for number in range(1, 11))]
    assert sweep(RANDOM) == DONE and fake_sweep.diary(sweep.results) == first


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
import fake_search, fake_sweep
from pathlib import Path
from rich.console import Console
from harness.execution.driver import Options, run_sweep
fake_sweep.install()
done = 0
def job(*arguments):
    global done
    if done == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    return fake_search.run_job(*arguments)
run_sweep(sys.argv[1], Options(results=Path(sys.argv[2]), local=True, run_job=job, publish=False), Console(width=200))
"""


@pytest.mark.processes
def test_a_killed_search_goes_on_with_the_same_suggestions_and_repeats_nothing(sweep, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = Runner(tmp_path / "whole")
    assert whole(OPTUNA) == DONE
    sweep.file.write_text(OPTUNA)
    code = subprocess.run([sys.executable, "-c", KILLED, str(sweep.file), str(sweep.results), str(ROOT), str(ROOT / "tests")],
                          env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}).returncode
    assert code == -signal.SIGKILL and len(fake_sweep.diary(sweep.results)) == 11
    assert len(sweep.header["search"]["numbers"]) == 6, "killed in the second batch: in the first, nothing would be learned yet"
    assert sweep(OPTUNA) == DONE
    assert sweep.header["search"] == whole.header["search"] and len(sweep.header["search"]["numbers"]) == 10
    both = [sorted(fake_sweep.diary(one.results)) for one in (sweep, whole)]
    assert both[0] == both[1] and len(both[0]) == 2 * 11
    assert sweep(OPTUNA) == DONE and sorted(fake_sweep.diary(sweep.results)) == both[0]


def test_a_failed_suggestion_is_told_as_failed_and_is_not_tried_again(sweep):
    def fails_once(job, trial, *rest):
        if job == "score" and trial["method"].get("keep_ratio", 1) < 0.3:
            raise ValueError("too few tokens")
        return run_job(job, trial, *rest)

    assert sweep(OPTUNA, fails_once) == FAILED
    first, numbers = fake_sweep.diary(sweep.results), sweep.header["search"]["numbers"]
    failed = [row for row in sweep.rows().values() if row["status"] == "failed"]
    assert failed and all(row["error"]["message"] == "too few tokens" for row in failed) and "remove its file in" in sweep.output
    assert sweep(OPTUNA) == FAILED
    assert fake_sweep.diary(sweep.results) == first and sweep.header["search"]["numbers"] == numbers


def test_options_that_do_not_go_together_are_told_as_failed_and_the_search_goes_on(sweep, monkeypatch):
    real = resolve._trial

    def picky(draft, resources):
        trial = real(draft, resources)
        ratio = trial["method"].get("keep_ratio", 1)
        require(ratio == 0.1 or ratio > 0.5, "too few for a tile")  # the bounds of the space are fine
        return trial

    monkeypatch.setattr(resolve, "_trial", picky)
    assert sweep(OPTUNA) == DONE
    assert "(refused: too few for a tile)" in sweep.output and 0 < len(sweep.header["search"]["numbers"]) < 10
    done = fake_sweep.diary(sweep.results)
    assert sweep(OPTUNA) == DONE and fake_sweep.diary(sweep.results) == done


# ---------------------------------------------------------------------------------------------- rungs


def test_the_best_half_goes_on_and_so_does_who_is_equal_to_the_last_of_it():
    assert survivors({"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0, "e": 9.0}, 2) == ["b", "d", "c"]
    assert survivors({"a": 2.0, "b": 3.0, "c": 1.0, "d": 2.0}, 2) == ["c", "a", "d"]
    assert survivors({"a": 1.0}, 4) == ["a"] and survivors({}, 2) == []
    assert counts(9, 2, 3) == [9, 3, 1]


def test_trainings_are_halved_and_a_stopped_one_is_a_row_and_no_failure(sweep):
    assert sweep(ASHA) == DONE
    done = fake_sweep.diary(sweep.results)
    assert done == ["rung10 0.5", "rung10 0.2", "rung10 0.4", "rung10 0.1", "rung10 0.3", "rung20 0.2", "rung20 0.1",
                    "rung20 0.3", "score 1", "score 0.2", "score 0.1", "timing 1", "timing 0.2", "timing 0.1"]
    rows = sweep.rows()
    assert [(label.partition("=")[2], row["status"]) for label, row in rows.items()] == [
        ("", "done"), ("", "stopped"), ("0.2", "done"), ("0.4", "stopped"), ("0.1", "done"), ("0.3", "stopped")]
    third = rows["learner keep_ratio=0.3"]
    assert third["stopped"] == {"rung": 2, "of": 2, "step": 20, "metric": "val/diffusion_mse", "value": 0.3, "rank": 3, "rows": 3,
                                "went_on": 2}
    assert third["metrics"] == {} and third["error"] is None and third["series"]["val/diffusion_mse"] == [[19, 0.3]]
    assert "3 of 6 trials done, 3 stopped at a rung." in sweep.output
    before = {path: path.stat().st_mtime_ns for path in sweep.folder.glob("*.json") if path.name != "sweep.json"}
    assert sweep(ASHA) == DONE and fake_sweep.diary(sweep.results) == done
    assert before == {path: path.stat().st_mtime_ns for path in before}
    report = write_report(sweep.folder).read_text()
    assert "stopped at rung 2 of 2, after 20 training steps: val/diffusion_mse 0.3, place 3 of 3, of which 2 went on" in report
    assert "Not everything is here" not in report and "3 done, 3 stopped" in report


def test_rungs_that_were_interrupted_come_to_the_same_decisions(sweep):
    sweep.orders("rung20 0.1 interrupt")
    assert sweep(ASHA) == INTERRUPTED
    sweep.orders()
    rows = sweep_rows(sweep)
    assert {rows[label]["status"] for label in ("learner", "learner keep_ratio=0.4")} == {"stopped"}
    assert sweep(ASHA) == DONE
    done = fake_sweep.diary(sweep.results)
    assert len(done) == len(set(done)) == 14 and "rung20 0.5" not in done and "score 0.3" not in done


def sweep_rows(sweep: Runner) -> dict[str, dict]:
    results = [json.loads(path.read_text()) for path in sweep.folder.glob("*.json") if path.name != "sweep.json"]
    return {result["label"]: result for result in results}


def test_a_training_that_fails_at_a_rung_is_a_failed_row_and_takes_no_place(sweep):
    sweep.orders("rung10 0.1 raise")
    assert sweep(ASHA) == FAILED
    rows = sweep.rows()
    assert rows["learner keep_ratio=0.1"]["error"]["job"] == "rung10" and rows["learner keep_ratio=0.1"]["status"] == "failed"
    assert [label for label, row in rows.items() if row["status"] == "done"] == ["dense", "learner keep_ratio=0.2"]
    done = fake_sweep.diary(sweep.results)
    assert "score 0.1" not in done
    assert sweep(ASHA) == FAILED and fake_sweep.diary(sweep.results) == done


def test_only_trainings_that_validate_alike_and_spend_alike_are_compared(sweep):
    alone = ("keep_ratio: 0.5", "keep_ratio: 0.4, train: {batch_size: 2}", "flops_cut: 0.2", "flops_cut: 0.4")
    head, _, tail = ASHA.partition("  - {name: learner")
    text = head + "".join(f"  - {{name: learner, {options}}}\n" for options in alone) + tail[tail.index("asha:"):]
    assert sweep(text) == DONE
    assert [row["status"] for row in sweep.rows().values()] == 5 * ["done"]


def test_a_training_paused_at_a_rung_goes_on_to_what_it_would_have_become(data, tmp_path):
    config = replace(CONFIG, validate_every=2, validation_images=4)
    backbone, results, seen = TinySD3.from_pipeline(tiny_pipeline()), [], []

    def training() -> Training:
        return Training(backbone, METHODS.build("shiva", {"router_lr": 3e-3, "policy_lr": 3e-2}), config, data)

    for rungs in ((), (3, 9, 13)):
        store = Store(tmp_path / str(len(rungs)))
        seen.clear()
        for steps in rungs:
            curves = training().curves(store, steps, lambda *said: seen.append(said))
            assert max(step for step, _ in curves["train/diffusion"]) == steps - 1 and curves["val/dense_mse"][-1][0] < steps
        last = training()
        trained = last.run(store, lambda *said: seen.append(said))
        assert len(seen) == len(set(seen)) == 16, "no step is trained twice"
        results.append((last.method.state_dict(), trained.series))
    (one, curves_one), (other, curves_other) = results
    assert all(one[name].equal(other[name]) for name in one) and curves_one == curves_other
    again = training().curves(Store(tmp_path / "3"), 9, lambda *said: pytest.fail("what is stored is cut, not trained"))
    assert again["val/dense_mse"] == [point for point in curves_one["val/dense_mse"] if point[0] < 9]
