"""The content-addressed store: what is expensive and reproducible is computed once, under a key that names all its causes.

An entry is the folder `root/kind/<key>`; its key is a hash of the `inputs` that made it, so a changed input can never meet an
old result. Entries hold npz, safetensors and json; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)

INPUTS = "inputs.json"


def canonical(value: Any) -> str:
    """JSON of `value` with sorted keys and no spaces; equal values give equal text. TypeError for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def content_key(inputs: Mapping[str, Any]) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of `inputs`."""
    return hashlib.sha256(canonical(inputs).encode()).hexdigest()[:16]


class Store:
    """Entries under `root`, shared by all processes that see the folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Where the entry of `inputs` lies or would lie."""
        return self.root / kind / content_key(inputs)

    def has(self, kind: str, inputs: Mapping[str, Any]) -> bool:
        """Whether a complete entry exists."""
        return _state(self.path(kind, inputs), inputs) == "complete"

    def work_folder(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Where `make` may keep what it needs to go on after a kill; it is removed once the entry of `inputs` is complete."""
        target = self.path(kind, inputs)
        return target.with_name(f".{target.name}.work")

    def get_or_make(self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of the entry of `inputs`; when there is none, `make(folder)` fills a new one.

        Another process that is making the same entry is waited for. `make` that raises leaves no entry. An entry that cannot
        be read is dropped with a warning and made again.
        """
        target = self.path(kind, inputs)
        if _state(target, inputs) == "complete":
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            state = _state(target, inputs)
            if state == "complete":
                return target
            if state == "broken":
                log.warning("store: %s/%s cannot be read as what it should be; it is computed again", kind, target.name)
                _discard(target)
            self._make(kind, inputs, make)
        return target

    def _make(self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> None:
        target = self.path(kind, inputs)
        # a leftover of a killed process keeps its own name, so only this lock's owner ever touches it
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            make(folder)
            files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
            text = json.dumps({"inputs": dict(inputs), "files": files}, sort_keys=True, indent=1)
            (folder / INPUTS).write_text(text, encoding="utf-8")
            _sync(folder)
            folder.chmod(0o755)  # mkdtemp makes it private, but a store is shared
            os.replace(folder, target)
            _sync_path(target.parent)
            shutil.rmtree(self.work_folder(kind, inputs), ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _state(target: Path, inputs: Mapping[str, Any]) -> str:
    """'absent', 'complete', or 'broken': the listed files are missing, have another size, or belong to other inputs."""
    if not target.exists():
        return "absent"
    try:
        listing = json.loads((target / INPUTS).read_text(encoding="utf-8"))
        same = canonical(listing["inputs"]) == canonical(inputs)
        whole = all((target / name).stat().st_size == size for name, size in listing["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "broken"
    return "complete" if same and whole else "broken"


def _discard(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
