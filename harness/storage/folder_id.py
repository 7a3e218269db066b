"""What stands for a results folder, and goes with it when it is moved."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from filelock import FileLock

from harness.storage.durable import put_text


def folder_id(folder: Path) -> str:
    """32 hex digits that stand for this results folder; made where there are none."""
    path = folder / ".identity"
    if (known := _read(path)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".identity.lock"):  # a driver holds the folder's own lock for as long as it runs
            if (known := _read(path)) is None:
                known = uuid.uuid4().hex
                put_text(path, known)
    return known


def _read(path: Path) -> str | None:
    """What the file at `path` says, or None where it is no identity."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{32}", text) else None
