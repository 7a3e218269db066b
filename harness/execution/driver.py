"""python -m harness.run SWEEP.yaml: run what is missing of a sweep, then write its report.

The driver: reads and checks the sweep, takes the folder results/<sweep>, hands the missing jobs to Ray (or does them here with
--local), merges what the workers write into one result per trial, mirrors results to MLflow, and draws the report. Interrupt
it whenever you like; the same command continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from harness.api import ConfigError, Result, require
from harness.execution import worker
from harness.execution.progress import Watch
from harness.execution.results_folder import FULL, Job, ResultsFolder
from harness.execution.unused import unused
from harness.execution.worker import RunJob
from harness.storage.durable import is_within
from harness.storage.fingerprints import announced
from harness.storage.store import Store
from harness.sweep.file import Entry, Sweep, load
from harness.sweep.shape_only import Shapes, as_shape_only

if TYPE_CHECKING:  # its imports bring the classes behind the names, and with them torch
    from harness.execution.queue import Round

log = logging.getLogger(__name__)

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: everything done; some trials failed; the user's input was refused; Ctrl-C."""
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
"""Before any of these libraries is imported: no telemetry, no banners, no minutes of retries, and threads that wait asleep."""


@dataclass(frozen=True)
class Options:
    """How to run. results: folder that holds all sweeps. local: in this process, one job after another, without Ray.

    workers: score jobs at once, over what the sweep file says. run_job: instead of `harness.trial.job.run_job`.
    publish: mirror to MLflow and write the report. shapes: on random weights of these sizes (see `harness.sweep.shape_only`).
    retake: take timings again that other work disturbed.
    """

    results: Path = Path("results")
    local: bool = False
    workers: int | None = None
    run_job: RunJob | None = None
    publish: bool = True
    shapes: Shapes | None = None
    retake: bool = False


def run_sweep(path: Path | str, options: Options, console: Console) -> int:
    """Run what is missing of the sweep file at `path`; returns the exit code. Raises ConfigError before any compute."""
    console.file = console.file  # bound now: while Ray and the jobs run, sys.stdout is a log
    sweep = resolved(path, options.shapes, console)
    folder = ResultsFolder(options.results / sweep.name)
    checked(sweep, options, folder, console)
    require(not (options.retake and sweep.search and sweep.search.asks), f"{sweep.path}: --retake: what a search drew rests on "
            "its timings as they are; list the trials of its front under methods in another file")
    try:
        with folder.locked():
            folder.begin(sweep)
            for note in unused(folder, sweep):
                console.print(note, soft_wrap=True, markup=False, highlight=False)
            Store(options.results / ".cache").sweep_up()
            if options.retake:
                console.print(f"{folder.set_aside_disturbed(sweep)} disturbed timing(s) will be taken again.")
            driver = _Driver(sweep, folder, options, console)
            try:
                return driver.run()
            except KeyboardInterrupt:  # not in a job: while something was merged, drawn or shut down
                driver.tell_stopped()
                return INTERRUPTED
    except OSError as error:
        if error.errno in FULL:
            raise ConfigError(f"{folder.path}: nothing more can be written there ({error.strerror}). Finished jobs are kept; "
                              "make room and run the same command again to continue") from error
        if not is_within(error, options.results):
            raise
        raise ConfigError(f"{error.filename}: {error.strerror}. Results are written there: take away what is in the way, give "
                          "yourself the right to write there, or name another place with --results. Finished jobs are "
                          "kept") from error


def resolved(path: Path | str, shapes: Shapes | None = None, console: Console | None = None) -> Sweep:
    """The checked sweep file at `path` with its trials, and the environment that its libraries are imported in.

    shapes: on random weights of these sizes; what that leaves out is said on `console`.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.captureWarnings(True)  # a library's warning belongs in a log, not across the display
    sweep = load(path)  # what can be refused without importing torch is refused at once
    from harness.sweep.early import refuse
    from harness.sweep.resolve import resolve

    if shapes is None:  # which leaves some of the file out
        refuse(sweep)
    if shapes is not None:
        sweep, left_out = as_shape_only(sweep, shapes)
        if console is not None and left_out:
            console.print(f"Random weights: left out {'; '.join(left_out)}.", soft_wrap=True)
    with announced(lambda text: console.print(text, soft_wrap=True, markup=False) if console else None):
        return resolve(sweep)


def checked(sweep: Sweep, options: Options, folder: ResultsFolder | None = None, console: Console | None = None) -> None:
    """Raise ConfigError for what of the sweep cannot be done; see `checks`. Without a folder nothing is left anywhere."""
    from harness.execution.checks import PATIENCE_S, check
    from harness.execution.machine import Machine
    from harness.storage.store import Store

    only = folder and {job.trial_id for job in folder.missing(sweep)}
    late = check(sweep, Machine.of(options.local, options.workers), Store(options.results / ".cache") if folder else None, only)
    if late and console is not None:
        console.print(f"Whether these rows can meet their budget was not counted in {PATIENCE_S:g} s; their jobs will tell: "
                      f"{', '.join(late)}", soft_wrap=True, markup=False, highlight=False)


class _Driver:
    """One run over the missing jobs of a sweep."""

    def __init__(self, sweep: Sweep, folder: ResultsFolder, options: Options, console: Console) -> None:
        from harness.execution.queue import Rounds

        self.rounds, self.folder, self.options, self.console = Rounds(sweep, folder), folder, options, console
        self.tracker = self._tracker() if options.publish else None
        self.cluster: Any = None

    @property
    def sweep(self) -> Sweep:
        """The sweep with the trials that are known so far."""
        return self.rounds.sweep

    def run(self) -> int:
        """Do the jobs of each round, merge, mirror, report."""
        interrupted = False
        if self.tracker:
            self.tracker.start()
        with contextlib.ExitStack() as stack:
            for this in self.rounds:
                self._announce(this)
                self.folder.forget_failures(list(this.jobs))
                for entry in self.sweep.entries:
                    self._merge(entry)
                if this.jobs and not self._work(this, stack):
                    interrupted = True
                    break
        results = [self.rounds.merge(entry) for entry in self.sweep.entries]
        published = self._publish(results, interrupted)
        return self._conclude(results, interrupted, published)

    def _announce(self, this: Round) -> None:
        total = this.before + len(this.jobs)
        done = f", {this.before} of them finished before" if this.before else ""
        if this.jobs and not self.cluster:
            from harness.execution.preview import slow_dtypes

            for note in slow_dtypes(self.sweep):
                self._say(note)
        what = this.title or f"{len(self.sweep.entries)} trials"
        most = "at most " if this.promotions else ""
        self._say(f"{self.sweep.name}: {what}, {most}{total} jobs{done}. Results: {self.folder.path}")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _merge(self, entry: Entry) -> None:
        result = self.rounds.merge(entry)
        if self.tracker and result["status"] != "partial":
            self.tracker.sync(result)

    # -------------------------------------------------------------------------------------------- the work

    def _work(self, this: Round, stack: contextlib.ExitStack) -> bool:
        """Run the jobs of a round; False when it was interrupted. Ray, once started, stays until `stack` is closed."""
        watch, interrupted, entries = None, False, {entry.trial_id: entry for entry in self.sweep.entries}
        try:
            if not self.options.local and self.cluster is None:
                cluster = self._cluster()
                self._say("Starting Ray: some seconds, and some more until each worker has loaded its libraries.")
                self.cluster = stack.enter_context(cluster)
            cluster = self.cluster
            with Watch(self.folder, () if this.promotions else this.jobs, this.before, cluster.share.workers if cluster else 1,
                       self.console, lambda job: self._merge(entries[job.trial_id]), cluster.explain if cluster else str,
                       live=cluster is not None, growing=this.promotions is not None) as watch:
                following = _following(this, watch)
                if cluster:
                    cluster.run(this.jobs, self.folder, self.options.run_job, following if this.promotions else None)
                else:
                    for job in iter(following, None):
                        worker.run(job, self.folder.path, self.options.run_job, held=self.folder.held)
        except KeyboardInterrupt:
            interrupted = True
        # Tune can come back as if all were well: only the folder, which the watch reads, knows what is missing
        missing = watch is None or watch.unfinished() or (this.promotions and this.promotions.peek())
        if missing and not interrupted:
            self.folder.try_writing()
        return not interrupted and not missing

    def _cluster(self) -> Any:
        from harness.execution.pool import Cluster, Share

        wanted, cores = self.sweep.resources, worker.num_cores()
        devices = {str(trial["backbone"].get("device", "cpu")).split(":")[0] for trial in self.sweep.trials}
        gpus = wanted.gpu if wanted.gpu is not None else float("cuda" in devices)
        workers = self.options.workers or wanted.workers or max(1, cores // wanted.threads)
        return Cluster(Share(workers=workers, cpus=wanted.threads, gpus=gpus))

    # -------------------------------------------------------------------------------------------- the outcome

    def _tracker(self) -> Any:
        from harness.tracking.client import Tracker

        return Tracker(self.sweep.name, self.folder.path)

    def _publish(self, results: list[Result], interrupted: bool) -> Path | None:
        """The report; None when there is none. A report that cannot be drawn does not touch the results."""
        if not self.options.publish:
            return None
        report = None
        if any(result["status"] == "done" for result in results) and not interrupted:
            try:
                from harness.reporting.report import write_report

                report = write_report(self.folder.path)
            except Exception as error:
                log.exception("report")
                self._say(f"The report could not be written ({type(error).__name__}: {error}); the results are whole. "
                          f"Repeat it with: python -m harness.report {self.folder.path}")
        self.tracker.finish(results, self.folder.path)
        return report

    def _conclude(self, results: list[Result], interrupted: bool, report: Path | None) -> int:
        done = sum(result["status"] == "done" for result in results)
        stopped = sum(result["status"] == "stopped" for result in results)
        lines = [f"{done} of {len(results)} trials done" + (f", {stopped} stopped at a rung." if stopped else ".")]
        for result in results:
            if result["error"]:
                error = result["error"]
                lines.append(f"FAILED  {result['label']} ({error['job']}): {error['type']}: {error['message']}"[:500])
                lines.append(f"        log: {self.folder.artifacts(result['trial_id']) / error['job']}.log")
        if interrupted:
            lines += filter(None, [self.folder.shortage()])
            lines.append("Stopped. Finished jobs are kept; run the same command again to continue.")
        elif done + stopped < len(results):
            lines.append("Run the same command again to retry what failed." if not (self.sweep.asha or self._asks()) else
                         f"What failed in a search or at a rung is an outcome, on which later choices rest: to try it again, "
                         f"remove its file in {self.folder.path / 'parts'} and run the same command.")
        if report:
            lines.append(f"Report: {report}")
        self._say("\n".join(lines))
        if interrupted:
            return INTERRUPTED
        return DONE if done + stopped == len(results) and (report or not self.options.publish) else FAILED

    def tell_stopped(self) -> None:
        """Say what an interrupted run leaves: what is finished is read from the folder."""
        jobs = self.folder.jobs(self.sweep)
        finished = sum(map(self.folder.finished, jobs))
        self._say(f"Stopped. {finished} of {len(jobs)} jobs are finished and kept; run the same command again to continue.")

    def _asks(self) -> bool:
        return self.sweep.search is not None and self.sweep.search.asks


def _following(this: Round, watch: Watch) -> Callable[[], Job | None]:
    """The next job of a round, which the watch is told of where it was not known before; None at the end."""
    known = iter(this.jobs)

    def following() -> Job | None:
        if not this.promotions:
            return next(known, None)
        job = this.promotions.following()
        if job is not None:
            watch.add(job)
        return job

    return following


def dry_run(path: Path, options: Options, console: Console) -> int:
    """Check everything and show what would be done."""
    sweep = resolved(path, options.shapes, console)
    checked(sweep, options, console=console)
    from harness.execution.preview import preview

    preview(sweep, options.results, console)
    return DONE
