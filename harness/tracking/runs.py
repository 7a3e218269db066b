"""The runs of one results folder in an open MLflow store: each trial once, holding exactly what its result says.

A run is never changed into another result: where a result changed, there is a new run, and the old one is marked and deleted
(MLflow keeps deleted runs until its `gc`). Runs are known by tags: `results_id` is the folder, so that two folders whose sweeps
share a name keep apart, `trial_id` the trial, `result_hash` the result, and `mirrored` says that the run is whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.api import Result
from harness.reporting import pictures
from harness.reporting.front import front_of, summary
from harness.reporting.plots import heat_map_image
from harness.reporting.rows import Row, load_sweep
from harness.storage import records
from harness.storage.masking import storable_tree
from harness.tracking import mapping
from harness.tracking.database import ARTIFACTS
from harness.tracking.limits import batches
from harness.tracking.requests import found_or_made

Step = Callable[[], None]


class Known(NamedTuple):
    """What the tags of a trial's run say."""

    run_id: str
    trial_id: str
    digest: str
    whole: bool
    label: str
    parent: str


class Runs:
    """The sweep's two experiments and this folder's runs in them. Every method may raise; the tracker counts."""

    def __init__(self, client: Any, sweep: str, folder: Path, identity: str, database: Path | None) -> None:
        """identity: the results folder's. database: the store's SQLite file; None for a server."""
        self.client, self.sweep, self.folder, self.identity, self.database = client, sweep, folder, identity, database
        self.header = records.read(folder / "sweep.json", records.HEADER) or {}
        self.experiment = self._experiment(sweep)
        self.sweeps_experiment = self._experiment(f"{sweep}-sweeps")
        self.trials = self._trials()
        self.sweep_run = self._sweep_run()

    def reconciliation(self) -> Iterator[Step]:
        """Steps that bring MLflow up to the results folder; what a killed driver left, and nothing answers for, is closed."""
        answered = set()
        for result in self._results():
            answered.add(result["trial_id"])
            yield functools.partial(self.mirror, result)
        for run in self._ours(self.experiment, "trial_id"):
            if run.info.status == "RUNNING" and run.data.tags["trial_id"] not in answered:
                yield functools.partial(self.client.set_terminated, run.info.run_id, "KILLED")
        yield self.remove_surplus

    def mirror(self, result: Result) -> None:
        """One run for the trial, holding exactly what the result says."""
        trial_id, digest = result["trial_id"], mapping.digest(result)
        there = self.trials.get(trial_id, [])
        run = next((run for run in there if run.digest == digest and run.whole), None)
        if run is None and not mapping.is_empty(result):
            run = self._write(storable_tree(result, self.folder.parent), digest)
        elif run is not None and run.label != result["label"]:
            run = self._relabel(run, storable_tree(result, self.folder.parent))
        self.trials[trial_id] = [run] if run else []
        for other in there:
            if run is None or other.run_id != run.run_id:
                self._remove(other.run_id, run.run_id if run else "")

    def remove_surplus(self) -> None:
        """Remove runs that were made twice: of a request whose answer was lost, and that came through late."""
        for trial_id, runs in self._trials().items():
            kept = (self.trials.get(trial_id) or runs)[0].run_id
            for run in runs:
                if run.run_id != kept:
                    self._remove(run.run_id, kept)
            self.trials[trial_id] = [run for run in runs if run.run_id == kept]

    def conclusion(self, results: Sequence[Result], report_dir: Path) -> Iterator[Step]:
        """The steps that close the sweep: what is open is closed, the report attached, the links written."""
        yield self.remove_surplus
        yield lambda: self._renew_sweep_run(report_dir)
        yield lambda: self._close(results)  # before what can be large or slow
        for result in results:
            if result["status"] == "partial" and self.trials.get(result["trial_id"]):
                yield functools.partial(self.client.set_terminated, self.trials[result["trial_id"]][0].run_id, "KILLED",
                                        end_time=mapping.span(result)[1] or None)
        yield self._adopt
        yield lambda: self._summarize(results)
        for path in mapping.attached(report_dir):
            yield functools.partial(self.client.log_artifact, self.sweep_run, str(path))
        yield lambda: self._describe(results)
        yield lambda: self._set_view(results)
        yield self._log_front

    # ------------------------------------------------------------------------------------------ finding and making

    def _results(self) -> Iterator[Result]:
        """The sweep's results in the folder; those of trials that it no longer has, such as of other weights, stay out."""
        asked = set(self.header.get("trial_ids") or ())
        for path in sorted(self.folder.glob("*.json")):
            known = path.stem in asked if asked else path.name != "sweep.json"
            result = records.read(path, records.result_of(path.stem)) if known else None
            if result and "trial_id" in result and str(result.get("status")) in mapping.STATUS:
                yield result

    def _experiment(self, name: str) -> str:
        def find() -> str | None:
            found = self.client.get_experiment_by_name(name)
            if found is not None and found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return None if found is None else found.experiment_id

        place = (self.database.parent / ARTIFACTS / name).as_uri() if self.database else None
        return found_or_made(find, lambda: self.client.create_experiment(name, artifact_location=place))

    def _ours(self, experiment: str, tag: str) -> list[Any]:
        """This folder's runs that have `tag`, the oldest first; runs of versions that wrote no `results_id` count as ours."""
        runs, token = [], None
        while token != "":
            page = self.client.search_runs([experiment], f"tags.sweep = '{self.sweep}'", max_results=500, page_token=token,
                                           order_by=["attributes.start_time ASC"])
            runs += page
            token = page.token or ""
        return [run for run in runs if tag in run.data.tags and run.data.tags.get("results_id", self.identity) == self.identity]

    def _trials(self) -> dict[str, list[Known]]:
        """{trial_id: its runs}, whole ones first."""
        found: dict[str, list[Known]] = {}
        for run in self._ours(self.experiment, "trial_id"):
            tags = run.data.tags
            known = Known(run.info.run_id, tags["trial_id"], tags.get("result_hash", ""), "mirrored" in tags,
                          tags.get("label", ""), tags.get("mlflow.parentRunId", ""))
            found.setdefault(known.trial_id, []).append(known)
        return {trial_id: sorted(runs, key=lambda run: not run.whole) for trial_id, runs in found.items()}

    def _sweep_runs(self) -> list[Any]:
        """The runs that stand for the sweep, the one that counts first."""
        runs = [run for run in self._ours(self.sweeps_experiment, "kind") if run.data.tags["kind"] == "sweep"]
        return sorted(runs, key=lambda run: -int(run.data.tags.get("version", "0")))

    def _sweep_run(self, version: int = 0) -> str:
        """The sweep's run of at least `version`; older ones and those made twice are removed."""
        def find() -> list[Any] | None:
            runs = self._sweep_runs()
            return runs if runs and int(runs[0].data.tags.get("version", "0")) >= version else None

        def make() -> list[Any]:
            tags = {"sweep": self.sweep, "kind": "sweep", "results_id": self.identity, "version": str(version),
                    "mlflow.source.name": "harness.run"}
            began = min(filter(None, (mapping.span(result)[0] for result in self._results())), default=None)
            return [self.client.create_run(self.sweeps_experiment, tags=tags, start_time=began, run_name=self.sweep),
                    *self._sweep_runs()]

        first, *others = found_or_made(find, make)
        for run in others:
            if run.info.run_id != first.info.run_id:
                self._remove(run.info.run_id, first.info.run_id)
        if "results_id" not in first.data.tags:
            self.client.set_tag(first.info.run_id, "results_id", self.identity)
        return first.info.run_id

    def _remove(self, run_id: str, instead: str) -> None:
        if instead:
            self.client.set_tag(run_id, "superseded_by", instead)
        self.client.delete_run(run_id)

    # ------------------------------------------------------------------------------------------ trials

    def _write(self, result: Result, digest: str) -> Known:
        trial_id = result["trial_id"]
        began, _ = mapping.span(result)
        fresh = {"trial_id": trial_id, "sweep": self.sweep, "results_id": self.identity, "result_hash": digest}
        query = f"tags.trial_id = '{trial_id}' and tags.results_id = '{self.identity}' and tags.result_hash = '{digest}'"
        run = found_or_made(lambda: next(iter(self.client.search_runs([self.experiment], query, max_results=1)), None),
                             lambda: self.client.create_run(self.experiment, tags=fresh, start_time=began or None,
                                                            run_name=mapping.run_name(result)))
        run_id = run.info.run_id
        self._log_values(run_id, result)
        self._log_data_sets(run_id, result)
        self._log_files(run_id, result)
        self._set_status(run_id, result)
        self.client.set_tag(run_id, "mirrored", "true")  # last: a kill before this line makes us come again
        return Known(run_id, trial_id, digest, True, result["label"], self.sweep_run)

    def _relabel(self, run: Known, result: Result) -> Known:
        self.client.log_dict(run.run_id, dict(result), "result.json")
        self.client.update_run(run.run_id, name=mapping.run_name(result))
        self.client.set_tag(run.run_id, "label", mapping.tags(result, None)["label"])
        return run._replace(label=result["label"])

    def _log_values(self, run_id: str, result: Result) -> None:
        """Equal points, params and tags that are there already MLflow takes as one."""
        from mlflow.entities import Metric, Param, RunTag

        time_ms = int(result.get("timestamp_ms") or 0)
        points = [*((*point, time_ms) for point in mapping.metrics(result)), *mapping.system_metrics(result)]
        for batch in batches([Metric(name, value, when, step) for name, value, step, when in points],
                             [Param(name, text) for name, text in mapping.params(result).items()],
                             [RunTag(name, text) for name, text in mapping.tags(result, self.sweep_run).items()]):
            self.client.log_batch(run_id, **batch)

    def _log_data_sets(self, run_id: str, result: Result) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [DatasetInput(Dataset(name, digest, "code", source), [InputTag("mlflow.data.context", context)])
                  for context, name, digest, source in mapping.data_sets(result)]
        if inputs:
            self.client.log_inputs(run_id, inputs)

    def _log_files(self, run_id: str, result: Result) -> None:
        self.client.log_dict(run_id, dict(result), "result.json")
        error = result.get("error")
        if error:
            self.client.log_text(run_id, f"{mapping.error_line(error)}\n\n{error.get('traceback') or ''}", "error.txt")
        shown = pictures.stored(self.folder, result)
        tables = {"measures.json": mapping.measures_table(result),
                  "per_image.json": mapping.per_image_table(result, shown.captions if shown else ())}
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

    def _set_status(self, run_id: str, result: Result) -> None:
        status = mapping.STATUS[result["status"]]
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status, end_time=mapping.span(result)[1] or None)

    # ------------------------------------------------------------------------------------------ the sweep

    def _renew_sweep_run(self, report_dir: Path) -> None:
        """Another run for the sweep where this one shows a figure or a point of its search that is no longer so."""
        present = {path.name for path in mapping.attached(report_dir)}
        there = {item.path for item in self.client.list_artifacts(self.sweep_run)}
        stale = bool({file for file in there - present if mapping.is_attached(file)})
        for name, points in self._front().items():
            stale |= bool(self._history(name) - set(points))
        if stale:
            tags = self.client.get_run(self.sweep_run).data.tags
            self.sweep_run = self._sweep_run(int(tags.get("version", "0")) + 1)

    def _close(self, results: Sequence[Result]) -> None:
        whole = all(result["status"] in ("done", "stopped") for result in results)
        end = max((mapping.span(result)[1] for result in results), default=0)
        self.client.set_terminated(self.sweep_run, "FINISHED" if whole else "FAILED", end_time=end or None)

    def _adopt(self) -> None:
        """Let every trial's run name the sweep's run."""
        for trial_id, runs in self.trials.items():
            for run in runs:
                if run.parent != self.sweep_run:
                    self.client.set_tag(run.run_id, "mlflow.parentRunId", self.sweep_run)
            self.trials[trial_id] = [run._replace(parent=self.sweep_run) for run in runs]

    def _summarize(self, results: Sequence[Result]) -> None:
        self.client.set_tag(self.sweep_run, "file_hash", str(self.header.get("file_hash", "")))
        there = self.client.get_run(self.sweep_run).data.metrics
        for name, value in mapping.summary_metrics(results).items():
            if there.get(name) != value:
                self.client.log_metric(self.sweep_run, name, value, step=0)

    def _describe(self, results: Sequence[Result]) -> None:
        runs = {result["label"]: self.trials[result["trial_id"]][0].run_id for result in results
                if self.trials.get(result["trial_id"])}
        note = mapping.sweep_note(self.header.get("question") or self.sweep, self.experiment, runs, self.identity)
        lines = mapping.trial_links(self.experiment, runs)
        if any(line not in note for line in lines):
            self.client.log_text(self.sweep_run, "\n".join(lines), mapping.TRIALS)
        self.client.set_tag(self.sweep_run, "mlflow.note.content", note)
        self.client.set_experiment_tag(self.experiment, "mlflow.note.content", note)

    def _set_view(self, results: Sequence[Result]) -> None:
        self.client.set_experiment_tag(self.experiment, mapping.VIEW_TAG + mapping.view_name(self.identity),
                                       mapping.view(mapping.known_metrics(results), self.identity))

    def _front(self) -> dict[str, list[tuple[int, float]]]:
        """Front and hypervolume of a search over its trials; empty without one."""
        front = front_of(load_sweep(self.folder))
        return summary(front) if front else {}

    def _history(self, name: str) -> set[tuple[int, float]]:
        return {(point.step, point.value) for point in self.client.get_metric_history(self.sweep_run, name)}

    def _log_front(self) -> None:
        """A point that is there is not written again."""
        for name, points in self._front().items():
            for step, value in sorted(set(points) - self._history(name)):
                self.client.log_metric(self.sweep_run, name, value, step=step)
