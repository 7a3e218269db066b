"""Files that are there whole or not at all, and that lie where they seem to lie: the one way in which anything is written.

A file is written under another name, made durable, and moved into place, so a kill or a power cut at any moment leaves the old
file or the new one. What is moved replaces a link; it never writes through one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".tmp"
OLD_S = 24 * 3600.0
"""Age at which an unfinished file has no writer any more."""


@contextmanager
def placed(path: Path, durable: bool = True) -> Iterator[Path]:
    """An empty file beside `path` to be filled; it becomes `path` at the end, and is removed where that is not reached.

    durable: survive a power cut too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}{SUFFIX}")  # in containers a process id is not unique
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # exclusive: nobody's link is followed
        yield unfinished
        if durable:
            synced(unfinished)
        os.replace(unfinished, path)
    finally:  # half a file on a full disk would keep it full
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    if durable:
        synced(path.parent)


@contextmanager
def writing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """`placed`, open for bytes."""
    with placed(path, durable) as unfinished, open(unfinished, "wb") as file:
        yield file


def put_text(path: Path, text: str, durable: bool = True) -> None:
    """Make `text` the content of `path`."""
    with writing(path, durable) as file:
        file.write(text.encode())


def copied(source: Path, target: Path) -> None:
    """Make `target` a copy of the file `source`."""
    with open(source, "rb") as read, writing(target) as file:
        while block := read.read(2**20):
            file.write(block)


def swap_in(made: Path, target: Path) -> None:
    """Make the folder `made`, which lies beside `target`, that folder; no reader meets half of it."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)


def synced(path: Path) -> None:
    """Make what the system holds of a file or a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_in(root: Path) -> Path | None:
    """The first of `root` and everything below it that is a link, at any depth; None where there is none. None is followed."""
    if root.is_symlink():
        return root
    for folder, names, files in os.walk(root):
        for name in sorted([*names, *files]):
            if (path := Path(folder, name)).is_symlink():
                return path
    return None


def link_between(root: Path, path: Path) -> Path | None:
    """The first of `root`, `path` and the folders between them that is a link; None where there is none."""
    parts = path.relative_to(root).parts
    steps = [root.joinpath(*parts[:index]) for index in range(len(parts) + 1)]
    return next((step for step in steps if step.is_symlink()), None)


def unwritable(folder: Path) -> str:
    """Why no files can be put into `folder`, which need not exist yet; '' where they can."""
    try:
        there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
        if not there.is_dir():
            return f"{there} is a file" if there.is_file() else f"{there} is no folder"
        return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written to"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def is_folder(path: Path) -> bool:
    """Whether a folder is there that can be asked; no name is too long or too odd."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_within(error: OSError, folder: Path) -> bool:
    """Whether the file that an error of the system names lies in `folder`, or is the folder."""
    return error.filename is not None and Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute())


def sweep_up(folder: Path) -> None:
    """Remove unfinished files that killed writers left in `folder` a day ago or earlier; one that another is removing is gone."""
    for path in folder.glob(f".*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink() and time.time() - path.lstat().st_mtime > OLD_S:
                path.unlink()
