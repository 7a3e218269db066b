"""A run of MLflow holds one result: where the result changed there is another run, and each trial is shown once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from fake_results import _write_images, write_result
from fake_tracking import QUALITY, history_lengths, mirrored, runs_of

from harness.execution.results_folder import ResultsFolder
from harness.tracking.client import Tracker, default_uri
from harness.tracking.ui import pages


def test_a_changed_result_is_a_new_run_that_shows_nothing_of_the_old_one(sweep):
    folder, results, client = sweep
    changed = results[1]
    changed["metrics"]["odd/gone"] = {"value": 3.0, "better": "none", "interval": None, "n": None}
    _write_images(folder, changed)
    write_result(folder, changed)
    mirrored(folder, results)
    before, lengths = runs_of(client), history_lengths(client)
    old_picture = picture_of(client, before[changed["trial_id"]])
    del changed["metrics"]["odd/gone"]
    changed["metrics"]["latency/ms_per_image"]["value"] += 1.0
    changed["series"]["tokens/kept_attention"][0][1] = 0.123
    changed["timestamp_ms"] += 1000
    path = folder / changed["artifacts"]["images"]
    with np.load(path) as stored:
        np.savez(path, **{**stored, "images": 255 - stored["images"]})
    write_result(folder, changed)
    mirrored(folder, results)
    runs = runs_of(client)
    assert {id_ for id_ in runs if runs[id_].info.run_id != before[id_].info.run_id} == {changed["trial_id"]}
    run = runs[changed["trial_id"]]
    assert run.data.metrics["latency/ms_per_image"] == changed["metrics"]["latency/ms_per_image"]["value"]
    assert "odd/gone" not in run.data.metrics
    points = client.get_metric_history(run.info.run_id, "series/tokens.kept_attention")
    assert [[point.step, point.value] for point in points] == changed["series"]["tokens/kept_attention"]
    lengths.pop((changed["trial_id"], "odd/gone"))
    assert history_lengths(client) == lengths and picture_of(client, run) != old_picture
    old = client.get_run(before[changed["trial_id"]].info.run_id)
    assert old.info.lifecycle_stage == "deleted" and old.data.tags["superseded_by"] == run.info.run_id


def picture_of(client, run):
    """The bytes of the pictures that the chart page shows of a run; there is one file."""
    (path,) = (item.path for item in client.list_artifacts(run.info.run_id, "images")
               if Path(item.path).name.startswith("pictures") and item.path.endswith(".png"))
    return Path(client.download_artifacts(run.info.run_id, path)).read_bytes()


def test_a_changed_label_renames_the_run(sweep):
    folder, results, client = sweep
    mirrored(folder, results)
    before = runs_of(client)[results[1]["trial_id"]].info.run_id
    results[1]["label"] = "another name"
    write_result(folder, results[1])
    mirrored(folder, results)
    run = runs_of(client)[results[1]["trial_id"]]
    assert (run.info.run_id, run.info.run_name, run.data.tags["label"]) == (before, "another name", "another name")


def test_a_result_of_a_trial_that_the_sweep_no_longer_has_is_not_mirrored(sweep):
    folder, results, client = sweep
    old = {**results[1], "trial_id": "f" * 12}  # of other weights under the same path, say
    write_result(folder, old)
    mirrored(folder, results)
    assert set(runs_of(client)) == {result["trial_id"] for result in results}


def test_a_result_that_no_longer_counts_is_no_longer_shown(sweep):
    folder, results, client = sweep
    mirrored(folder, results)
    gone = results[1]
    (folder / f"{gone['trial_id']}.json").unlink()
    nothing = {name: {} for name in ("metrics", "per_image", "executed", "series", "artifacts", "environment", "stages", "usage")}
    results[1] = {**gone, **nothing, "status": "partial", "timestamp_ms": 0}  # as the driver merges a trial without a part
    mirrored(folder, results)
    assert set(runs_of(client)) == {result["trial_id"] for result in results} - {gone["trial_id"]}


def test_the_sweep_keeps_no_figure_that_is_gone(sweep):
    folder, results, client = sweep
    (folder / "report.md").write_text("# report", encoding="utf-8")
    (folder / "old.png").write_bytes(b"png")
    mirrored(folder, results)
    (before,) = runs_of(client, "ablation-sweeps").values()
    (folder / "old.png").rename(folder / "new.png")
    mirrored(folder, results)
    (run,) = runs_of(client, "ablation-sweeps").values()
    assert before.info.run_id != run.info.run_id
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"report.md", "new.png", "sweep.yaml", "sweep.json"}
    assert {trial.data.tags["mlflow.parentRunId"] for trial in runs_of(client).values()} == {run.info.run_id}
    mirrored(folder, results)
    assert runs_of(client, "ablation-sweeps")[run.info.run_name].info.run_id == run.info.run_id


def test_two_folders_with_a_sweep_of_one_name_keep_apart(sweep, tmp_path):
    folder, results, client = sweep
    other = tmp_path / "elsewhere" / "ablation"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns(".*"))
    mirrored(folder, results)
    different = [{**result, "metrics": {}} for result in results]
    for result in different:
        write_result(other, result)
    for _ in range(2):
        for place, shown in ((other, different), (folder, results)):
            tracker = Tracker("ablation", place, uri=default_uri(folder.parent))
            tracker.start()
            tracker.finish(shown, place)
            assert tracker.errors == 0
    runs = client.search_runs([client.get_experiment_by_name("ablation").experiment_id])
    for place, shown in ((folder, results), (other, different)):
        ours = [run for run in runs if run.data.tags["results_id"] == ResultsFolder(place).identity]
        assert sorted(run.data.tags["trial_id"] for run in ours) == sorted(result["trial_id"] for result in shown)
        assert all((QUALITY in run.data.metrics) == (place == folder) for run in ours)
    sweeps = client.search_runs([client.get_experiment_by_name("ablation-sweeps").experiment_id])
    assert len(sweeps) == 2 and len(runs) == 2 * len(results)
    assert sum("trials with charts" in what for what, _ in pages(client)) == len(dict(pages(client))) / 3 == 2


def test_a_moved_folder_keeps_its_identity_and_a_damaged_one_gets_another(tmp_path):
    first = ResultsFolder(tmp_path / "a").identity
    assert ResultsFolder(tmp_path / "a").identity == first and re.fullmatch("[0-9a-f]{32}", first)
    (tmp_path / "a").rename(tmp_path / "b")
    assert ResultsFolder(tmp_path / "b").identity == first != ResultsFolder(tmp_path / "a").identity
    (tmp_path / "b" / ".identity").write_text("half")
    assert re.fullmatch("[0-9a-f]{32}", ResultsFolder(tmp_path / "b").identity)


def test_a_run_has_the_times_of_its_jobs(sweep):
    folder, results, client = sweep
    results[0] |= {"times": {"score": [5_000, 9_000], "timing": [20_000, 21_000]}, "timestamp_ms": 21_000}
    results[1] |= {"usage": {"score": {"began_ms": 7_000, "curves": {}}}, "timestamp_ms": 12_000}
    results[2] |= {"timestamp_ms": 30_000}  # of a version that kept no beginning: none is made up
    for result in results:
        write_result(folder, result)
    mirrored(folder, results)
    runs = runs_of(client)
    shown = [(runs[r["trial_id"]].info.start_time, runs[r["trial_id"]].info.end_time) for r in results[:3]]
    assert shown == [(5_000, 21_000), (7_000, 12_000), (30_000, 30_000)]
    (run,) = runs_of(client, "ablation-sweeps").values()
    assert (run.info.start_time, run.info.end_time) == (5_000, max(result["timestamp_ms"] for result in results))


def test_runs_of_earlier_versions_are_replaced_and_not_doubled(sweep):
    folder, results, client = sweep
    experiments = [client.create_experiment(name) for name in ("ablation", "ablation-sweeps")]
    old = [client.create_run(experiments[0], tags={"trial_id": result["trial_id"], "sweep": "ablation", "result_hash": "old"})
           for result in results]
    swept = client.create_run(experiments[1], tags={"sweep": "ablation", "kind": "sweep"})  # neither said whose they were
    mirrored(folder, results)
    assert {run.data.tags["results_id"] for run in runs_of(client).values()} == {ResultsFolder(folder).identity}
    assert not {run.info.run_id for run in old} & {run.info.run_id for run in runs_of(client).values()}
    (run,) = runs_of(client, "ablation-sweeps").values()
    assert run.info.run_id == swept.info.run_id and run.data.tags["results_id"] == ResultsFolder(folder).identity
