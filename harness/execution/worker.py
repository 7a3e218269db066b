"""One job as a worker process runs it: threads, log, progress, and the part. Knows neither Ray nor MLflow."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.api import require
from harness.execution.results_folder import Job, ResultsFolder
from harness.hardware.usage import Usage
from harness.storage.durable import put_text
from harness.storage.masking import Log

log = logging.getLogger(__name__)

RunJob = Callable[[str, dict, Any, Callable[[str, int, int], None], Path], dict]
"""`harness.trial.job.run_job(job, trial, store, progress, out_dir) -> part`."""

PROGRESS_INTERVAL_S = 0.5


class ProgressFile:
    """`progress(stage, done, total)` into a small file that the driver polls; works across machines, at most twice a second.

    check: called as often; what it raises ends the job.
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        self.path, self.check, self.started = path, check, time.time()
        self._stage, self._stage_started, self._written = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage` are behind us; a new stage is written at once."""
        now = time.time()
        if stage != self._stage:
            self._stage, self._stage_started = stage, now
        elif now - self._written < PROGRESS_INTERVAL_S and done < total:
            return
        self._written = now
        self.check()
        state = {"stage": stage, "done": done, "total": total, "started": self.started, "stage_started": self._stage_started,
                 "updated": now, "pid": os.getpid(), "host": socket.gethostname()}
        with contextlib.suppress(OSError):  # a progress bar must never cost a trial
            put_text(self.path, json.dumps(state), durable=False)


def run(job: Job, path: Path, run_job: RunJob | None = None, capture: bool = False, held: int | None = None) -> bool:
    """Do `job` and write its part into the results folder at `path`; True when it succeeded.

    Whatever the job raises becomes a failed part, so that one trial never takes the others down; on a disk too full for that
    the job stays missing. A part that another process finished meanwhile is left as it is. capture: stdout goes to the job's
    log, as stderr always does. held: of the driver's `ResultsFolder`; where that is no longer there, the job ends in a
    ConfigError and writes nothing.
    """
    folder = ResultsFolder(path)
    folder.held = held
    folder.require_there()
    log_path = folder.own(folder.artifacts(job.trial_id) / f"{job.kind}.log")
    lock = FileLock(folder.own(folder.lock_path(job.key)))
    with lock, _logged(log_path, capture):  # a killed driver's workers live on for some seconds
        if folder.finished(job):
            return True
        progress = ProgressFile(folder.progress_path(job.key), folder.require_there)
        progress("start", 0, 1)
        log.info("%s job of trial %s (%s)", job.kind, job.trial_id, job.label)
        try:
            shortage = folder.shortage()
            if shortage:  # before the compute, which could not be kept
                raise OSError(errno.ENOSPC, shortage)
            if job.kind == "timing" and (folder.part(f"{job.trial_id}.score") or {}).get("error"):
                raise RuntimeError("not timed, because the score job of this trial failed")
            threads = _prepare(job)
            with Usage() as usage:
                part = (run_job or _default(job))(job.kind, job.trial, _store(folder), progress, folder.artifacts(job.trial_id))
            folder.write_part(job, {**part, "began_ms": int(1000 * progress.started),
                                    "usage": {"began_ms": usage.began_ms, "curves": usage.curves}}, threads)
        except Exception as error:
            folder.require_there()
            log.exception("%s job of trial %s failed", job.kind, job.trial_id)
            with contextlib.suppress(OSError):
                folder.write_failure(job, type(error).__name__, str(error), traceback.format_exc(), int(1000 * progress.started))
            return False
        log.info("done in %.1f s", time.time() - progress.started)
        return True


def num_cores() -> int:
    """Cores this process may use; the machine's where the system knows no affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default(job: Job) -> RunJob:
    """The real job. ConfigError where the code here is not what the driver found: edited meanwhile, or another node's copy."""
    from harness.trial.identity import code_of
    from harness.trial.job import run_job

    require(code_of([job.trial]) == [job.code], "the code of this trial was edited after the run was started, or this node has "
            "another copy of it; start the same command again")
    return run_job


def _store(folder: ResultsFolder) -> Any:
    from harness.storage.store import Store

    return Store(folder.path.parent / ".cache")


def _prepare(job: Job) -> int:
    """Reset what an earlier job of this process may have left behind; returns the threads torch now has."""
    import numpy as np
    import torch

    threads = job.threads or num_cores()
    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        raise RuntimeError(f"torch runs on {torch.get_num_threads()} threads, {threads} were asked for")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return threads


@contextlib.contextmanager
def _logged(path: Path, capture: bool) -> Iterator[None]:
    """Append everything logged, warned, written to stderr and (with `capture`) to stdout to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    log_file = Log(open(path, "ab"), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    with log_file as file, contextlib.ExitStack() as stack:
        file.results = path.parent.parent.parent.parent
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        level = root.level
        root.addHandler(handler)
        root.setLevel(min(level, logging.INFO))
        logging.captureWarnings(True)
        if capture:
            stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))  # progress bars of libraries
        try:
            yield
        finally:
            sys.stdout.flush()
            root.removeHandler(handler)
            root.setLevel(level)
