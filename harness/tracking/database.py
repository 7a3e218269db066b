"""MLflow's SQLite database beside the results: its address, who may make it, and where its files are once it was moved."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

ARTIFACTS = "mlartifacts"
"""Folder beside the database that holds the files of its runs."""
_TELLING = "?%"
"""Characters by which a database address means something else, depending on the version of SQLAlchemy."""


def address(database: Path) -> str:
    """The address of the SQLite file `database`."""
    path = Path(database).resolve()
    if not set(_TELLING) & set(str(path)):
        return f"sqlite:///{path}"
    return f"sqlite:///{_link(path.parent) / path.name}"


@functools.cache
def _link(folder: Path) -> Path:
    """A link to `folder` whose name can stand in an address; in a folder of ours alone, gone when we are."""
    place = Path(tempfile.mkdtemp(prefix="dit-harness-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    (place / "results").symlink_to(folder)
    return place / "results"


def file_of(uri: str) -> Path | None:
    """The file of an SQLite address as SQLAlchemy reads it; None for any other store."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database).resolve() if database and database != ":memory:" else None


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Hold an SQLite database against other processes of ours while it is made or brought up to date; its folder exists then.

    MLflow's migration is not made for two: on a new database the second fails, and can leave the schema half made.
    """
    database = file_of(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock")):
        yield


def follow_move(uri: str) -> int:
    """Let the runs of an SQLite database find their files where these lie now; how many experiments had moved.

    MLflow keeps absolute addresses. Ours always mean the folder `mlartifacts/<experiment>` beside the database.
    """
    database = file_of(uri)
    if database is None or not database.exists():
        return 0
    moved = 0
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'experiments'").fetchone():
            return 0
        rows = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for experiment, name, old in rows:
            new = (database.parent / ARTIFACTS / name).as_uri()
            if not old or old == new or not old.endswith(f"/{ARTIFACTS}/{quote(name)}") or not old.startswith("file:"):
                continue
            moved += 1
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, experiment))
            connection.execute("UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE experiment_id = ? AND "
                               "substr(artifact_uri, 1, ?) = ?", (new, len(old) + 1, experiment, len(old) + 1, f"{old}/"))
    return moved
