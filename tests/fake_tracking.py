"""A small sweep and an empty MLflow database beside it, and what MLflow then holds of it: for the tests of tracking."""

from __future__ import annotations

import shutil

import pytest
from fake_results import make_sweep
from sqlalchemy import Engine, event

from harness.tracking.client import Tracker, default_uri, open_client

QUALITY = "fidelity/fd_effnet_24"


@event.listens_for(Engine, "connect")
def _no_power_cut_comes(connection, record):
    """Waiting for the disk after each write is most of what these tests would take."""
    connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A database with the schema and nothing in it; making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def sweep(tmp_path, empty_database, monkeypatch):
    """Five results of a sweep and an empty database beside them. Returns (folder, results, client)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "results" / "ablation"
    results = make_sweep(folder, images=24, artifacts=False)[:5]
    for path in folder.glob("*.json"):
        if path.stem not in {"sweep", *(r["trial_id"] for r in results)}:
            path.unlink()
    shutil.copy(empty_database, folder.parent / "mlflow.db")
    return folder, results, open_client(default_uri(folder.parent))


def mirrored(folder, results, finish=True):
    """One life of a driver."""
    tracker = Tracker(folder.name, folder)
    tracker.start()
    for result in results:
        tracker.sync(result)
    tracker.finish(results if finish else [], folder)
    assert tracker.errors == 0
    return tracker


def runs_of(client, name="ablation"):
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id])
    runs = {run.data.tags.get("trial_id", run.info.run_name): run for run in found}
    assert len(runs) == len(found), "a trial has two runs"
    return runs


def history_lengths(client):
    return {(trial_id, name): len(client.get_metric_history(run.info.run_id, name))
            for trial_id, run in runs_of(client).items() for name in run.data.metrics}


def data_sets_of(client):
    """trial_id -> [(context, name, digest)]."""
    return {trial_id: sorted((one.tags[0].value, one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs)
            for trial_id, run in runs_of(client).items()}
