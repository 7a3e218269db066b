"""What is in the files, folders and hub models that a trial names, as short hashes: a name stays while its content changes.

A file of the same path, size, time of change and time of its entry is read once; what was learnt is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from harness.api import ConfigError
from harness.storage import strict_json
from harness.storage.durable import put_text

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
"""In place of a fingerprint: a model of a hub that is not on this machine, and whose hub does not answer."""
LARGE_BYTES = 2**28
"""From so many unread bytes on, the wait is announced."""
SETTLED_S = 0.02
"""A file that changed less than this ago may change again without another time of change: clocks of file systems are coarse."""
TIMEOUT_S = 5.0
IGNORED = (".md",)
"""Endings of files that tell people of a model and make no number."""
MAX_REMEMBERED = 20000
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_say: list[Callable[[str], None]] = []


class Source(Protocol):
    """Something other than a file, folder or hub id whose content belongs to a trial."""

    def digest(self) -> str:
        """Hex digits over the content."""


def fingerprint(sources: Iterable[str | Path | Source]) -> str | None:
    """16 hex digits over the content of `sources`; None without any; UNKNOWN where one cannot be told.

    A source is a file or folder, an id on the Hugging Face hub, or a `Source`. Other text is a word that names something inside
    of a package, whose code is hashed as code.
    """
    parts = [part for part in map(_content, sources) if part is not None]
    if not parts or UNKNOWN in parts:
        return UNKNOWN if parts else None
    return (parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest())[:16]


def _content(source: str | Path | Source) -> str | None:
    if not isinstance(source, str | Path):
        return source.digest()
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        try:
            return folder_hash(path) if path.is_dir() else file_hashes([path])[0]
        except OSError as error:
            raise ConfigError(f"{source}: {error.filename or 'a file there'} cannot be read ({error.strerror}); what a "
                              "sweep names is part of its trials, so make it readable") from None
    if isinstance(source, Path):
        raise ConfigError(f"{source}: there is no such file or folder any more; correct the path")
    return (cached_commit(source) or _asked_commit(source) or UNKNOWN) if _HUB_ID.fullmatch(source) else None


@contextmanager
def announced(say: Callable[[str], None]) -> Iterator[None]:
    """Tell people by `say` of long reads within the context."""
    _say.append(say)
    try:
        yield
    finally:
        _say.pop()


def announce(text: str) -> None:
    """Say `text` where somebody listens, and to the log."""
    log.info("%s", text)
    if _say:
        _say[-1](text)


# ---------------------------------------------------------------------------------------------- files


def folder_hash(folder: Path) -> str:
    """64 hex digits over names and content of all files below `folder`, but for hidden ones and those that tell of it only."""
    named = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    names = sorted(name for name in named if not name.endswith(IGNORED)
                   and not any(part.startswith(".") or part == "__pycache__" for part in name.split("/")))
    hashes = file_hashes([named[name] for name in names], str(folder))
    lines = (f"{name} {found}\n" for name, found in zip(names, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_hashes(files: Sequence[Path], place: str = "") -> list[str]:
    """sha256 of each file. place: what they are together, for the announcement and as the name of their cache."""
    known = Remembered(f"files-{hashlib.sha256((place or str(files[0].absolute())).encode()).hexdigest()[:16]}" if files else "")
    if any(known.get(file) is None for file in files):
        with known.locked():  # of several processes one reads; the others then find what it learnt
            _read(files, known, place or str(files[0]))
    return [known.get(file) for file in files]


def _read(files: Sequence[Path], known: Remembered, place: str) -> None:
    unread = [file for file in dict.fromkeys(files) if known.get(file) is None]
    size = sum(file.stat().st_size for file in unread)
    if size >= LARGE_BYTES:
        announce(f"Reading the weights of {place} ({size / 2**30:.1f} GiB) once, to know them again.")
    settle(unread)
    stamps = [stamp(file) for file in unread]  # before the content: what changes meanwhile is read again
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for file, mark, found in zip(unread, stamps, pool.map(_sha256, unread), strict=True):
            known.put(file, mark, found)
    known.save()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stamp(file: Path) -> str:
    """Size, time of change and time of the entry's change: another one whenever the bytes may have changed."""
    found = file.stat()
    return f"{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}"


def settle(files: Iterable[Path]) -> None:
    """Wait until the last change of `files` is so long ago that the next one has another time."""
    young = max((file.stat().st_ctime for file in files), default=0.0) + SETTLED_S - time.time()
    if 0 < young <= SETTLED_S:
        time.sleep(young)


class Remembered:
    """What was learnt of files, {path: value}, under `name` in the user's cache: a file of the same stamp is not read again."""

    def __init__(self, name: str) -> None:
        self._path, self._known = cache_folder() / f"{name}.json", {}
        self._load()

    def get(self, file: Path) -> Any:
        """The value of `file` as it is now; None where it is not known."""
        mark, value = self._known.get(str(file.absolute()), (None, None))
        return value if mark is not None and mark == stamp(file) else None

    def put(self, file: Path, mark: str, value: Any) -> None:
        """Keep `value`, learnt of `file` when its stamp was `mark`."""
        self._known[str(file.absolute())] = (mark, value)

    def save(self) -> None:
        """Write what is kept; of very many files only those that are still there."""
        if len(self._known) > MAX_REMEMBERED:
            self._known = {path: one for path, one in self._known.items() if os.path.exists(path)}
        write_cache(self._path, self._known)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes that use the same cache, and with what the one before learnt."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock: Any = FileLock(self._path.with_suffix(".lock")) if os.access(self._path.parent, os.W_OK) else nullcontext()
        except OSError:  # no cache: each process reads for itself
            lock = nullcontext()
        with lock:
            self._load()
            yield

    def _load(self) -> None:
        kept = read_cache(self._path).items()
        self._known |= {path: tuple(one) for path, one in kept if isinstance(one, list) and len(one) == 2}


def cache_folder() -> Path:
    """Where known hashes are kept: the user's cache, for weights and data may lie where we must not write."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-harness" / "hashes"


def read_cache(path: Path) -> dict[str, Any]:
    """What is kept at `path`; nothing where it is absent or damaged: reading the files again costs time only."""
    try:
        known = strict_json.read(path)
    except (FileNotFoundError, strict_json.Unreadable):
        return {}
    return known if isinstance(known, dict) else {}


def write_cache(path: Path, known: dict[str, Any]) -> None:
    """Keep `known` at `path`; a cache that cannot be written is said in the log."""
    try:
        put_text(path, json.dumps(known))
    except OSError as error:
        log.warning("hashes cannot be kept in %s (%s); every start reads all files again", path.parent, error)


# ---------------------------------------------------------------------------------------------- the hub


def cached_commit(model: str) -> str | None:
    """The commit of a hub model in this machine's cache, which is the one that is loaded; None where it is not there."""
    if not _HUB_ID.fullmatch(model) or os.path.exists(model):
        return None
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return commit if commit and (folder / "snapshots" / commit).is_dir() else None


@cache
def _asked_commit(model: str) -> str | None:
    """The commit that the hub would give now, asked once by this process, within seconds; None without an answer."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    try:
        request = urllib.request.Request(f"{constants.ENDPOINT}/api/models/{model}/revision/main", headers=build_hf_headers())
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            commit = json.load(answer).get("sha")
    except (OSError, ValueError, AttributeError) as error:
        log.info("%s: its revision cannot be told (%s)", model, error)
        return None
    return commit if isinstance(commit, str) else None
