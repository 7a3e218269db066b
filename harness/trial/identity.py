"""What a trial rests on beside what its sweep file says: the content of what its options name, and the code of its numbers.

Content is part of the trial, as a `fingerprint` beside the options that name it, so other content under an old name is another
trial with another id. Code is kept beside each part, and a part by other code counts as missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from harness import data
from harness.api import BACKBONES, METHODS, METRICS, Trial, named, require
from harness.storage.code_hash import code_hash
from harness.storage.fingerprints import UNKNOWN, fingerprint

JOB = "harness.trial.job"
"""The module whose `run_job` makes every result."""
REGISTRIES = {"backbone": BACKBONES, "method": METHODS, "metric": METRICS}


def identified(trial: Trial, where: str) -> Trial:
    """The trial with a fingerprint of what its backbone, method and metrics name outside of this package; data have theirs."""
    return {**trial, "backbone": _with_content("backbone", trial["backbone"], where),
            "method": _with_content("method", trial["method"], where),
            "metrics": [_with_content("metric", metric, where) for metric in trial["metrics"]]}


def forget() -> None:
    """Look at files anew at the next use: they may have changed."""
    _remembered.cache_clear()


def _with_content(kind: str, entry: dict[str, Any], where: str) -> dict[str, Any]:
    found = _remembered(kind, json.dumps(entry, sort_keys=True), where)
    return entry if found is None else {**entry, "fingerprint": found}


@lru_cache(maxsize=4096)
def _remembered(kind: str, entry: str, where: str) -> str | None:
    """Taken once for all trials of a sweep, however many they are."""
    return content(kind, json.loads(entry), f"{where}: {kind}")


def content(kind: str, entry: Mapping[str, Any], where: str) -> str | None:
    """Fingerprint of what the options of an entry name now; see `harness.storage.fingerprints.fingerprint`."""
    name, options = named(entry)
    registry = REGISTRIES[kind]
    return fingerprint(registry.get(name).sources(registry.config(name, options, where)))


def check_content(kind: str, entry: Mapping[str, Any], where: str) -> None:
    """ConfigError where the options of an entry of a trial no longer name what the trial was made for."""
    expected = entry.get("fingerprint")
    if expected in (None, UNKNOWN):
        return
    found = content(kind, entry, where)
    require(found == expected, f"{where}: the files of '{entry['name']}' have changed: their fingerprint is {found}, and the "
            f"trial was made for {expected}; run the sweep file again")


def found_out(trial: Trial) -> dict[str, Any]:
    """What of a trial's content could not be told when it was made and can be now: {'backbone_fingerprint': ...}."""
    entries = [("backbone", trial["backbone"]), *((f"metric {metric['name']}", metric) for metric in trial["metrics"])]
    return {f"{where}_fingerprint": content(where.split()[0], entry, where) for where, entry in entries
            if entry.get("fingerprint") == UNKNOWN}


def code_of(trials: Iterable[Trial]) -> list[str]:
    """For each trial 12 hex digits over the code that makes its numbers."""
    parts = [_classes(trial) for trial in trials]
    known = {classes: code_hash(JOB, *classes) for classes in set(parts)}
    return [known[classes] for classes in parts]


def _classes(trial: Trial) -> tuple[type, ...]:
    """The classes that a trial takes by name: what its results rest on beside what every job imports."""
    metrics = dict.fromkeys(METRICS.get(metric["name"]) for metric in trial["metrics"])
    return (METHODS.get(trial["method"]["name"]), BACKBONES.get(trial["backbone"]["name"]), METHODS.get("dense"),
            *data.code_of(trial["data"]), *metrics)
