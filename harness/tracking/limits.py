"""How long MLflow lets a text be, and how much it takes at once: the only place that knows. Pure; imports no mlflow.

Longer texts it cuts without a word or refuses, by kind and version. Cut here, they say so and where the whole text is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

KEY, NAME, TAG, PARAM, DATA_SET, SOURCE = 250, 250, 5000, 6000, 500, 60_000
"""Characters of: a key, a run's name, a tag or description (of runs and experiments), a param, a data set's name and source."""
_AT_ONCE = {"metrics": 800, "params": 90, "tags": 90}
_CHARACTERS_AT_ONCE = 400_000
_FORBIDDEN = re.compile(r"[^\w\-. :/]")


def fit(text: str, limit: int, whole: str = "result.json") -> str:
    """`text`, cut to `limit` characters where it is longer. whole: the artifact that has all of it."""
    if len(text) <= limit:
        return text
    end = f" ... [{len(text)} characters, cut; whole in {whole}]"
    return text[:limit - len(end)] + end


def key(name: str) -> str:
    """`name` as a key: what MLflow refuses becomes '_'. A cut one ends in a digest, so that no two long ones become one."""
    text = _FORBIDDEN.sub("_", name)
    return text if len(text) <= KEY else f"{text[:KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def fit_lines(head: Sequence[str], lines: Sequence[str], end: Sequence[str], whole: str) -> str:
    """`head`, as many of `lines` as a description can hold, and `end`. whole: the artifact that lists all."""
    for shown in range(len(lines), -1, -1):
        more = [] if shown == len(lines) else [f"- ... and {len(lines) - shown} more: see `{whole}` in the artifacts"]
        text = "\n".join([*head, *lines[:shown], *more, *end])
        if len(text) <= TAG:
            return text
    return fit(text, TAG, whole)


def batches(metrics: Iterable[Any], params: Iterable[Any], tags: Iterable[Any]) -> Iterator[dict[str, list[Any]]]:
    """Keywords of `log_batch`, one set for each request; the parts of a request stay below what a server takes."""
    batch: dict[str, list[Any]] = {kind: [] for kind in _AT_ONCE}
    characters = 0
    for kind, items in (("params", params), ("tags", tags), ("metrics", metrics)):
        for item in items:
            size = 100 + len(json.dumps([item.key, item.value]))
            if len(batch[kind]) >= _AT_ONCE[kind] or characters + size > _CHARACTERS_AT_ONCE:
                yield batch
                batch, characters = {kind: [] for kind in _AT_ONCE}, 0
            batch[kind].append(item)
            characters += size
    if any(batch.values()):
        yield batch
