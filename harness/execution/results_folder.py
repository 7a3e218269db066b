"""What is finished and what is not: the folder results/<sweep>, which is the only memory a sweep has.

A worker writes one part per finished job, durably and in one move, before it tells anyone. The driver merges the parts of a
trial into its result. After a crash at any moment the folder says exactly which jobs are missing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.api import Part, Result, Trial, disturbed, require
from harness.execution.outcome import JOBS, merged, usable
from harness.storage import arrays, records, strict_json
from harness.storage.durable import copied, link_between, link_in, put_text, sweep_up
from harness.storage.folder_id import folder_id
from harness.storage.folder_lock import driving, lock_file
from harness.storage.masking import storable_tree
from harness.sweep.file import Entry, Sweep
from harness.sweep.search.entries import header
from harness.trial.ids import SCHEMA

log = logging.getLogger(__name__)

SHARED_S = 90.0
"""How late a file of another node may appear: NFS keeps what it knows of a folder for up to 60 s."""
MIN_FREE_BYTES = 200 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers that mean: no more can be written here."""


@dataclass(frozen=True)
class Job:
    """One unit of work. threads: torch threads of the job; None takes every core of the node it runs on."""

    kind: str
    trial_id: str
    label: str
    code: str
    threads: int | None
    trial: Trial

    @property
    def alone(self) -> bool:
        """Whether it needs its node to itself: it times something."""
        return self.kind == "timing" or "speedup" in (self.trial.get("budget") or {})

    @property
    def key(self) -> str:
        """'<trial_id>.<kind>': its name in files and displays."""
        return f"{self.trial_id}.{self.kind}"


class ResultsFolder:
    """results/<sweep>: parts, results, artifacts, progress."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.progress_folder = self.path / ".progress"
        self.held: int | None = None
        """Number of the file `.lock` that a driver holds, in its own folder and in its workers'; see `require_there`."""

    @property
    def identity(self) -> str:
        """See `harness.storage.folder_id`."""
        return folder_id(self.path)

    def part_path(self, key: str) -> Path:
        """Where the part of job `key` lies."""
        return self.path / "parts" / f"{key}.json"

    def progress_path(self, key: str) -> Path:
        """Where the worker of job `key` says how far it is."""
        return self.progress_folder / f"{key}.json"

    def lock_path(self, key: str) -> Path:
        """What the worker of job `key` locks; never removed, for a worker of a killed driver may still hold it."""
        return self.path / ".locks" / f"{key}.lock"

    def artifacts(self, trial_id: str) -> Path:
        """Folder of a trial's images and logs."""
        return self.path / "artifacts" / trial_id

    def shortage(self) -> str:
        """Why there is too little room to write results, and what to do; '' where there is enough."""
        free = shutil.disk_usage(self.path).free
        return "" if free >= MIN_FREE_BYTES else (
            f"{self.path}: only {free / 2**20:.0f} MiB free, and results need {MIN_FREE_BYTES / 2**20:.0f} MiB. Make room, "
            "or name another place with --results")

    def try_writing(self) -> None:
        """OSError where a file can no longer be written here, which jobs that ended without a part may be due to."""
        self.require_there()
        path = self.progress_folder / "probe"
        put_text(path, " " * 2**16)
        path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second driver; ConfigError names the first one. Freed by the system when we die."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._refuse_link(link_in(self.path))
        shortage = self.shortage()
        require(not shortage, shortage)
        with driving(self.path) as self.held:
            try:
                yield
            finally:
                self.held = None

    def own(self, path: Path) -> Path:
        """`path`, which lies below the folder, for writing; ConfigError where a link would lead that elsewhere."""
        self._refuse_link(link_between(self.path, path))
        return path

    def _refuse_link(self, link: Path | None) -> None:
        require(link is None, f"{link}: is a link, and results must not leave their folder; remove it. To keep results "
                "elsewhere, name the place with --results")

    def there(self) -> bool:
        """Whether the folder is still the one whose lock is held, and was not deleted, moved, or made anew by another driver."""
        try:
            return self.held is None or lock_file(self.path) == self.held
        except OSError:  # a file system that is away for a moment
            return True

    def require_there(self) -> None:
        """ConfigError where the folder is no longer `there`: what is written would be half of a sweep, or another's."""
        require(self.there(), f"{self.path}: was deleted, moved or replaced while its sweep ran, so that sweep ends and writes "
                "nothing more there. Run the same command again to begin anew, or first put the folder back to go on")

    def begin(self, sweep: Sweep) -> None:
        """Write down what the sweep is, and forget the progress of an earlier driver."""
        shutil.rmtree(self.progress_folder, ignore_errors=True)
        for folder in (self.progress_folder, *(self.path / name for name in ("parts", "artifacts", ".locks"))):
            folder.mkdir(parents=True, exist_ok=True)
        _ = self.identity  # made now, so that whoever reads the folder finds one
        for folder in (self.path, self.path / "parts", *self.path.glob("artifacts/*")):
            sweep_up(folder)
        put_text(self.path / "sweep.yaml", sweep.text)
        self.extend(sweep)

    def extend(self, sweep: Sweep) -> None:
        """Write down which trials `sweep` has, and take over what sweeps beside it know of them."""
        self.require_there()
        put(self.path / "sweep.json", {
            "schema": SCHEMA, "name": sweep.name, "question": sweep.question, "file_hash": sweep.file_hash,
            "trial_ids": sweep.trial_ids, "labels": {entry.trial_id: entry.label for entry in sweep.entries},
            "defaults": sweep.defaults,
            **header(sweep.search, sweep.asha, {entry.trial_id: entry.number for entry in sweep.entries if entry.number})})
        self._set_aside_torn(sweep)
        for job in self.missing(sweep):
            if not job.alone:
                self._adopt(job)

    def _adopt(self, job: Job) -> None:
        """Take the finished score job of an equal trial from a sweep beside this one. Timings belong to their own session, and
        so does a score whose budget was solved by timing."""
        for path in sorted(self.path.parent.glob(f"*/parts/{job.key}.json")):
            other = ResultsFolder(path.parent.parent)
            if link_between(other.path.parent, path) or not other.finished(job) or not other.artifacts(job.trial_id).is_dir():
                continue
            if link := link_between(other.path, other.artifacts(job.trial_id)) or link_in(other.artifacts(job.trial_id)):
                log.warning("%s is a link; trial %s is not taken over from there and is computed again", link, job.trial_id)
                continue
            for file in sorted(file for file in other.artifacts(job.trial_id).rglob("*") if file.is_file()):
                if file.name != "timing.log":
                    copied(file, self.own(self.artifacts(job.trial_id) / file.relative_to(other.artifacts(job.trial_id))))
            part = other.part(job.key) or {}
            put(self.part_path(job.key), {**part, "environment": {**(part.get("environment") or {}),
                                                                  "adopted_from": other.path.name}})
            return

    def missing(self, sweep: Sweep) -> list[Job]:
        """Those of `jobs` without a usable part."""
        return [job for job in self.jobs(sweep) if not self.finished(job)]

    def jobs(self, sweep: Sweep) -> list[Job]:
        """Score jobs first, in the order of the trials, then timing jobs."""
        threads = {"score": sweep.resources.threads, "timing": sweep.resources.timing_threads}
        return [Job(kind, entry.trial_id, entry.label, entry.code, threads[kind], entry.trial)
                for kind in JOBS for entry in sweep.entries]

    def finished(self, job: Job) -> bool:
        """A part without error exists that was made from this very trial, by this code, with these threads, and its files."""
        part = self.part(job.key)
        return usable(part, job.trial, job.code) and job.threads in (None, part.get("threads")) and self._has_files(part)

    def _has_files(self, part: Part) -> bool:
        """Whether the arrays that a part names are there whole: what a power cut halved is made again."""
        files = [self.path / file for file in (part.get("artifacts") or {}).values() if file.endswith(".npz")]
        flaws = {file: arrays.flaw(file) for file in files if file.parent.is_dir()}  # who removed the folder made room
        for file, flaw in flaws.items():
            if flaw:
                log.warning("%s: %s; the job that made it counts as missing", file, flaw)
        return not any(flaws.values())

    def failed(self, job: Job) -> bool:
        """A part with an error exists that this very trial left, by this code."""
        part = self.part(job.key) or {}
        return bool(part.get("error")) and part.get("trial") == job.trial and part.get("code") == job.code

    def part(self, key: str) -> Part | None:
        """The part of job `key`; None where there is none, or something that is no part, which is said once."""
        return records.read(self.part_path(key), records.PART)

    def wait_for_part(self, job: Job, seconds: float = SHARED_S) -> bool:
        """Whether the part of a job that is over can be seen here, if need be after a while."""
        path, end = self.part_path(job.key), time.monotonic() + seconds
        while not path.exists():
            if not self.there():
                return False
            if time.monotonic() > end:
                log.warning("%s cannot be seen here %.0f s after its job ended; do all nodes share this folder?", path, seconds)
                return False
            os.listdir(path.parent)  # NFS looks at the folder anew, and forgets that it had no such file
            time.sleep(0.2)
        return True

    def write_part(self, job: Job, part: Part, threads: int | None) -> None:
        """Make `part` the outcome of `job`, with what it was made from. Logins and folders of the machine are left out.

        Raises Unreadable for a part that nobody could read.
        """
        self.require_there()
        made = {"job": job.kind, "trial_id": job.trial_id, "trial": job.trial, "code": job.code, "threads": threads}
        text = _dump({**storable_tree(part, self.path.parent), **made})
        records.PART(strict_json.parse(text, nonfinite=True), "")  # else it would count as missing, and be made for ever
        put_text(self.own(self.part_path(job.key)), text)

    def write_failure(self, job: Job, kind: str, message: str, traceback: str = "", began_ms: int = 0) -> None:
        """Record that `job` failed; the next run tries it again. began_ms: when it had begun; 0 where nobody knows."""
        now = int(1000 * time.time())
        said = {"job": job.kind, "type": kind, "message": message, "traceback": traceback}
        whole = {key: text.encode("utf-8", "replace").decode() for key, text in said.items()}  # names of files hold anything
        self.write_part(job, {"error": whole, "began_ms": began_ms or now, "timestamp_ms": now}, None)

    def forget_failures(self, jobs: list[Job]) -> None:
        """Remove the failed parts of jobs about to run again; their logs stay."""
        for job in jobs:
            if (self.part(job.key) or {}).get("error"):
                self.part_path(job.key).unlink(missing_ok=True)

    def set_aside_disturbed(self, sweep: Sweep) -> int:
        """Make timings that other work disturbed, or may have, count as missing; of how many trials. Where a budget was solved by
        such timings, its solution is removed, and all parts of the trial with it. Parts stay, as parts/*.disturbed."""
        count = 0
        for entry in sweep.entries:
            found = {path: _notes(self.part(path.stem)) for path in self.path.glob(f"parts/{entry.trial_id}.*.json")}
            if any(disturbed({"budget": notes.get("budget")}) for notes in found.values()):
                for key in {str((notes.get("budget") or {}).get("solution")) for notes in found.values()}:
                    if re.fullmatch("[0-9a-f]{16}", key):
                        shutil.rmtree(self.path.parent / ".cache" / "budget" / key, ignore_errors=True)
            else:
                found = {path: notes for path, notes in found.items() if path.stem.endswith(".timing") and disturbed(notes)}
            for path in found:
                os.replace(path, path.with_suffix(".disturbed"))
            count += bool(found)
        return count

    def _set_aside_torn(self, sweep: Sweep) -> None:
        """Make the parts of a trial count as missing that hold different solutions of one budget: it was solved anew between."""
        for entry in sweep.entries:
            paths = [self.part_path(f"{entry.trial_id}.{kind}") for kind in JOBS]
            parts = [part for part in (self.part(path.stem) for path in paths) if usable(part, entry.trial, entry.code)]
            if len({(part.get("executed") or {}).get("speedup_calibrated") for part in parts} - {None}) > 1:  # type: ignore[union-attr]
                for path in paths:
                    os.replace(path, path.with_suffix(".disturbed"))

    def merge(self, entry: Entry, sweep_name: str, rungs: Sequence[str] = (),
              stopped: Mapping[str, Any] | None = None) -> Result:
        """The result of a trial from the parts there are; its file is written when it changed, and removed with its parts.

        rungs: kinds of its rung jobs. stopped: at which rung its training was stopped, and why; the result is then that of the
        rungs.
        """
        self.require_there()
        kinds = rungs if stopped else (*rungs, *JOBS)
        parts = {kind: self.part(f"{entry.trial_id}.{kind}") for kind in kinds}
        parts = {kind: part for kind, part in parts.items()
                 if part and (part.get("error") and part.get("trial") == entry.trial or usable(part, entry.trial, entry.code))}
        result = merged(entry, sweep_name, parts, stopped)
        if result["error"]:
            result["error"] = storable_tree(result["error"], self.path.parent)
        path = self.path / f"{entry.trial_id}.json"
        text = _dump(result)
        if not parts:
            path.unlink(missing_ok=True)  # made by code or options that are no longer these
        elif not _holds(path, text):
            put_text(path, text)
        return result


def _notes(part: Part | None) -> dict[str, Any]:
    return (part or {}).get("environment") or {}


def put(path: Path, value: Any) -> None:
    """Write `value` as JSON: durable, and either wholly there or not at all."""
    put_text(path, _dump(value))


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1)


