"""A sweep can be stopped at any moment and continued; a failure is a row; nothing is computed twice."""

import errno
import json
import os
import shutil
import signal
import time
from io import StringIO
from pathlib import Path

import fake_sweep
import pytest
from rich.console import Console

from harness import run as command
from harness.api import METHODS, ConfigError
from harness.execution import driver, pool, preview, progress, results_folder, worker
from harness.execution.driver import DONE, FAILED, INTERRUPTED, REFUSED, Options, run_sweep
from harness.execution.results_folder import ResultsFolder
from harness.sweep import resolve
from harness.sweep.file import load
from harness.trial import identity


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The fake sweep in an empty folder: `sweep(**options)` runs it here and returns the exit code."""
    fake_sweep.install(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "fake.yaml").write_text(fake_sweep.TEXT)
    return Sweep(tmp_path)


class Sweep:
    """One sweep file and its results folder."""

    def __init__(self, place: Path) -> None:
        self.file, self.results, self.folder = place / "fake.yaml", place / "results", place / "results" / "fake"
        self.output = ""

    def __call__(self, **options) -> int:
        self.results.mkdir(exist_ok=True)
        screen = StringIO()
        settings = {"results": self.results, "local": True, "run_job": fake_sweep.run_job, "publish": False, **options}
        try:
            return run_sweep(self.file, Options(**settings), Console(file=screen, width=200))
        finally:
            self.output = screen.getvalue()

    def orders(self, *lines: str) -> None:
        """See `fake_sweep.run_job`."""
        self.results.mkdir(exist_ok=True)
        (self.results / "orders").write_text("\n".join(lines))

    def rows(self) -> dict[str, dict]:
        """label -> result, as written, in the order of the sweep."""
        header = json.loads((self.folder / "sweep.json").read_text())
        results = [json.loads((self.folder / f"{trial_id}.json").read_text()) for trial_id in header["trial_ids"]]
        return {result["label"]: result for result in results}

    def part(self, ratio: float, job: str) -> Path:
        """Path of the part of random_drop at `ratio`."""
        return self.folder / "parts" / f"{self.rows()[f'random_drop keep_ratio={ratio}']['trial_id']}.{job}.json"


ALL = ["score 1", "score 0.9", "score 0.5", "timing 1", "timing 0.9", "timing 0.5"]


def test_every_trial_gets_both_jobs_dense_first_and_timing_last(sweep):
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == ALL
    rows = sweep.rows()
    assert list(rows) == ["dense", "random_drop keep_ratio=0.9", "random_drop keep_ratio=0.5"]
    for row in rows.values():
        assert row["status"] == "done" and row["error"] is None
        assert set(row["metrics"]) == {"fidelity/fake_4", "latency/fake_ms"}
        assert row["environment"] == {"score": {"threads": 1}, "timing": {"threads": 1}}
    assert (sweep.folder / "sweep.yaml").read_text() == fake_sweep.TEXT


def test_a_second_run_computes_nothing(sweep):
    sweep()
    before = {path: path.stat().st_mtime_ns for path in sweep.folder.glob("*.json") if path.name != "sweep.json"}
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == ALL
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_failing_trial_is_a_row_with_its_error_and_is_tried_again(sweep):
    sweep.orders("score 0.9 raise")
    assert sweep() == FAILED
    assert fake_sweep.diary(sweep.results) == ["score 1", "score 0.5", "timing 1", "timing 0.5"]
    row = sweep.rows()["random_drop keep_ratio=0.9"]
    assert row["status"] == "failed"
    assert (row["error"]["job"], row["error"]["type"], row["error"]["message"]) == ("score", "ValueError", "no such token")
    assert "fake_sweep.py" in row["error"]["traceback"]
    assert "no such token" in (sweep.folder / "artifacts" / row["trial_id"] / "score.log").read_text()
    assert "ValueError: no such token" in sweep.output

    sweep.orders()
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results)[4:] == ["score 0.9", "timing 0.9"]
    assert sweep.rows()["random_drop keep_ratio=0.9"]["status"] == "done"


def test_ctrl_c_keeps_what_is_finished(sweep):
    sweep.orders("score 0.5 interrupt")
    assert sweep() == INTERRUPTED
    assert "run the same command again to continue" in sweep.output
    written = [json.loads(path.read_text()) for path in sweep.folder.glob("*.json") if path.name != "sweep.json"]
    assert [result["status"] for result in written] == ["partial", "partial"]
    sweep.orders()
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == ALL


def test_a_second_ctrl_c_says_that_finished_jobs_are_kept(sweep, monkeypatch, capsys):
    """It may come while the first one is being dealt with, or while the report is drawn."""
    def again(*given):
        raise KeyboardInterrupt

    sweep.orders("score 0.5 interrupt")
    with monkeypatch.context() as during:
        during.setattr(worker, "_default", lambda job: fake_sweep.run_job)
        during.setattr(driver._Driver, "_tracker", lambda driver: None)
        during.setattr(driver._Driver, "_publish", again)
        assert command.main([str(sweep.file), "--local", "--results", str(sweep.results)]) == INTERRUPTED
    said = capsys.readouterr()
    assert "jobs are finished and kept; run the same command again to continue" in said.out
    assert "Traceback" not in said.err + said.out
    sweep.orders()
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == ALL


def test_where_the_last_part_cannot_be_written_the_run_ends_in_words(sweep, monkeypatch):
    """With every other result merged before, nothing else would meet the full disk, and the run looked as if it was stopped."""
    def full(*given, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run_job(job, trial, *rest) -> dict:
        if f"{job} {trial['method'].get('keep_ratio', 1)}" == "timing 0.5":
            time.sleep(4 * progress.POLL_S)
            monkeypatch.setattr(results_folder, "put_text", full)
        return fake_sweep.run_job(job, trial, *rest)

    with pytest.raises(ConfigError, match="nothing more can be written there .No space left on device"):
        sweep(run_job=run_job)


# ---------------------------------------------------------------------------------------------- a folder that is deleted


def deleted(sweep) -> None:
    shutil.rmtree(sweep.folder)


def moved(sweep) -> None:
    sweep.folder.rename(sweep.file.parent / "elsewhere")


def made_anew(sweep) -> None:
    """By a second driver, which has the lock of the new folder."""
    deleted(sweep)
    ResultsFolder(sweep.folder).begin(resolve.resolve(load(sweep.file)))
    (sweep.folder / ".lock").touch()
    (sweep.folder / ".driver").write_text("process 1 on another node")


@pytest.mark.parametrize("gone", [deleted, moved, made_anew])
@pytest.mark.parametrize("when", ["score 0.9", "timing 0.5"])
def test_a_driver_whose_folder_is_gone_ends_in_words_and_writes_nothing_more(sweep, monkeypatch, gone, when):
    monkeypatch.setattr(progress, "POLL_S", 60.0)  # so that it notices when it writes

    def run_job(job, trial, *rest) -> dict:
        if f"{job} {trial['method'].get('keep_ratio', 1)}" == when:
            gone(sweep)
            run_job.left = files(sweep.results)
        return fake_sweep.run_job(job, trial, *rest)

    with pytest.raises(ConfigError, match=r"fake: was deleted, moved or replaced while .*Run the same command again"):
        sweep(run_job=run_job)
    assert files(sweep.results) == run_job.left
    sweep.results.joinpath("diary").unlink()
    assert sweep() == DONE and fake_sweep.diary(sweep.results) == ALL


def files(place: Path) -> set[str]:
    return {str(path) for path in place.rglob("*") if path.name != "diary" and ".cache" not in path.parts}


def test_a_job_that_waits_is_interrupted_where_its_folder_is_gone(sweep):
    """Nothing is written meanwhile by which it could notice: the watch does, and stops it as Ctrl-C would."""
    def run_job(job, trial, *rest) -> dict:
        deleted(sweep)
        began = time.monotonic()
        while time.monotonic() - began < 60:
            time.sleep(0.01)
        return {}

    began = time.monotonic()
    with pytest.raises(ConfigError, match="was deleted, moved or replaced"):
        sweep(run_job=run_job)
    assert time.monotonic() - began < 30 and not sweep.folder.exists()


def test_a_worker_of_a_driver_whose_folder_was_made_anew_writes_nothing_there(sweep):
    """On another node, or from before its driver was killed."""
    folder, (job, *_) = jobs_of(sweep)
    with folder.locked():
        folder.begin(resolve.resolve(load(sweep.file)))
        held = folder.held
        os.replace(sweep.folder, sweep.results / "old")
        for place in ("deleted", "anew"):
            if place == "anew":
                made_anew_beside(sweep)
            before = files(sweep.results)
            with pytest.raises(ConfigError, match="was deleted, moved or replaced"):
                worker.run(job, folder.path, fake_sweep.run_job, held=held)
            assert files(sweep.results) == before
            assert not folder.wait_for_part(job, seconds=60)
    assert (sweep.folder / ".driver").read_text() == "process 1 on another node", "it is not ours to remove"


def made_anew_beside(sweep) -> None:
    sweep.folder.mkdir()
    made_anew(sweep)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"metrics": {}}'])
def test_a_damaged_part_is_missing_work(sweep, damage):
    sweep()
    sweep.part(0.5, "timing").write_text(damage)
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == [*ALL, "timing 0.5"]
    assert sweep.rows()["random_drop keep_ratio=0.5"]["status"] == "done"


def test_a_part_of_another_trial_is_missing_work(sweep):
    sweep()
    part = json.loads(sweep.part(0.5, "timing").read_text())
    part["trial"]["seeds"] = [0, 4]
    sweep.part(0.5, "timing").write_text(json.dumps(part))
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == [*ALL, "timing 0.5"]


def test_an_equal_trial_of_another_sweep_is_taken_over_and_only_timed_again(sweep):
    sweep()
    sweep.file.write_text(fake_sweep.TEXT.replace("name: fake", "name: other").replace("[0.9, 0.5]", "[0.5, 0.3]"))
    sweep.folder = sweep.results / "other"
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results)[6:] == ["score 0.3", "timing 1", "timing 0.5", "timing 0.3"]
    rows = sweep.rows()
    assert rows["random_drop keep_ratio=0.5"]["environment"]["score"]["adopted_from"] == "fake"
    assert rows["random_drop keep_ratio=0.5"]["metrics"]["fidelity/fake_4"]["value"] == 0.5
    assert "adopted_from" not in rows["random_drop keep_ratio=0.3"]["environment"]["score"]


def test_what_other_code_made_is_not_taken_over(sweep, monkeypatch):
    sweep()
    monkeypatch.setattr(identity, "code_hash", lambda *_: "edited")
    sweep.file.write_text(fake_sweep.TEXT.replace("name: fake", "name: other"))
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results)[6:] == ALL


def test_editing_a_method_runs_its_trials_again_and_no_others(sweep, monkeypatch):
    sweep()
    real = identity.code_hash
    monkeypatch.setattr(identity, "code_hash", lambda *parts: real(*parts) + "x" * (METHODS.get("random_drop") in parts))
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results)[6:] == ["score 0.9", "score 0.5", "timing 0.9", "timing 0.5"]


def test_results_made_before_by_other_code_are_said_to_be_and_made_again(sweep):
    sweep()
    parts = sorted((sweep.folder / "parts").glob("*.json"))
    for path in parts:  # as an earlier version left them
        path.write_text(json.dumps({**json.loads(path.read_text()), "code": "0123456789abcdef"}))
    assert sweep() == DONE
    assert f"{sweep.folder}: 6 finished jobs are not used, for they were made by other code; made again here." in sweep.output
    assert sorted(fake_sweep.diary(sweep.results)[6:]) == sorted(ALL)
    assert {row["code"] for row in sweep.rows().values()} == {json.loads(path.read_text())["code"] for path in parts}
    assert sweep() == DONE and "not used" not in sweep.output


def test_results_of_a_version_with_other_options_are_said_to_be_and_left_alone(sweep):
    sweep()
    for path in sorted((sweep.folder / "parts").glob("*.json")):  # it knew nothing of `attention`, and of an option `old`
        part = json.loads(path.read_text())
        del part["trial"]["sampler"]["attention"]
        part["trial"]["method"]["old"], part["code"] = 1, "0123456789abcdef"
        path.with_name(f"{'0' * 11}{path.name[0]}.{path.name.split('.', 1)[1]}").write_text(json.dumps(part))
        path.unlink()
    assert sweep() == DONE and "made by a version of the code with other options (sampler.attention, method.old)" in sweep.output
    assert len(fake_sweep.diary(sweep.results)) == 12
    sweep.file.write_text(fake_sweep.TEXT.replace("num_steps: 4", "num_steps: 8"))  # what the user asks now is no news
    shutil.rmtree(sweep.folder)
    sweep()
    sweep.file.write_text(fake_sweep.TEXT)
    assert sweep() == DONE and "not used" not in sweep.output


def test_a_format_that_this_cpu_only_emulates_is_named_before_the_night_is_lost(sweep, monkeypatch):
    speeds = {"float32": 40.0, "bfloat16": 1.0, "float16": 39.0}
    monkeypatch.setattr(preview, "gflops_per_s", lambda threads, dtype, seconds=None: speeds[dtype])
    for dtype, told in (("bfloat16", True), ("float16", False), ("float32", False)):
        monkeypatch.setattr(preview, "cpu_dtypes", lambda sweep, dtype=dtype: {dtype})
        sweep.file.write_text(fake_sweep.TEXT.replace("name: fake", f"name: {dtype}"))
        sweep()
        assert ("40 times slower than float32: set backbone.dtype: float32" in sweep.output) == told


def test_other_timing_threads_time_again_and_sample_nothing(sweep):
    sweep.file.write_text(fake_sweep.TEXT.replace("{workers: 2}", "{timing_threads: 1}"))
    sweep()
    part = json.loads(sweep.part(0.5, "timing").read_text())
    assert part["threads"] == 1
    sweep.part(0.5, "timing").write_text(json.dumps({**part, "threads": 7}))
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == [*ALL, "timing 0.5"]


def test_a_failure_of_an_earlier_run_is_not_told_as_one_of_this(sweep):
    sweep.orders("score 0.9 raise")
    sweep()
    failed = sweep.rows()["random_drop keep_ratio=0.9"]["trial_id"]
    sweep.orders("score 0.9 interrupt")
    assert sweep() == INTERRUPTED
    assert "FAILED" not in sweep.output and not (sweep.folder / f"{failed}.json").exists()


def test_a_stop_outside_a_job_tells_what_is_finished(sweep, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.execution.driver._Driver._publish", stopped)
    assert sweep() == INTERRUPTED
    assert "Stopped. 6 of 6 jobs are finished and kept; run the same command again to continue." in sweep.output
    assert "before any job" not in sweep.output


def test_a_job_keeps_when_it_began_and_ended_also_where_it_failed(sweep):
    def stamped(*arguments):
        return {**fake_sweep.run_job(*arguments), "timestamp_ms": int(1000 * time.time())}

    before = 1000 * time.time() - 1
    sweep.orders("score 0.9 raise")
    sweep(run_job=stamped)
    for label, row in sweep.rows().items():
        assert set(row["times"]) == {"score", "timing"}, label
        assert all(before <= began <= ended <= 1000 * time.time() for began, ended in row["times"].values())
        assert row["timestamp_ms"] == max(ended for _, ended in row["times"].values())


def test_a_second_driver_is_refused_by_name_of_the_first(sweep):
    named = f"process {os.getpid()} .* is running this sweep"
    with ResultsFolder(sweep.folder).locked(), pytest.raises(ConfigError, match=named):
        sweep()
    assert sweep() == DONE


def test_a_full_disk_is_told_before_any_work(sweep, monkeypatch):
    monkeypatch.setattr("harness.execution.results_folder.MIN_FREE_BYTES", 2**80)
    with pytest.raises(ConfigError, match="MiB free"):
        sweep()


def test_a_dry_run_shows_the_trials_and_touches_nothing(sweep, monkeypatch, capsys):
    monkeypatch.setattr(preview, "_estimate", lambda entry: (120.0, 30.0, "153 256", ""))
    monkeypatch.setattr(preview, "PROBE_S", 0.01)
    monkeypatch.chdir(sweep.file.parent)
    monkeypatch.setenv("COLUMNS", "200")
    assert command.main(["fake.yaml", "--dry-run"]) == DONE
    shown = capsys.readouterr().out
    assert "random_drop keep_ratio=0.9" in shown and "6 of 6 jobs to do" in shown and "Estimate" in shown
    assert [path.name for path in sweep.file.parent.iterdir()] == ["fake.yaml"]


def test_a_user_error_exits_with_2_and_one_line(sweep, capsys):
    sweep.file.write_text(fake_sweep.TEXT.replace("keep_ratio", "keep_raito"))
    assert command.main([str(sweep.file)]) == REFUSED
    said = capsys.readouterr()
    assert "Did you mean 'keep_ratio'" in said.err and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert command.main([str(sweep.file), "--workers", "0"]) == REFUSED


def test_results_are_mirrored_and_reported_and_a_broken_report_loses_nothing(sweep, monkeypatch):
    seen = []

    class Tracker:
        def __init__(self, name, folder):
            seen.append(("new", name, folder.name))

        def start(self):
            seen.append("start")

        def sync(self, result):
            seen.append(result["label"])

        def finish(self, results, folder):
            seen.append(("finish", len(results), folder.name))

    def broken(folder):
        raise ZeroDivisionError("a plot")

    monkeypatch.setattr("harness.tracking.client.Tracker", Tracker)
    monkeypatch.setattr("harness.reporting.report.write_report", lambda folder: folder / "report.md")
    assert sweep(publish=True) == DONE
    assert seen[:2] == [("new", "fake", "fake"), "start"] and seen[-1] == ("finish", 3, "fake")
    assert {"dense", "random_drop keep_ratio=0.9", "random_drop keep_ratio=0.5"} <= set(seen[2:-1])
    assert "report.md" in sweep.output
    monkeypatch.setattr("harness.reporting.report.write_report", broken)
    assert sweep(publish=True) == FAILED
    assert "ZeroDivisionError: a plot" in sweep.output and "are whole" in sweep.output


# ---------------------------------------------------------------------------------------------- the display


def watch(folder: ResultsFolder, jobs, console: Console, explain=str) -> progress.Watch:
    return progress.Watch(folder, jobs, 0, 2, console, lambda job: None, explain)


def jobs_of(sweep: Sweep):
    described = resolve.resolve(load(sweep.file))
    folder = ResultsFolder(sweep.folder)
    folder.begin(described)
    return folder, folder.missing(described)


def test_retake_runs_the_disturbed_timings_alone(sweep):
    assert sweep() == DONE
    part = sorted(sweep.folder.glob("parts/*.timing.json"))[0]
    written = json.loads(part.read_text())
    part.write_text(json.dumps({**written, "environment": {"latency/ratio_to_dense": {"contaminated": True}}}))
    before = len(fake_sweep.diary(sweep.results))
    assert sweep() == DONE and len(fake_sweep.diary(sweep.results)) == before
    assert sweep(retake=True) == DONE
    assert len(fake_sweep.diary(sweep.results)) == before + 1 and fake_sweep.diary(sweep.results)[-1].startswith("timing")
    assert "1 disturbed timing(s) will be taken again" in sweep.output


def test_a_full_disk_is_told_in_words_and_once_by_the_display(sweep, monkeypatch, caplog):
    folder, jobs = jobs_of(sweep)
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    told = []

    def full(job):
        told.append(job)
        raise OSError(28, "No space left on device")

    with progress.Watch(folder, jobs, 0, 2, Console(file=StringIO()), full, str):
        for job in jobs[:2]:
            folder.write_part(job, {"metrics": {}}, 1)
        while len(told) < 2:
            time.sleep(0.01)
    said = [record for record in caplog.records if record.name == "harness.execution.progress"]
    assert len(said) == 1 and "No space left" in said[0].getMessage() and not said[0].exc_info


def test_the_live_view_names_running_jobs_and_the_time_left(sweep):
    folder, jobs = jobs_of(sweep)
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    view = watch(folder, jobs, console)
    for job in jobs[:2]:
        folder.progress_path(job.key).write_text(json.dumps({"stage": "sample", "done": 1, "total": 4, "pid": 1}))
    view.poll()
    folder.write_part(jobs[0], {"metrics": {}}, 1)
    view.poll()
    drawn = Console(file=StringIO(), width=120)
    drawn.print(view._view())
    text = drawn.file.getvalue()
    assert "random_drop keep_ratio=0.9" in text and "25%" in text and "1/6 jobs, 4 waiting" in text
    assert jobs[0].label not in text.splitlines()[1]


def test_a_part_from_before_is_not_taken_for_the_outcome_of_this_run(sweep):
    folder, jobs = jobs_of(sweep)
    folder.write_part(jobs[0], {"metrics": {}}, 1)
    view = watch(folder, jobs, Console(file=StringIO(), width=120))
    view.poll()
    assert jobs[0] in view.unfinished()
    folder.write_part(jobs[0], {"metrics": {}}, 1)
    view.poll()
    assert jobs[0] not in view.unfinished()


def test_when_nothing_starts_the_reason_is_said(sweep, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    folder, jobs = jobs_of(sweep)
    screen = StringIO()
    view = watch(folder, jobs, Console(file=screen, width=120), lambda: "Another program holds the node.")
    time.sleep(0.01)
    view.poll()
    assert "Another program holds the node." in screen.getvalue()


# ---------------------------------------------------------------------------------------------- Ray


def test_score_jobs_share_a_node_and_a_timing_job_takes_it_whole():
    for workers in (1, 2, 3, 7, 16):
        share = pool.Share(workers=workers, cpus=1, gpus=0)
        slot = share.bundle(alone=False)["node_slot"]
        assert workers * slot <= 1 < (workers + 1) * slot
        assert share.bundle(alone=True)["node_slot"] == 1


@pytest.mark.parametrize(("address", "says"), [("127.0.0.1:9", "no answer"), ("auto", "host:port"), ("ray://h:1", "host:port")])
def test_a_wrong_ray_address_is_refused_within_seconds(address, says, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=says), pool.Cluster(pool.Share(1, 1, 0)):
        pass
    assert time.monotonic() - began < 5
