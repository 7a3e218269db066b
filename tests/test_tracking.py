"""MLflow is a mirror: written once or ten times, by a sweep that lived or by one that was killed, it shows the same."""

from __future__ import annotations

import ast
import json
import logging
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fake_results import STEPS, make_sweep, write_result
from fake_tracking import QUALITY, data_sets_of, history_lengths, mirrored, runs_of

from harness.api import ConfigError
from harness.execution.results_folder import ResultsFolder
from harness.tracking import mapping
from harness.tracking.client import Tracker, default_uri
from harness.tracking.ui import main, pages, server

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------- once is enough


def test_mirroring_twice_changes_nothing(sweep):
    folder, results, client = sweep
    results[0]["trial"]["train"] = {"steps": 8}
    results[1]["usage"] = {"score": {"began_ms": 5000, "curves": {"process_memory_megabytes": [[10, 800.0], [20, 900.0]]}}}
    mirrored(folder, results)
    before, data = history_lengths(client), data_sets_of(client)
    assert set(runs_of(client)) == {r["trial_id"] for r in results} and set(before.values()) == {1, 2, STEPS}
    run = runs_of(client)[results[1]["trial_id"]]
    memory = client.get_metric_history(run.info.run_id, "system/score/process_memory_megabytes")
    assert [(point.step, point.timestamp, point.value) for point in memory] == [(10, 15000, 800.0), (20, 25000, 900.0)]
    for result in results:
        shown = data[result["trial_id"]]
        contexts = [("reference", "emoji/reference")] + [("train", "emoji/train")] * (result is results[0])
        assert [one[:2] for one in shown] == contexts and all(len(digest) == 12 for *_, digest in shown)
    mirrored(folder, results)
    assert history_lengths(client) == before and data_sets_of(client) == data
    assert len(client.search_runs([client.get_experiment_by_name("ablation-sweeps").experiment_id])) == 1


@pytest.mark.processes
def test_a_driver_killed_in_the_middle_leaves_no_trace_after_the_next(sweep):
    folder, results, client = sweep
    script = textwrap.dedent("""
        import json, os, sys
        from pathlib import Path
        from harness.tracking import client as tracking, runs as tracking_runs
        folder = Path(sys.argv[1])
        done, log_files = [], tracking_runs.Runs._log_files
        def dying(store, run_id, result):
            done.append(result)
            if len(done) == 3:
                os._exit(9)  # values are written, files and status are not
            log_files(store, run_id, result)
        tracking_runs.Runs._log_files = dying
        tracker = tracking.Tracker(folder.name, folder)
        tracker.start()
        tracker.finish([], folder)
    """)
    assert subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, check=False).returncode == 9
    assert sorted(run.info.status for run in runs_of(client).values()) == ["FINISHED", "FINISHED", "RUNNING"]
    mirrored(folder, results)
    runs = runs_of(client)
    assert set(runs) == {r["trial_id"] for r in results}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert set(history_lengths(client).values()) == {1, STEPS}


def test_a_run_nobody_answers_for_is_closed(sweep):
    folder, results, client = sweep
    mirrored(folder, results)
    experiment = client.get_experiment_by_name("ablation").experiment_id
    ours = {"sweep": "ablation", "results_id": ResultsFolder(folder).identity}
    client.create_run(experiment, tags=ours | {"trial_id": "0" * 12}, run_name="orphan")
    client.create_run(experiment, tags=ours | {"trial_id": "1" * 12, "results_id": "another folder"}, run_name="not ours")
    mirrored(folder, results)
    runs = runs_of(client)
    assert runs["0" * 12].info.status == "KILLED" and runs["1" * 12].info.status == "RUNNING"


def test_an_unfinished_trial_runs_until_the_sweep_ends(sweep):
    folder, results, client = sweep
    results[2]["status"] = "partial"
    write_result(folder, results[2])
    tracker = Tracker(folder.name, folder)
    tracker.start()
    tracker.sync(results[2])
    tracker._queue.put(None)
    tracker._thread.join(60)
    assert runs_of(client)[results[2]["trial_id"]].info.status == "RUNNING"
    mirrored(folder, results)
    assert runs_of(client)[results[2]["trial_id"]].info.status == "KILLED"
    results[2]["status"] = "done"
    mirrored(folder, results)
    assert runs_of(client)[results[2]["trial_id"]].info.status == "FINISHED"


# ---------------------------------------------------------------------------------------------- what is shown


def test_a_failed_trial_is_a_failed_run_until_it_succeeds(sweep):
    folder, results, client = sweep
    good = json.loads(json.dumps(results[1]))
    results[1] |= {"status": "failed", "metrics": {},
                   "error": {"job": "score", "type": "RuntimeError", "message": "no tokens", "traceback": "Trace"}}
    write_result(folder, results[1])
    mirrored(folder, results)
    run = runs_of(client)[good["trial_id"]]
    assert run.info.status == "FAILED" and run.data.tags["error"] == "score: RuntimeError: no tokens"
    assert "error.txt" in [item.path for item in client.list_artifacts(run.info.run_id)]
    write_result(folder, good)
    mirrored(folder, [good if r["trial_id"] == good["trial_id"] else r for r in results])
    run = runs_of(client)[good["trial_id"]]
    assert run.info.status == "FINISHED" and "error" not in run.data.tags


def test_a_run_holds_the_result_whole(tmp_path, sweep):
    folder, _, client = sweep
    shutil.rmtree(folder)
    results = make_sweep(folder, images=24)
    shiva = next(r for r in results if r["trial"]["train"])
    mirrored(folder, [shiva])
    run = runs_of(client)[shiva["trial_id"]]
    for name, measure in shiva["metrics"].items():
        assert run.data.metrics[name] == pytest.approx(measure["value"], rel=1e-12)
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == len(shiva["series"]["train/loss"])
    stored = client.download_artifacts(run.info.run_id, "result.json", str(tmp_path))
    assert json.loads(Path(stored).read_text(encoding="utf-8")) == shiva
    images = [Path(item.path).name.split("+")[0] for item in client.list_artifacts(run.info.run_id, "images")]
    assert {"pictures", "keep_ratio"} == set(images)
    again = len(images)
    client.set_tag(run.info.run_id, "result_hash", "as if it had been killed before the end")
    mirrored(folder, [shiva])
    assert len(client.list_artifacts(run.info.run_id, "images")) == again


def test_a_sweep_run_links_to_its_trials_and_holds_the_report(sweep):
    folder, results, client = sweep
    (folder / "report.md").write_text("# report", encoding="utf-8")
    (folder / "pareto.png").write_bytes(b"png")
    mirrored(folder, results)
    (run,) = runs_of(client, "ablation-sweeps").values()
    attached = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert attached == {"report.md", "pareto.png", "sweep.yaml", "sweep.json"}
    trials = runs_of(client)
    for trial in trials.values():
        assert trial.info.run_id in run.data.tags["mlflow.note.content"]
        assert trial.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert run.info.status == "FINISHED" and run.data.metrics["trials/done"] == len(results)


def test_the_saved_view_shows_every_run_and_only_metrics_that_exist(sweep):
    folder, results, client = sweep
    mirrored(folder, results)
    experiment = client.get_experiment_by_name("ablation")
    view = json.loads(experiment.tags[mapping.VIEW_TAG + mapping.view_name(ResultsFolder(folder).identity)])
    known = {name for run in runs_of(client).values() for name in run.data.metrics}
    charts = view["compareRunCharts"]
    used = {chart[axis]["key"] for chart in charts if chart["type"] == "SCATTER" for axis in ("xaxis", "yaxis")}
    used |= {name for chart in charts for name in chart.get("selectedMetrics", ())}
    assert view["searchFilter"] == f"tags.results_id = '{ResultsFolder(folder).identity}'"
    assert view["runsHiddenMode"] == "SHOW_ALL" and QUALITY in used and used <= known


def test_params_are_few_and_of_one_type_per_key(sweep):
    _, results, _ = sweep
    every = [mapping.params(result) for result in results]
    assert max(map(len, every)) <= 10
    for name in {name for params in every for name in params}:
        values = [params[name] for params in every if name in params]
        assert len({_is_number(value) for value in values}) == 1, name
    assert [params["flops_cut"] for params in every] == ["0", "0.24", "0.41", "0.24", "0.41"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_a_disturbed_timing_is_tagged(sweep):
    _, results, _ = sweep
    assert mapping.tags(results[0], None)["contaminated"] == "false"
    results[0]["environment"]["timing"]["latency/ratio_to_dense"]["contaminated"] = True
    assert mapping.tags(results[0], None)["contaminated"] == "true"


def test_a_series_never_overwrites_the_metric_of_its_name(sweep):
    folder, results, client = sweep
    assert "tokens/kept_attention" in results[1]["series"]
    mirrored(folder, results)
    run = runs_of(client)[results[1]["trial_id"]]
    assert run.data.metrics["tokens/kept_attention"] == results[1]["metrics"]["tokens/kept_attention"]["value"]
    points = client.get_metric_history(run.info.run_id, "series/tokens.kept_attention")
    assert [[p.step, p.value] for p in points] == results[1]["series"]["tokens/kept_attention"]


def test_names_that_mlflow_refuses_are_made_fit(sweep):
    folder, results, client = sweep
    results[0]["metrics"]["odd/a=b[0],c"] = {"value": 1.0, "better": "none", "interval": None, "n": None}
    results[0]["metrics"]["odd/nothing"] = {"value": None, "better": "none", "interval": None, "n": None}
    results[0]["metrics"]["odd/infinite"] = {"value": float("inf"), "better": "none", "interval": None, "n": None}
    write_result(folder, results[0])
    mirrored(folder, results)
    metrics = runs_of(client)[results[0]["trial_id"]].data.metrics
    assert metrics["odd/a_b_0__c"] == 1.0 and not {"odd/nothing", "odd/infinite"} & set(metrics)


# ---------------------------------------------------------------------------------------------- nothing stops a sweep


def test_an_unreachable_server_costs_one_message_and_no_error(sweep, monkeypatch, caplog):
    folder, results, _ = sweep
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with caplog.at_level(logging.WARNING, "harness.tracking"):
        tracker = Tracker(folder.name, folder, uri=f"http://127.0.0.1:{port}")
        tracker.start()
        for result in results[:2]:
            tracker.sync(result)
        tracker.finish([], folder)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("harness.tracking")]
    assert tracker.errors >= 3 and len(messages) == 2  # the first error, and the count at the end
    assert "The sweep goes on" in messages[0] and "the results are whole" in messages[1]


def test_sync_returns_at_once(sweep, monkeypatch):
    folder, results, _ = sweep
    tracker = Tracker(folder.name, folder)
    monkeypatch.setattr(tracker, "_open", lambda: pytest.fail("sync must not touch MLflow on the caller's thread"))
    tracker.sync(results[0])
    assert tracker._queue.qsize() == 1


def test_only_tracking_imports_mlflow_and_only_when_used():
    importers = set()
    for path in [*ROOT.glob("harness/**/*.py"), *ROOT.glob("methods/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] \
                if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "mlflow" for name in names):
                importers.add(path.name)
    assert importers == {"client.py", "requests.py", "runs.py"}
    code = "import harness.tracking.ui, sys; sys.exit(bool({'mlflow', 'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------- the command


def test_the_environment_chooses_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert Tracker("a", tmp_path / "a").uri == "http://tracking:5000"


def test_the_links_lead_to_the_newest_sweep_first(sweep):
    folder, results, client = sweep
    mirrored(folder, results)
    links = dict(pages(client))
    experiment = client.get_experiment_by_name("ablation").experiment_id
    assert links["ablation: trials with charts"] == mapping.charts_link(experiment, ResultsFolder(folder).identity)
    assert all(run.info.run_id in links["ablation: compare trials"] for run in runs_of(client).values())


def test_the_command_mirrors_a_folder_and_refuses_what_it_cannot_serve(sweep, tmp_path, capsys):
    folder, results, client = sweep
    assert main(["--sync", str(folder)]) == 0
    assert set(runs_of(client)) == {r["trial_id"] for r in results}
    assert main(["--ui", "--results", str(tmp_path / "nowhere")]) == 2
    assert "no such database" in capsys.readouterr().err


def test_a_taken_port_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.tracking.ui._answers", lambda address: True)
    with pytest.raises(ConfigError, match="--port 5000: a server answers there already"), \
            server("sqlite:///x", tmp_path, 5000, ""):
        pass
