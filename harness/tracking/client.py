"""results -> MLflow: a mirror for people who like its charts. Only this room imports mlflow.

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
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.api import Result
from harness.storage.folder_id import folder_id
from harness.storage.masking import masked
from harness.tracking import database as tracking_database
from harness.tracking.runs import Runs

log = logging.getLogger(__name__)

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
         "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_DISABLE_AGENT_HINT": "1",
         "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
"""Set before mlflow is imported: no telemetry, no banners, and no minutes of retries against a dead server."""
FINISH_SECONDS = 120.0


def default_uri(results: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database in the folder of all results."""
    return os.environ.get("MLFLOW_TRACKING_URI") or tracking_database.address(Path(results) / "mlflow.db")


def open_client(uri: str) -> Any:
    """An MlflowClient. Creates the database's schema, so that no second process meets it half made."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db", "mlflow.store.tracking", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong we tell ourselves, with logins masked
    from mlflow import MlflowClient

    with tracking_database.alone(uri):
        tracking_database.follow_move(uri)
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
        self._runs: Runs | None = None

    def start(self) -> None:
        """Open the store on the tracker's own thread, and bring it up to the results that are already there."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._queue.put(self._open)

    def sync(self, result: Result) -> None:
        """Queue a trial's result; returns at once. What was mirrored before is not written again."""
        result = json.loads(json.dumps(result))  # a copy: the caller may go on changing it
        self._queue.put(lambda: self._live().mirror(result))

    def finish(self, results: Sequence[Result], report_dir: Path) -> None:
        """Mirror the sweep's end: every result, the report and its figures, and links; waits FINISH_SECONDS at most."""
        if self._thread is None:
            return
        for result in results:
            self.sync(result)
        self._queue.put(lambda: self._each(self._live().conclusion(results, Path(report_dir))))
        self._queue.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning("MLflow at %s has not taken everything after %.0f s; it is brought up to date by the next run or by "
                        "python -m harness.tracking --sync %s", masked(self.uri), FINISH_SECONDS, self.folder)
        elif self.errors:
            log.warning("%d item(s) could not be written to MLflow; the results are whole in %s", self.errors, self.folder)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._attempt(item)

    def _each(self, steps: Iterable[Callable[[], None]]) -> None:
        """Every step is tried, whatever became of those before it."""
        for step in steps:
            self._attempt(step)

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            self.errors += 1
            if self.errors == 1:
                log.warning("MLflow at %s: %s: %s. The sweep goes on; further errors are only counted", masked(self.uri),
                            type(error).__name__, masked(str(error)).strip()[:300])
            log.debug("MLflow: %s", masked(traceback.format_exc()))

    def _open(self) -> None:
        self._runs = Runs(open_client(self.uri), self.sweep, self.folder, folder_id(self.folder),
                          tracking_database.file_of(self.uri))
        self._each(self._runs.reconciliation())

    def _live(self) -> Runs:
        if self._runs is None:
            self._open()
        return self._runs  # type: ignore[return-value]
