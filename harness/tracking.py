"""results -> MLflow: a mirror for people who like its charts. The only module that imports mlflow.

The driver is the only writer, on a thread of its own; nothing here can stop a sweep. The JSON is the truth: mirroring it twice,
or again after a kill, changes nothing. Trials are runs of the experiment `<sweep>`; the sweep is a run of `<sweep>-sweeps`,
because MLflow hides the charts of runs nested in their own experiment.

Look at it: python -m harness.tracking --ui
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import mirror, records
from harness.reporting import pictures
from harness.reporting.front import front_of, summary
from harness.reporting.plots import heat_map_image
from harness.reporting.rows import Row, load_sweep

log = logging.getLogger(__name__)

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
         "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_DISABLE_AGENT_HINT": "1",
         "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
"""Set before mlflow is imported: no telemetry, no banners, and no minutes of retries against a dead server."""
FINISH_SECONDS = 120.0
FOLDER_TAG = "results_folder"
"""Experiment tag with the id of the results folder that it mirrors: a sweep's name is not enough to own a run."""
ATTACHED = ("report.md", "report.html", "table.csv", "table.tex", "sweep.yaml", "sweep.json")


def default_uri(results: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database in the folder of all results."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(results).resolve() / 'mlflow.db'}"


_USER, _QUERY = re.compile(r"//[^/\s]*@"), re.compile(r"([?&][^=&\s]*(?:pass|pwd|token|secret|key)[^=&\s]*=)[^&\s]+", re.I)


def masked(text: str) -> str:
    """`text` for a message: who logs in to the addresses in it, and the login in the environment, are shown as ***."""
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return _QUERY.sub(r"\1***", _USER.sub("//***@", text))


def open_client(uri: str) -> Any:
    """An MlflowClient. Creates the database's schema, so that no second process meets it half made."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db", "mlflow.store.tracking", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong we tell ourselves, with logins masked
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    return client


class Tracker:
    """Mirrors one sweep. `errors` counts what could not be written; the first is told, the rest only counted."""

    def __init__(self, sweep_name: str, results_dir: Path, uri: str | None = None) -> None:
        """results_dir: results/<sweep>. uri: where MLflow keeps its runs; None is `default_uri` of the folder above."""
        self.sweep, self.folder = sweep_name, Path(results_dir).resolve()
        self.uri = uri or default_uri(self.folder.parent)
        self.errors = 0
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._store: _Store | None = None

    def start(self) -> None:
        """Open the store on the tracker's own thread, and bring it up to the results that are already there."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._queue.put(self._open)

    def sync(self, result: Mapping[str, Any]) -> None:
        """Queue a trial's result; returns at once. What was mirrored before is not written again."""
        result = json.loads(json.dumps(result))  # a copy: the caller may go on changing it
        self._queue.put(lambda: self._live().mirror(result))

    def finish(self, results: Sequence[Mapping[str, Any]], report_dir: Path) -> None:
        """Mirror the sweep's end: every result, the report and its figures, and links; waits FINISH_SECONDS at most."""
        if self._thread is None:
            return
        for result in results:
            self.sync(result)
        self._queue.put(lambda: self._live().conclude(results, Path(report_dir)))
        self._queue.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning("MLflow at %s has not taken everything after %.0f s; it is brought up to date by the next run or by "
                        "python -m harness.tracking --sync %s", masked(self.uri), FINISH_SECONDS, self.folder)
        elif self.errors:
            log.warning("%d item(s) could not be written to MLflow; the results are whole in %s", self.errors, self.folder)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                item()
            except Exception as error:
                self.errors += 1
                if self.errors == 1:
                    log.warning("MLflow at %s: %s: %s. The sweep goes on; further errors are only counted", masked(self.uri),
                                type(error).__name__, masked(str(error)).strip()[:300])
                log.debug("MLflow: %s", masked(traceback.format_exc()))

    def _open(self) -> None:
        store = _Store(open_client(self.uri), self.sweep, self.folder, self.uri)
        store.reconcile()
        self._store = store

    def _live(self) -> _Store:
        if self._store is None:
            self._open()
        return self._store  # type: ignore[return-value]


class _Store:
    """The sweep's two experiments in an open MLflow store. Every method may raise; the tracker counts."""

    def __init__(self, client: Any, sweep: str, folder: Path, uri: str) -> None:
        self.client, self.sweep, self.folder, self.uri = client, sweep, folder, uri
        self.header = records.read(folder / "sweep.json", records.HEADER) or {}
        identity = folder / "folder_id"
        self.owner = identity.read_text(encoding="utf-8").strip() if identity.exists() else ""
        self.experiment = self._experiment()
        self.sweeps_experiment = self._experiment("-sweeps")
        self.runs = {run.data.tags["trial_id"]: run.info.run_id for run in reversed(self._all_runs(self.experiment))
                     if "trial_id" in run.data.tags}
        self.sweep_run = self._sweep_run()

    def _experiment(self, end: str = "") -> str:
        """The experiment of this results folder: named as the sweep, and where another folder has that name, with our id too."""
        name = f"{self.sweep}{end}"
        found = self.client.get_experiment_by_name(name)
        if found is not None and self.owner and found.tags.get(FOLDER_TAG, self.owner) != self.owner:
            name = f"{self.sweep}-{self.owner[:8]}{end}"
            found = self.client.get_experiment_by_name(name)
        experiment = self._opened(name, found)
        if self.owner:
            self.client.set_experiment_tag(experiment, FOLDER_TAG, self.owner)
        return experiment

    def _opened(self, name: str, found: Any) -> str:
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return found.experiment_id
        local = self.uri.startswith("sqlite:///")
        place = Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / name
        return self.client.create_experiment(name, artifact_location=place.as_uri() if local else None)

    def _all_runs(self, experiment: str) -> list[Any]:
        runs, token = [], None
        while token != "":
            page = self.client.search_runs([experiment], max_results=500, page_token=token)
            runs += page
            token = page.token or ""
        return runs

    def _sweep_run(self) -> str:
        found = self.client.search_runs([self.sweeps_experiment], f"tags.sweep = '{self.sweep}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {"sweep": self.sweep, "kind": "sweep", "mlflow.source.name": "harness.run"}
        return self.client.create_run(self.sweeps_experiment, tags=tags, run_name=self.sweep).info.run_id

    def reconcile(self) -> None:
        """Bring MLflow up to the results folder; runs that a killed driver left open and nothing answers for are closed."""
        answered = set()
        for path in sorted(self.folder.glob("*.json")):
            result = records.read(path, records.result_of(path.stem)) if path.name != "sweep.json" else None
            if result and result["status"] in mirror.STATUS:
                self.mirror(result)
                answered.add(result["trial_id"])
        for run in self._all_runs(self.experiment):
            if run.info.status == "RUNNING" and run.data.tags.get("trial_id") not in answered:
                self.client.set_terminated(run.info.run_id, "KILLED")

    # ------------------------------------------------------------------------------------------ trials

    def mirror(self, result: Mapping[str, Any]) -> None:
        """One run per trial, holding exactly what the result says."""
        digest = mirror.digest(result)
        run_id = self.runs.get(result["trial_id"]) or self._create(result)
        run = self.client.get_run(run_id)
        if run.data.tags.get("result_hash") == digest:
            return
        self._log_values(run, result)
        self._log_data_sets(run, result)
        self._log_files(run_id, result)
        self._set_status(run_id, result)
        self.client.set_tag(run_id, "result_hash", digest)  # last: a kill before this line makes us come again

    def _create(self, result: Mapping[str, Any]) -> str:
        seconds = sum(v for v in mirror.flat(result.get("stages") or {}).values() if isinstance(v, int | float))
        end = result.get("timestamp_ms") or 0
        run = self.client.create_run(self.experiment, tags={"trial_id": result["trial_id"], "sweep": self.sweep},
                                     start_time=end - int(1000 * seconds) if end else None, run_name=result["label"])
        self.runs[result["trial_id"]] = run.info.run_id
        return run.info.run_id

    def _log_values(self, run: Any, result: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id, time_ms = run.info.run_id, int(result.get("timestamp_ms") or 0)
        points = [*((*point, time_ms) for point in mirror.metrics(result)), *mirror.system_metrics(result)]
        there: set[tuple[str, float, int]] = set()
        for name in {name for name, *_ in points} & set(run.data.metrics):
            there |= {(name, m.value, m.step) for m in self.client.get_metric_history(run_id, name)}
        metrics = [Metric(name, value, when, step) for name, value, step, when in points if (name, value, step) not in there]
        params = [Param(name, text) for name, text in mirror.params(result).items() if name not in run.data.params]
        tags = [RunTag(name, text) for name, text in mirror.tags(result, self.sweep_run).items()]
        for start in range(0, max(len(metrics), 1), 1000):
            self.client.log_batch(run_id, metrics=metrics[start:start + 1000], params=params if start == 0 else [],
                                  tags=tags if start == 0 else [])
        stale = {name for name, text in run.data.tags.items() if text.startswith(mirror.UNAVAILABLE)} - {tag.key for tag in tags}
        for name in stale | ({"error"} & run.data.tags.keys() if not result.get("error") else set()):
            self.client.delete_tag(run_id, name)

    def _log_data_sets(self, run: Any, result: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        there = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs}
        inputs = [DatasetInput(Dataset(name, digest, "code", source), [InputTag("mlflow.data.context", context)])
                  for context, name, digest, source in mirror.data_sets(result) if (name, digest) not in there]
        if inputs:
            self.client.log_inputs(run.info.run_id, inputs)

    def _log_files(self, run_id: str, result: Mapping[str, Any]) -> None:
        self.client.log_dict(run_id, dict(result), "result.json")
        error = result.get("error")
        if error:
            self.client.log_text(run_id, error.get("traceback") or str(error), "error.txt")
        shown = pictures.stored(self.folder, result)
        tables = {"measures.json": mirror.measures_table(result),
                  "per_image.json": mirror.per_image_table(result, shown.captions if shown else ())}
        written = [name for name, table in tables.items() if table]
        for name in written:
            self.client.log_dict(run_id, tables[name], name)
        listing = json.dumps([{"path": name, "type": "table"} for name in written])
        self.client.set_tag(run_id, "mlflow.loggedArtifacts", listing)  # what log_table does, without its appending
        row = Row(result["trial_id"], result["label"], result["status"], result)
        images = {"pictures": pictures.sheet(shown) if shown else None, "keep_ratio": heat_map_image(row)}
        for name, image in images.items():
            # the chart page shows images by key, and each call adds a file: once is enough
            if image is not None and not self._has_image(run_id, name):
                self.client.log_image(run_id, image, key=name, step=0, synchronous=True)

    def _has_image(self, run_id: str, name: str) -> bool:
        return any(Path(item.path).name.startswith(f"{name}%step") or Path(item.path).name.startswith(f"{name}+step")
                   for item in self.client.list_artifacts(run_id, "images"))

    def _set_status(self, run_id: str, result: Mapping[str, Any]) -> None:
        status = mirror.STATUS[result["status"]]
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status, end_time=result.get("timestamp_ms") or None)

    # ------------------------------------------------------------------------------------------ the sweep

    def conclude(self, results: Sequence[Mapping[str, Any]], report_dir: Path) -> None:
        """Close what is open, attach the report, write the links."""
        for result in results:
            if result["status"] == "partial" and result["trial_id"] in self.runs:
                self.client.set_terminated(self.runs[result["trial_id"]], "KILLED")
        run = self.client.get_run(self.sweep_run)
        for name, value in mirror.summary_metrics(results).items():
            if run.data.metrics.get(name) != value:
                self.client.log_metric(self.sweep_run, name, value, step=0)
        for path in sorted(p for p in report_dir.iterdir() if p.name in ATTACHED or p.suffix == ".png"):
            self.client.log_artifact(self.sweep_run, str(path))
        runs = {result["label"]: self.runs[result["trial_id"]] for result in results if result["trial_id"] in self.runs}
        note = mirror.sweep_note(self.sweep, self.header.get("question", ""), self.experiment, runs)
        self.client.set_tag(self.sweep_run, "mlflow.note.content", note)
        self.client.set_experiment_tag(self.experiment, "mlflow.note.content", note)
        names = dict.fromkeys(name for result in results for name, measure in (result.get("metrics") or {}).items()
                              if measure.get("value") is not None)
        self.client.set_experiment_tag(self.experiment, mirror.VIEW_TAG, mirror.view(list(names)))
        self.client.set_tag(self.sweep_run, "file_hash", str(self.header.get("file_hash", "")))
        self._log_front()
        whole = all(result["status"] in ("done", "stopped") for result in results)
        self.client.set_terminated(self.sweep_run, "FINISHED" if whole else "FAILED")

    def _log_front(self) -> None:
        """Front and hypervolume of a search, the latter over its trials; a point that is there is not written again."""
        front = front_of(load_sweep(self.folder))
        for name, points in (summary(front) if front else {}).items():
            there = {(point.step, point.value) for point in self.client.get_metric_history(self.sweep_run, name)}
            for step, value in points:
                if (step, value) not in there:
                    self.client.log_metric(self.sweep_run, name, value, step=step)


if __name__ == "__main__":
    from harness.tracking_ui import main

    sys.exit(main())
