"""Answers that are lost or late, sweeps that are large, two drivers at once, folders that move: MLflow shows each trial once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_results import STEPS, write_result
from fake_server import Proxy, mlflow_server
from fake_tracking import history_lengths, mirrored, runs_of
from mlflow.tracking._tracking_service import utils

from harness.execution.results_folder import ResultsFolder
from harness.tracking import limits, mapping
from harness.tracking import requests as tracking_requests
from harness.tracking.client import Tracker, default_uri, open_client
from harness.tracking.runs import Runs
from harness.tracking.ui import main

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------------- lost and late answers


@pytest.mark.processes
@pytest.mark.parametrize("what", ["runs/create", "experiments/create", "runs/log-batch", "runs/log-inputs", "runs/set-tag"])
@pytest.mark.parametrize("late", [0.0, 1.5], ids=["lost", "late"])
def test_an_answer_that_is_lost_or_late_makes_nothing_twice(sweep, monkeypatch, what, late):
    folder, results, _ = sweep
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking_requests, "PAUSE_S", 0.1)
    results, twice = results[:2], 2 if what == "runs/create" else 1  # the sweep's run and a trial's
    for path in folder.glob("*.json"):
        if path.stem not in {"sweep", *(result["trial_id"] for result in results)}:
            path.unlink()
    with mlflow_server(folder.parent, folder.parent / "mlflow.db", monkeypatch) as port:
        proxy = Proxy(port, what, twice, late)
        tracker = Tracker(folder.name, folder, uri=proxy.address)
        tracker.start()
        tracker.finish(results, folder)
        assert tracker.errors == 0 and proxy.left == 0 and proxy.asked >= twice
        client = open_client(f"http://127.0.0.1:{port}")
        time.sleep(late)
        assert set(runs_of(client)) == {result["trial_id"] for result in results}
        assert len(runs_of(client, "ablation-sweeps")) == 1
        assert set(history_lengths(client).values()) == {1, STEPS}
        assert all(len(run.inputs.dataset_inputs) == 1 for run in runs_of(client).values())
        proxy.close()


def test_runs_that_came_through_late_are_removed_by_the_next_look(sweep):
    folder, results, client = sweep
    mirrored(folder, results)
    before = runs_of(client)
    for name in ("ablation", "ablation-sweeps"):
        for run in runs_of(client, name).values():
            tags = {key: text for key, text in run.data.tags.items() if key != "mirrored"}
            client.create_run(run.info.experiment_id, tags=tags, run_name=run.info.run_name, start_time=run.info.start_time + 1)
    assert len(client.search_runs([client.get_experiment_by_name("ablation").experiment_id])) == 2 * len(results)
    assert main(["--sync", str(folder)]) == 0
    assert {id_: run.info.run_id for id_, run in runs_of(client).items()} == {
        id_: run.info.run_id for id_, run in before.items()}
    assert len(runs_of(client, "ablation-sweeps")) == 1


def test_a_run_that_came_through_late_is_removed_at_the_end_of_the_sweep(sweep, monkeypatch):
    folder, results, client = sweep
    conclusion = Runs.conclusion

    def late(runs, *arguments):
        for run in runs_of(client).values():
            client.create_run(run.info.experiment_id, tags={**run.data.tags, "mlflow.note.content": "late"})
        yield from conclusion(runs, *arguments)

    monkeypatch.setattr(Runs, "conclusion", late)
    mirrored(folder, results)
    shown = runs_of(client)
    assert set(shown) == {result["trial_id"] for result in results}
    assert not any("mlflow.note.content" in run.data.tags for run in shown.values())


# ---------------------------------------------------------------------------------------------- large sweeps and long texts


@pytest.fixture
def large(sweep):
    """300 small trials. Returns (folder, results, client)."""
    folder, results, client = sweep
    for path in folder.glob("*.json"):
        path.unlink()
    small = {**results[1], "series": {}, "per_image": {}, "executed": {}}
    small["metrics"] = dict(list(small["metrics"].items())[:2])
    results = [{**small, "trial_id": f"{i:012x}", "label": f"shiva -24% router_groups={i}"} for i in range(300)]
    for result in results:
        write_result(folder, result)
    header = {"name": "ablation", "question": "Which?", "trial_ids": [result["trial_id"] for result in results],
              "labels": {result["trial_id"]: result["label"] for result in results}}
    (folder / "sweep.json").write_text(json.dumps(header), encoding="utf-8")
    return folder, results, client


def test_a_large_sweep_ends_whole(large, tmp_path, monkeypatch):
    folder, results, client = large
    for slow in ("_log_files", "_log_data_sets", "_log_values", "_set_status"):  # of 300 trials; what is closed here is the sweep
        monkeypatch.setattr(Runs, slow, lambda *_: None)
    mirrored(folder, results)
    experiments = [client.get_experiment_by_name(name) for name in ("ablation", "ablation-sweeps")]
    (run,) = client.search_runs([experiments[1].experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["trials/done"] == 300
    view = mapping.VIEW_TAG + mapping.view_name(ResultsFolder(folder).identity)
    assert json.loads(experiments[0].tags[view])["compareRunCharts"]
    note = run.data.tags["mlflow.note.content"]
    assert experiments[0].tags["mlflow.note.content"] == note and len(note) <= limits.TAG
    assert "more: see `trials.md`" in note and note.endswith("`report.md`.") and "the first 50 of 300" in note
    listed = Path(client.download_artifacts(run.info.run_id, "trials.md", str(tmp_path))).read_text()
    trials = client.search_runs([experiments[0].experiment_id], max_results=1000)
    assert len(trials) == 300 and all(trial.info.run_id in listed for trial in trials)
    compare = mapping.compare_link("1", [trial.info.run_id for trial in trials][:mapping.COMPARED])
    assert len(compare) < 2500


@pytest.mark.parametrize("step", ["_renew_sweep_run", "_summarize", "_describe", "_set_view", "_front", "_adopt",
                                  "remove_surplus"])
def test_a_failing_step_of_the_end_skips_no_other(sweep, monkeypatch, step):
    folder, results, client = sweep
    (folder / "report.md").write_text("# report", encoding="utf-8")

    def failing(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(Runs, step, failing)
    tracker = Tracker(folder.name, folder)
    tracker.start()
    tracker.finish(results, folder)
    assert tracker.errors >= 1
    (run,) = runs_of(client, "ablation-sweeps").values()
    assert run.info.status == "FINISHED" and "report.md" in [item.path for item in client.list_artifacts(run.info.run_id)]
    assert ("mlflow.note.content" in run.data.tags) == (step != "_describe")
    tags = client.get_experiment_by_name("ablation").tags
    assert any(name.startswith(mapping.VIEW_TAG) for name in tags) == (step != "_set_view")
    assert ("trials/done" in run.data.metrics) == (step != "_summarize")


@pytest.mark.parametrize("bad", ["foreign", "refused"])
def test_a_result_that_cannot_be_mirrored_leaves_the_others(sweep, monkeypatch, bad):
    """foreign: what lies there is no result, and counts as missing. refused: MLflow's client fails on it."""
    folder, results, client = sweep
    if bad == "foreign":
        write_result(folder, {"trial_id": "0" * 12, "status": "done", "label": "bad", "trial": []})
    else:
        params = mapping.params
        last = results[-1]["trial_id"]
        monkeypatch.setattr(mapping, "params", lambda result: 1 / 0 if result["trial_id"] == last else params(result))
    tracker = Tracker(folder.name, folder)
    tracker.start()
    tracker.finish(results, folder)
    others = {result["trial_id"] for result in results[:-1]}
    assert (tracker.errors >= 1) == (bad == "refused") and others <= set(runs_of(client))
    assert [run.info.status for run in runs_of(client, "ablation-sweeps").values()] == ["FINISHED"]


def test_every_text_has_room(sweep, tmp_path):
    folder, results, client = sweep
    long = "é" * 70_000
    result = results[1]
    result["status"], result["error"] = "failed", {"job": "score", "type": "E", "message": long, "traceback": "where"}
    result["label"] = "label " + "x" * 3000
    result["varied"]["method.plan"] = result["trial"]["method"]["plan"] = long
    result["trial"]["data"]["root"] = long
    result["environment"]["score"]["device"] = long
    result["environment"]["score"] |= {f"key{i}": "v" * 4900 for i in range(120)}
    result["metrics"]["group/" + "m" * 300 + "a"] = result["metrics"]["group/" + "m" * 300 + "b"] = {
        "value": 1.0, "better": "none", "interval": None, "n": None}
    write_result(folder, result)
    header = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**header, "question": long}), encoding="utf-8")
    mirrored(folder, results)
    run = runs_of(client)[result["trial_id"]]
    texts = [*run.data.tags.values(), *run.data.params.values()]
    assert max(map(len, texts)) <= limits.PARAM and len(run.info.run_name) <= limits.NAME
    assert "70010 characters, cut; whole in error.txt]" in run.data.tags["error"] \
        and "whole in result.json]" in run.data.params["plan"]
    assert sum(name.startswith("group/mmm") for name in run.data.metrics) == 2
    error = Path(client.download_artifacts(run.info.run_id, "error.txt", str(tmp_path))).read_text(encoding="utf-8")
    assert error == f"score: E: {long}\n\nwhere"


# ---------------------------------------------------------------------------------------------- the database


@pytest.mark.processes
def test_two_drivers_may_be_the_first_to_open_the_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = ("import sys; from harness.tracking.client import open_client; "
            "print(len(open_client(sys.argv[1]).search_experiments()))")
    uri = default_uri(tmp_path / "results")
    both = [subprocess.Popen([sys.executable, "-c", code, uri], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    ends = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert [out.strip() for out, _ in ends] == ["1", "1"]


@pytest.mark.parametrize("name", ["a?b=c", "50% off", "%41", "#1", "a b", "größe 木", "q'uote"])
def test_the_database_lies_beside_the_results_whatever_their_folder_is_called(sweep, tmp_path, name):
    folder, results, _ = sweep
    odd = tmp_path / name / "results"
    shutil.copytree(folder.parent, odd)
    before = set(tmp_path.rglob("*"))
    mirrored(odd / folder.name, results[:1])
    assert {path.relative_to(odd).parts[0] for path in set(tmp_path.rglob("*")) - before} <= {
        "mlartifacts", "ablation", ".mlflow.db.lock", "mlflow.db-journal"}
    client = open_client(default_uri(odd))
    run = runs_of(client)[results[0]["trial_id"]]
    assert "result.json" in [item.path for item in client.list_artifacts(run.info.run_id)]


def test_artifacts_are_found_after_results_have_moved(sweep, tmp_path):
    folder, results, client = sweep
    (folder / "report.md").write_text("# report", encoding="utf-8")
    mirrored(folder, results)
    (tmp_path / "archive").mkdir()
    moved = folder.parent.rename(tmp_path / "archive" / "50% of a?b")
    utils._artifact_repos_cache.clear()  # a driver that opens moved results is another process
    client = open_client(default_uri(moved))
    for name, file in (("ablation", "result.json"), ("ablation-sweeps", "report.md")):
        for run in runs_of(client, name).values():
            assert file in [item.path for item in client.list_artifacts(run.info.run_id)]
    mirrored(moved / folder.name, results)
    assert not folder.parent.exists()
