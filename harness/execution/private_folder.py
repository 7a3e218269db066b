"""A new folder that only we can enter, for as long as we live; what dead processes of ours left behind is removed.

Its name cannot be foretold, so nobody can put a folder or a link in its place. Whoever uses one holds a lock in it, which the
system frees when it dies and which, unlike a process id, means the same in every container that shares the folder around it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from harness.api import ConfigError, require

PREFIX = "dit-ray-"
LONGEST = 36
"""Letters of its path: a socket's path may have 107, of which Ray takes up to 70 (macOS allows 103)."""
UNLOCKED_S = 3600.0
"""A folder without a lock is one that is being made; after this long it is one whose maker was killed."""


class PrivateFolder:
    """`folder.path` until `folder.close()`, which removes it."""

    def __init__(self, base: Path | None = None) -> None:
        base = base or _base()
        remove_leftovers(base)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(self.path / ".lock", self.path / "lock")  # seen by others, it is held
        except OSError as error:
            raise ConfigError(f"{base}: no private folder can be made there for Ray ({error.strerror}); make room or give its "
                              "permissions back, or set TMPDIR to a short path where you may write") from error

    def close(self) -> None:
        """Remove it. Then free the lock: whoever waits for that finds nothing left."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _base() -> Path:
    """/tmp, for it is short, or what the system takes for temporary files."""
    base = Path("/tmp") if os.access("/tmp", os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    longest = LONGEST - len("/12345678") - len(PREFIX)
    require(len(str(base)) <= longest,
            f"{base}: too long a path for Ray's sockets; set TMPDIR to one of {longest} letters or less")
    return base


def remove_leftovers(base: Path) -> None:
    """Remove the folders in `base` whose owner is dead: ours, no links, and their lock is free."""
    for path in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another driver removes it too, or it is none of ours to look into
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700:
                _remove_unless_held(path, found.st_mtime)


def _remove_unless_held(path: Path, changed: float) -> None:
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - changed > UNLOCKED_S:
            shutil.rmtree(path, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its owner lives
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
