"""One driver for a results folder at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.api import ConfigError


def lock_file(folder: Path) -> int | None:
    """The number of the folder's lock in the file system, the same on all nodes; None where there is none."""
    try:
        return (folder / ".lock").lstat().st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def driving(folder: Path) -> Iterator[int | None]:
    """Hold an existing folder against a second driver; yields its `lock_file`. Freed by the system when we die.

    Raises ConfigError that names the driver that holds it.
    """
    owner, lock = folder / ".driver", FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8", errors="replace") if owner.exists() else "another process"
        raise ConfigError(f"{folder}: {who} is running this sweep; wait for it, stop it, or name another --results") from None
    held = lock_file(folder)
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield held
    finally:
        if lock_file(folder) == held:  # else it names the driver that came after us
            owner.unlink(missing_ok=True)
        lock.release()
