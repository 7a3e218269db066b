"""What is finished and what is not: the folder results/<sweep>, which is the only memory a sweep has.

A worker writes one part per finished job, durably and in one move, before it tells anyone. The driver merges the parts of a
trial into its result. After a crash at any moment the folder says exactly which jobs are missing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.api import ConfigError, disturbed, require
from harness.search.entries import header
from harness.sweep import SCHEMA, Entry, Sweep

log = logging.getLogger(__name__)

JOBS = ("score", "timing")
SHARED_S = 90.0
"""How late a file of another node may appear: NFS keeps what it knows of a folder for up to 60 s."""
MIN_FREE_BYTES = 200 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers that mean: no more can be written here."""
_MERGED = ("metrics", "per_image", "executed", "series", "artifacts")


@dataclass(frozen=True)
class Job:
    """One unit of work. threads: torch threads of the job; None takes every core of the node it runs on."""

    kind: str
    trial_id: str
    label: str
    code: str
    threads: int | None
    trial: dict[str, Any]

    @property
    def alone(self) -> bool:
        """Whether it needs its node to itself: it times something."""
        return self.kind == "timing" or "speedup" in (self.trial.get("budget") or {})

    @property
    def key(self) -> str:
        """'<trial_id>.<kind>': its name in files and displays."""
        return f"{self.trial_id}.{self.kind}"


class Ledger:
    """results/<sweep>: parts, results, artifacts, progress."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.progress_folder = self.folder / ".progress"
        self.held: int | None = None
        """Number of the file `.lock` that a driver holds, in its own ledger and in its workers'; see `require_there`."""

    def part_path(self, key: str) -> Path:
        """Where the part of job `key` lies."""
        return self.folder / "parts" / f"{key}.json"

    def progress_path(self, key: str) -> Path:
        """Where the worker of job `key` says how far it is."""
        return self.progress_folder / f"{key}.json"

    def lock_path(self, key: str) -> Path:
        """What the worker of job `key` locks; never removed, for a worker of a killed driver may still hold it."""
        return self.folder / ".locks" / f"{key}.lock"

    def artifacts(self, trial_id: str) -> Path:
        """Folder of a trial's images and logs."""
        return self.folder / "artifacts" / trial_id

    def shortage(self) -> str:
        """Why there is too little room to write results, and what to do; '' where there is enough."""
        free = shutil.disk_usage(self.folder).free
        return "" if free >= MIN_FREE_BYTES else (
            f"{self.folder}: only {free / 2**20:.0f} MiB free, and results need {MIN_FREE_BYTES / 2**20:.0f} MiB. Make room, "
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
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder, *self.folder.glob("*"), *self.folder.glob("artifacts/*")):
            require(not path.is_symlink(), f"{path}: is a link, and results must not leave their folder; remove it. To keep "
                    "results elsewhere, name the place with --results")
        shortage = self.shortage()
        require(not shortage, shortage)
        owner, lock = self.folder / ".driver", FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
            raise ConfigError(f"{self.folder}: {who} is running this sweep; wait for it, stop it, or name another "
                              "--results") from None
        self.held = self._lock_file()
        try:
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            yield
        finally:
            if self.there():  # else it names the driver that came after us
                owner.unlink(missing_ok=True)
            self.held = None
            lock.release()

    def _lock_file(self) -> int | None:
        """Its number in the file system, the same on all nodes; None where there is none."""
        try:
            return (self.folder / ".lock").lstat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            return None

    def there(self) -> bool:
        """Whether the folder is still the one whose lock is held, and was not deleted, moved, or made anew by another driver."""
        try:
            return self.held is None or self._lock_file() == self.held
        except OSError:  # a file system that is away for a moment
            return True

    def require_there(self) -> None:
        """ConfigError where the folder is no longer `there`: what is written would be half of a sweep, or another's."""
        require(self.there(), f"{self.folder}: was deleted, moved or replaced while its sweep ran, so that sweep ends and writes "
                "nothing more there. Run the same command again to begin anew, or first put the folder back to go on")

    def begin(self, sweep: Sweep) -> None:
        """Write down what the sweep is, and forget the progress of an earlier driver."""
        shutil.rmtree(self.progress_folder, ignore_errors=True)
        for folder in (self.progress_folder, *(self.folder / name for name in ("parts", "artifacts", ".locks"))):
            folder.mkdir(parents=True, exist_ok=True)
        put_text(self.folder / "sweep.yaml", sweep.text)
        self.extend(sweep)

    def extend(self, sweep: Sweep) -> None:
        """Write down which trials `sweep` has, and take over what sweeps beside it know of them."""
        self.require_there()
        put(self.folder / "sweep.json", {
            "schema": SCHEMA, "name": sweep.name, "question": sweep.question, "file_hash": sweep.file_hash,
            "trial_ids": sweep.trial_ids, "labels": {entry.trial_id: entry.label for entry in sweep.entries},
            **header(sweep.search, sweep.asha, {entry.trial_id: entry.number for entry in sweep.entries if entry.number})})
        self._set_aside_torn(sweep)
        for job in self.missing(sweep):
            if not job.alone:
                self._adopt(job)

    def _adopt(self, job: Job) -> None:
        """Take the finished score job of an equal trial from a sweep beside this one. Timings belong to their own session, and
        so does a score whose budget was solved by timing."""
        for path in sorted(self.folder.parent.glob(f"*/parts/{job.key}.json")):
            other = Ledger(path.parent.parent)
            if other.finished(job) and other.artifacts(job.trial_id).is_dir():
                shutil.copytree(other.artifacts(job.trial_id), self.artifacts(job.trial_id), dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns("timing.log"))
                part = other.part(job.key) or {}
                put(self.part_path(job.key), {**part, "environment": {**part["environment"], "adopted_from": other.folder.name}})
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
        """A part without error exists that was made from this very trial, by this code, with these threads."""
        return _usable(self.part(job.key), job.trial, job.code) and (
            job.threads is None or self.part(job.key)["threads"] == job.threads)  # type: ignore[index]

    def failed(self, job: Job) -> bool:
        """A part with an error exists that this very trial left, by this code."""
        part = self.part(job.key) or {}
        return bool(part.get("error")) and part.get("trial") == job.trial and part.get("code") == job.code

    def part(self, key: str) -> dict[str, Any] | None:
        """The part of job `key`; None where there is none or it cannot be read."""
        try:
            part = json.loads(self.part_path(key).read_text(encoding="utf-8"))
            return part if isinstance(part, dict) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is unreadable and counts as missing: %s", self.part_path(key), error)
            return None

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

    def write_part(self, job: Job, part: Mapping[str, Any], threads: int | None) -> None:
        """Make `part` the outcome of `job`, with what it was made from."""
        self.require_there()
        put(self.part_path(job.key), {**part, "job": job.kind, "trial_id": job.trial_id, "trial": job.trial, "code": job.code,
                                      "threads": threads})

    def write_failure(self, job: Job, kind: str, message: str, traceback: str = "") -> None:
        """Record that `job` failed; the next run tries it again."""
        self.write_part(job, {"error": {"job": job.kind, "type": kind, "message": message, "traceback": traceback}}, None)

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
            found = {path: _notes(self.part(path.stem)) for path in self.folder.glob(f"parts/{entry.trial_id}.*.json")}
            if any(disturbed({"budget": notes.get("budget")}) for notes in found.values()):
                for key in {str((notes.get("budget") or {}).get("solution")) for notes in found.values()}:
                    if re.fullmatch("[0-9a-f]{16}", key):
                        shutil.rmtree(self.folder.parent / ".cache" / "budget" / key, ignore_errors=True)
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
            parts = [part for part in (self.part(path.stem) for path in paths) if _usable(part, entry.trial, entry.code)]
            if len({(part.get("executed") or {}).get("speedup_calibrated") for part in parts} - {None}) > 1:  # type: ignore[union-attr]
                for path in paths:
                    os.replace(path, path.with_suffix(".disturbed"))

    def merge(self, entry: Entry, sweep_name: str, rungs: Sequence[str] = (),
              stopped: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The result of a trial from the parts there are; its file is written when it changed, and removed with its parts.

        rungs: kinds of its rung jobs. stopped: at which rung its training was stopped, and why; the result is then that of the
        rungs.
        """
        self.require_there()
        kinds = rungs if stopped else (*rungs, *JOBS)
        parts = {kind: self.part(f"{entry.trial_id}.{kind}") for kind in kinds}
        parts = {kind: part for kind, part in parts.items()
                 if part and (part.get("error") and part.get("trial") == entry.trial or _usable(part, entry.trial, entry.code))}
        errors = [part["error"] for part in parts.values() if part.get("error")]
        status = "stopped" if stopped else "failed" if errors else "done" if set(JOBS) <= parts.keys() else "partial"
        good = {kind: part for kind, part in parts.items() if not part.get("error")}
        result: dict[str, Any] = {
            "schema": SCHEMA, "trial_id": entry.trial_id, "sweep": sweep_name, "label": entry.label, "status": status,
            "error": errors[0] if errors else None, "trial": entry.trial, "varied": entry.varied, "code": entry.code}
        if stopped:
            result["stopped"] = dict(stopped)
        for name in _MERGED:
            result[name] = {key: value for part in good.values() for key, value in (part.get(name) or {}).items()}
        for name in ("environment", "stages", "usage"):
            result[name] = {kind: part.get(name) or {} for kind, part in good.items()}
        result["timestamp_ms"] = max((part.get("timestamp_ms") or 0 for part in good.values()), default=0)
        path = self.folder / f"{entry.trial_id}.json"
        text = _dump(result)
        if not parts:
            path.unlink(missing_ok=True)  # made by code or options that are no longer these
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            put_text(path, text)
        return result


def _notes(part: Mapping[str, Any] | None) -> dict[str, Any]:
    return (part or {}).get("environment") or {}


def _usable(part: Mapping[str, Any] | None, trial: Mapping[str, Any], code: str) -> bool:
    return part is not None and not part.get("error") and part.get("trial") == trial and part.get("code") == code


def put(path: Path, value: Any) -> None:
    """Write `value` as JSON: durable, and either wholly there or not at all."""
    put_text(path, _dump(value))


def put_text(path: Path, text: str, durable: bool = True) -> None:
    """Write `text` to a temporary name and move it into place; durable: survive a power cut too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # in containers a process id is not unique
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # half a file on a full disk would keep it full
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1)


