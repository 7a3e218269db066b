"""Drivers, workers and nodes die, memory and disks run out: what was finished stays, and MLflow holds each trial once.

These are real processes, killed by signal. A job costs nothing, and writes into a diary that it came to its end.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fake_sweep
import psutil
import pytest
from test_run import Sweep

from harness.api import ConfigError
from harness.execution import worker
from harness.execution.driver import DONE, FAILED, REFUSED
from harness.execution.results_folder import Job, ResultsFolder
from harness.tracking.client import open_client

HERE = Path(__file__).parent
RATIOS = ("1", "0.9", "0.8", "0.7", "0.55", "0.5")
SCORES, TIMINGS = ([f"{kind} {ratio}" for ratio in RATIOS] for kind in ("score", "timing"))
DRIVER = """
import sys
from pathlib import Path
import fake_sweep
import harness.reporting.report
from rich.console import Console
from harness.api import ConfigError
from harness.execution.driver import REFUSED, Options, run_sweep

fake_sweep.install()
harness.reporting.report.write_report = lambda folder: folder
options = Options(results=Path(sys.argv[2]), run_job=fake_sweep.run_job, local="--local" in sys.argv)
try:
    sys.exit(run_sweep(sys.argv[1], options, Console(width=200)))
except ConfigError as error:
    sys.stderr.write(f"{error}\\n")
    sys.exit(REFUSED)
"""


class Killed(Sweep):
    """A sweep of six trials that other processes run."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.file.write_text(fake_sweep.TEXT.replace("[0.9, 0.5]", "[0.9, 0.8, 0.7, 0.55, 0.5]"))

    @property
    def diary(self) -> list[str]:
        return fake_sweep.diary(self.results)

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        known = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        known |= {"PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE))), **environment}
        return subprocess.Popen([sys.executable, "-c", DRIVER, str(self.file), str(self.results), *options], env=known, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(self, driver: subprocess.Popen) -> str:
        """What the driver said until it ended by itself."""
        timer = threading.Timer(240, driver.kill)
        timer.start()
        self.output, _ = driver.communicate()
        timer.cancel()
        return self.output

    def life(self, *options: str, **environment: str) -> int:
        """Exit code of one driver."""
        driver = self.start(*options, **environment)
        self.finish(driver)
        return driver.returncode

    def errors(self) -> dict[str, str]:
        """keep_ratio -> type of the error, of the trials that failed."""
        return {label.rpartition("=")[2]: row["error"]["type"] for label, row in self.rows().items() if row["status"] == "failed"}

    def assert_mirrored(self) -> None:
        """MLflow holds every trial once, with the status and the values of its result."""
        client = open_client(f"sqlite:///{self.results / 'mlflow.db'}")
        runs = client.search_runs([client.get_experiment_by_name("fake").experiment_id])
        shown = Counter((run.data.tags["trial_id"], run.info.status) for run in runs)
        rows = self.rows().values()
        assert shown == Counter((row["trial_id"], {"done": "FINISHED", "failed": "FAILED"}[row["status"]]) for row in rows)
        results = {row["trial_id"]: row for row in rows}
        for run in runs:
            result = results[run.data.tags["trial_id"]]
            assert (result["error"] is None) == ("error" not in run.data.tags)
            for name, measure in result["metrics"].items():
                assert [point.value for point in client.get_metric_history(run.info.run_id, name)] == [measure["value"]]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    fake_sweep.install(monkeypatch)
    return Killed(tmp_path)


def wait_for(condition, driver: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while not condition():
        if driver.poll() is not None or time.monotonic() > end:
            driver.kill()
            pytest.fail(f"the driver ended, or nothing happened: {driver.communicate()[0]}")
        time.sleep(0.1)


@pytest.mark.processes
def test_whatever_dies_costs_only_what_was_running(sweep):
    """First driver: SIGKILL while a timing hangs. Second: workers are killed once or always, run out of memory, raise."""
    sweep.orders("timing 0.9 hang")
    driver = sweep.start()
    wait_for(lambda: "timing 1" in sweep.diary, driver)
    with pytest.raises(ConfigError, match=f"process {driver.pid} .* is running this sweep"):
        sweep()
    time.sleep(1)  # into the timing, and into MLflow
    driver.kill()
    driver.communicate()
    first = sweep.diary
    assert sorted(first) == sorted([*SCORES, "timing 1"])

    sweep.orders("timing 0.9 die", "timing 0.8 kill", "timing 0.7 allocate", "timing 0.55 raise")
    assert sweep.life() == FAILED, sweep.output
    assert "12 jobs, 7 of them finished before" in sweep.output
    assert "Traceback" not in sweep.output and "raylet" not in sweep.output
    assert sorted(sweep.diary[len(first):]) == ["timing 0.5", "timing 0.9"]
    errors = sweep.errors()
    assert list(errors) == ["0.8", "0.7", "0.55"] and errors["0.7"] == "MemoryError" and errors["0.55"] == "ValueError"
    killed = sweep.rows()["random_drop keep_ratio=0.8"]["error"]["message"]
    assert "Ray says: The actor is dead because its worker process has died" in killed
    assert_timing_ran_alone(sweep.results)
    sweep.assert_mirrored()


@pytest.mark.processes
def test_where_the_results_are_deleted_the_sweep_stops_in_words_and_leaves_nothing(sweep):
    """With a job running on Ray that comes to its end meanwhile, and would write its part."""
    sweep.orders("timing 0.9 hang")
    driver = sweep.start()
    wait_for(lambda: "timing 1" in sweep.diary, driver)
    time.sleep(1)
    shutil.rmtree(sweep.folder)
    (sweep.results / "go").touch()
    said = sweep.finish(driver)
    assert driver.returncode == REFUSED, said
    assert "was deleted, moved or replaced while its sweep ran" in said and "Traceback" not in said
    assert not sweep.folder.exists()


def assert_timing_ran_alone(results: Path) -> None:
    lines = [line.split() for line in (results / "diary").read_text().splitlines()]
    spans = [(job, float(began), float(ended)) for job, _, _, began, ended in lines]
    for job, began, ended in spans:
        others = [span for span in spans if span != (job, began, ended) and span[1] < ended and began < span[2]]
        assert job != "timing" or not others


@pytest.mark.processes
def test_where_nothing_more_can_be_written_the_sweep_stops_in_words_and_resumes(sweep):
    """By a limit on the size of files, which every system has."""
    sweep.orders("score 0.7 limit")
    assert sweep.life("--local") == REFUSED, sweep.output
    assert "nothing more can be written there" in sweep.output and "Traceback" not in sweep.output
    first = sweep.diary
    assert first == SCORES[:3] and not list(sweep.folder.rglob(".*.tmp"))
    sweep.orders()
    assert sweep.life("--local") == DONE, sweep.output
    assert sweep.diary[:3] == first and sorted(sweep.diary) == sorted(SCORES + TIMINGS)
    sweep.assert_mirrored()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here that is always full")
def test_a_full_disk_takes_the_log_and_not_the_trial():
    with worker._logged(Path("/dev/full"), capture=True):
        sys.stdout.write("a line\n")
        sys.stderr.write("the beginning of a line")


def test_a_part_that_another_node_wrote_is_waited_for(tmp_path, caplog):
    """On a network file system a new file can appear late; without a wait the driver would take the job for unfinished."""
    job, folder = Job("score", "abc", "dense", "code", 1, {}), ResultsFolder(tmp_path)
    folder.part_path(job.key).parent.mkdir()
    assert not folder.wait_for_part(job, seconds=0.3) and "do all nodes share this folder?" in caplog.text
    timer = threading.Timer(0.5, lambda: folder.write_part(job, {}, 1))
    timer.start()
    assert folder.wait_for_part(job, seconds=60) and folder.finished(job)


@pytest.fixture
def nodes():
    """Two nodes of one core each; yields (address, the second node's raylet)."""
    import ray
    from ray.cluster_utils import Cluster

    slot = {"num_cpus": 1, "resources": {"node_slot": 1}, "include_dashboard": False, "object_store_memory": 2**27}
    cluster = Cluster(initialize_head=True, head_node_args=slot)
    try:
        second = cluster.add_node(**{key: value for key, value in slot.items() if key != "include_dashboard"})
        cluster.wait_for_nodes()
        yield cluster.address, psutil.Process(second.all_processes["raylet"][0].process.pid)
    finally:
        cluster.shutdown()
        ray.shutdown()


@pytest.fixture
def small_disk(sweep):
    """A disk of 260 MiB under the results, where the system lets us mount one; yields whether it did."""
    sweep.results.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=260m", "tmpfs", sweep.results], capture_output=True,
                             check=False).returncode == 0
    yield mounted
    if mounted:
        subprocess.run(["umount", "-l", sweep.results], check=True)


@pytest.mark.processes
def test_a_lost_node_and_a_full_disk(sweep, small_disk, nodes):
    """One driver loses a node in the middle, and fills the disk at its last timing; the next one finishes."""
    address, raylet = nodes
    sweep.orders("score 1 hang", "score 0.9 hang", *["timing 0.5 fill"] * small_disk)
    driver = sweep.start(RAY_ADDRESS=address)
    wait_for(lambda: len(pids(sweep)) == 2, driver)
    (lost,) = (pids(sweep)[child.pid] for child in raylet.children() if child.pid in pids(sweep))
    for process in (*raylet.children(), raylet):
        process.kill()
    (sweep.results / "go").touch()
    sweep.finish(driver)
    assert "Traceback" not in sweep.output and "WorkerDied" not in sweep.output, sweep.output
    if small_disk:
        assert driver.returncode != DONE and "make room" in sweep.output.lower()
        (sweep.results / "ballast").unlink()
        sweep.orders()
        assert sweep.life(RAY_ADDRESS=address) == DONE, sweep.output
    assert sorted(sweep.diary) == sorted(SCORES + TIMINGS) and not sweep.errors()
    assert (sweep.folder / "artifacts" / lost / "score.log").read_text().count("INFO harness.execution.worker: score job") >= 2
    sweep.assert_mirrored()


def pids(sweep: Sweep) -> dict[int, str]:
    """Process -> trial id, of the jobs that have begun."""
    return {json.loads(path.read_text())["pid"]: path.name.split(".")[0] for path in (sweep.folder / ".progress").glob("*.json")}
