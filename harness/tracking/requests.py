"""Asking an MLflow server for something new, such that it is made once whatever becomes of the answer."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

ATTEMPTS, PAUSE_S = 3, 1.0
"""How often something new is asked for, and how long an answer that was lost may be on its way; twice that the second time."""
Made = TypeVar("Made")


def found_or_made(find: Callable[[], Made | None], make: Callable[[], Made]) -> Made:
    """What `find` finds, else what `make` makes: looked for before it is asked for, each time.

    An answer can be lost or late while the request was obeyed; to ask again at once would make a second one.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(ATTEMPTS):
        if (found := find()) is not None:
            return found
        try:
            with _asked_once():
                return make()
        except MlflowException as error:
            failure = error
            time.sleep(PAUSE_S * (attempt + 1))
    if (found := find()) is not None:
        return found
    raise failure


@contextlib.contextmanager
def _asked_once() -> Iterator[None]:
    """Keep MLflow's client from repeating a request by itself, which it does whatever the request is."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
