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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.storage import arrays, strict_json
from harness.storage.durable import OLD_S, SUFFIX, synced

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

    def sweep_up(self) -> int:
        """Remove what killed makers left a day ago or earlier, where nobody is making the same; how many folders."""
        removed = 0
        for leftover in self.root.glob(f"*/.*{SUFFIX}"):
            key = leftover.name[1:].partition(".")[0]
            try:
                if not leftover.is_dir() or leftover.is_symlink() or time.time() - leftover.lstat().st_mtime < OLD_S:
                    continue
                with FileLock(leftover.with_name(f".{key}.lock"), timeout=0):
                    shutil.rmtree(leftover, ignore_errors=True)
                    removed += not leftover.exists()
            except (OSError, Timeout):  # another driver sweeps too, or makes this very entry: it is theirs
                continue
        return removed

    def _make(self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> None:
        target = self.path(kind, inputs)
        # a leftover of a killed process keeps its own name, so only this lock's owner ever touches it
        for leftover in target.parent.glob(f".{target.name}.*{SUFFIX}"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent))
        try:
            make(folder)
            files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
            text = json.dumps({"inputs": dict(inputs), "files": files}, sort_keys=True, indent=1)
            (folder / INPUTS).write_text(text, encoding="utf-8")
            _sync(folder)
            folder.chmod(0o755)  # mkdtemp makes it private, but a store is shared
            os.replace(folder, target)
            synced(target.parent)
            shutil.rmtree(self.work_folder(kind, inputs), ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _state(target: Path, inputs: Mapping[str, Any]) -> str:
    """'absent', 'complete', or 'broken': the listed files are missing, damaged, have another size, or belong to other
    inputs."""
    if not target.exists():
        return "absent"
    try:
        listing = strict_json.read(target / INPUTS)
        same = canonical(listing["inputs"]) == canonical(inputs)
        whole = all((target / name).stat().st_size == size for name, size in listing["files"].items()) \
            and not any(arrays.flaw(target / name) for name in listing["files"] if name.endswith(".npz"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "broken"
    return "complete" if same and whole else "broken"


def _discard(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        synced(path)
    synced(folder)
