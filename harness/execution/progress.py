"""Watching a running sweep: polls the folder, tells the caller what ended, and draws one live view (or plain lines)."""

from __future__ import annotations

import _thread
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.execution.results_folder import Job, ResultsFolder
from harness.storage import records

log = logging.getLogger(__name__)

POLL_S = 0.5
QUIET_S = 60.0
"""With work waiting and nothing running for this long, say why."""


@dataclass
class JobState:
    """A job of this run. state: waiting, running, done or failed. `began`, `stage_began`, `ended`: this process's clock.

    first_share: of the present stage when it was first seen, more than 0 where a training goes on from a checkpoint.
    """

    job: Job
    before: tuple[int, ...] | None
    state: str = "waiting"
    stage: str = ""
    share: float = 0.0
    first_share: float = 0.0
    began: float = 0.0
    stage_began: float = 0.0
    ended: float = 0.0
    pid: Any = None

    @property
    def over(self) -> bool:
        """No longer waiting or running."""
        return self.state in ("done", "failed")

    def left(self, now: float) -> float | None:
        """Seconds to the end of the stage at its pace so far; None while too little of it has been seen."""
        seen = self.share - self.first_share
        return (now - self.stage_began) * (1 - self.share) / seen if seen > 0.02 else None


@dataclass
class Watch:
    """Polls in a thread of its own while the block runs: `with Watch(...):`.

    jobs: what this run does, as far as it is known; `add` tells of more. num_before: jobs of the sweep that were finished
    before. workers: score jobs at once. on_part(job): called once for each job that ends. explain(): the answer to "why does
    nothing start?". live: one view that is drawn anew, where the console is a terminal; else a line per event. growing: whether
    more jobs may come.
    """

    folder: ResultsFolder
    jobs: Sequence[Job]
    num_before: int
    workers: int
    console: Console
    on_part: Callable[[Job], None]
    explain: Callable[[], str]
    live: bool = True
    growing: bool = False
    rows: list[JobState] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [JobState(job, _signature(self.folder.part_path(job.key))) for job in self.jobs]
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._loop, daemon=True, name="watch")
        drawn = self.live and self.console.is_terminal
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if drawn else None
        self._began = self._last_sign = time.monotonic()
        self._unwritten = ""

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.poll()
        if self._live:
            self._live.stop()

    def add(self, job: Job) -> None:
        """A job that was decided on only now."""
        self.rows.append(JobState(job, _signature(self.folder.part_path(job.key))))

    def failed(self) -> list[Job]:
        """Jobs that ended with an error."""
        return [row.job for row in self.rows if row.state == "failed"]

    def unfinished(self) -> list[Job]:
        """Jobs that have not ended."""
        return [row.job for row in self.rows if not row.over]

    def poll(self) -> None:
        """Read the folder once and tell what changed; where it is gone, end the run as Ctrl-C does."""
        if not self.folder.there():
            if threading.current_thread() is self._thread:
                self._stop.set()
                _thread.interrupt_main()
            return
        for row in self.rows:
            if not row.over and not self._ended(row):
                self._advance(row)
        if any(row.state == "running" for row in self.rows) or all(row.over for row in self.rows):
            self._last_sign = time.monotonic()
        elif time.monotonic() - self._last_sign > QUIET_S:
            self._last_sign = time.monotonic()
            self._say(f"no job has started for {QUIET_S:.0f} s. {self.explain()}")
        if self._live:
            self._live.update(self._view(), refresh=True)

    def _loop(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.poll()
            except OSError as error:  # such as a full disk: the jobs meet it too, and the driver says what to do
                if str(error) != self._unwritten:
                    self._unwritten = str(error)
                    log.warning("a result could not be merged, and will be at the end of the run: %s", error)
            except Exception:  # the display must not end the watch: results still have to be merged
                log.exception("progress display")

    def _ended(self, row: JobState) -> bool:
        path = self.folder.part_path(row.job.key)
        if _signature(path) in (None, row.before):
            return False
        part = self.folder.part(row.job.key)
        if part is None:
            return False
        now = row.ended = time.monotonic()
        row.state = "failed" if part.get("error") else "done"
        seconds = now - (row.began or now)
        if part.get("error"):
            error = part["error"]
            self._say(f"{row.job.label}  {row.job.kind}  FAILED: {error['type']}: {error['message']}"[:500])
        else:
            self._seconds[row.job.kind].append(seconds)
            self._say(f"{row.job.label}  {row.job.kind}  done ({_duration(seconds)})")
        self.on_part(row.job)
        return True

    def _advance(self, row: JobState) -> None:
        with contextlib.suppress(FileNotFoundError, records.Unreadable):
            said = records.load(self.folder.progress_path(row.job.key), records.PROGRESS)
            now = time.monotonic()
            if row.state == "waiting" or said["pid"] != row.pid:  # another process: the first one died and it was tried again
                again, row.state, row.began, row.pid = row.state == "running", "running", now, said["pid"]
                self._say(f"{row.job.label}  {row.job.kind}  {'started again' if again else 'started'}")
            row.share, before = said["done"] / said["total"] if said["total"] else 0.0, row.share
            if said["stage"] != row.stage:
                row.stage, row.stage_began, row.first_share = said["stage"], now, row.share
                if not self._live and row.stage != "start":
                    self._say(f"{row.job.label}  {row.job.kind}  {row.stage}")
            elif not self._live and int(4 * row.share) > int(4 * before) and now - row.stage_began > QUIET_S / 2:
                self._say(f"{row.job.label}  {row.job.kind}  {row.stage} {100 * row.share:.0f}%, "
                          f"left {_duration(row.left(now))}")

    def _say(self, text: str) -> None:
        count = f"{self.num_before + sum(row.over for row in self.rows)}/{self.num_before + len(self.rows)}{'+' * self.growing}"
        self.console.print(Text(f"{time.strftime('%H:%M:%S')}  {count}  {text}"), soft_wrap=True)

    # -------------------------------------------------------------------------------------------- the live view

    def _view(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("trial", "job", "stage", "", "elapsed", "left"):
            table.add_column(name, justify="right" if name in ("elapsed", "left") else "left", no_wrap=True)
        now = time.monotonic()
        for row in [row for row in self.rows if row.state == "running"]:
            table.add_row(Text(row.job.label), row.job.kind, Text(row.stage), f"{100 * row.share:3.0f}%",
                          _duration(now - row.began), _duration(row.left(now)))
        done, total = self.num_before + sum(row.over for row in self.rows), self.num_before + len(self.rows)
        waiting, failed = sum(row.state == "waiting" for row in self.rows), len(self.failed())
        words = f"{done}/{total}{'+' * self.growing} jobs, {waiting} waiting" + (f", {failed} failed" if failed else "")
        overall = Table.grid(padding=(0, 1))
        overall.add_row(ProgressBar(total=max(total, 1), completed=done, width=30), words,
                        f"elapsed {_duration(now - self._began)}", f"left about {_duration(self._left(now))}")
        return Group(table, overall)

    def _left(self, now: float) -> float | None:
        """Seconds to the end: mean duration of each kind of job so far, score jobs side by side; None while a kind is new, or
        where more jobs may come."""
        if self.growing:
            return None
        left = 0.0
        for kind in dict.fromkeys(row.job.kind for row in self.rows):
            lanes = 1 if kind == "timing" else self.workers
            rows = [row for row in self.rows if row.job.kind == kind and not row.over]
            seen = self._seconds[kind]
            if rows and not seen:
                return None
            mean = sum(seen) / len(seen) if seen else 0.0
            left += sum(max(mean - (now - row.began if row.state == "running" else 0.0), 0.1 * mean) for row in rows) / min(
                lanes, max(len(rows), 1))
        return left


def _signature(path: Path) -> tuple[int, ...] | None:
    """Tells one version of a file from the next; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _duration(seconds: float | None) -> str:
    """'48 s', '3:07', '1:02:45', or '-' when unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"
