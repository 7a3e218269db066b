"""The result of a trial, made of the parts that its jobs left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.api import Part, Result, Trial
from harness.sweep.file import Entry
from harness.trial.ids import SCHEMA

JOBS = ("score", "timing")
_MERGED = ("metrics", "per_image", "executed", "series", "artifacts")


def usable(part: Part | None, trial: Trial, code: str) -> bool:
    """Whether a part is an outcome of this very trial by this code, and no failure."""
    return part is not None and not part.get("error") and part.get("trial") == trial and part.get("code") == code


def merged(entry: Entry, sweep_name: str, parts: Mapping[str, Part], stopped: Mapping[str, Any] | None) -> Result:
    """The result of a trial from its parts by kind of job. stopped: see `ResultsFolder.merge`."""
    errors = [part["error"] for part in parts.values() if part.get("error")]
    status = "stopped" if stopped else "failed" if errors else "done" if set(JOBS) <= parts.keys() else "partial"
    good = {kind: part for kind, part in parts.items() if not part.get("error")}
    result: Result = {
        "schema": SCHEMA, "trial_id": entry.trial_id, "sweep": sweep_name, "label": entry.label, "status": status,
        "error": errors[0] if errors else None, "trial": entry.trial,
        "varied": entry.varied, "code": entry.code}
    if stopped:
        result["stopped"] = dict(stopped)
    for name in _MERGED:
        result[name] = {key: value for part in good.values() for key, value in (part.get(name) or {}).items()}
    for name in ("environment", "stages", "usage"):
        result[name] = {kind: part.get(name) or {} for kind, part in good.items()}
    result["timestamp_ms"] = max((part.get("timestamp_ms") or 0 for part in parts.values()), default=0)
    times = {kind: [part["began_ms"], part["timestamp_ms"]] for kind, part in parts.items()
             if part.get("began_ms") and part.get("timestamp_ms")}
    if times:  # when each job began and ended; parts of earlier versions do not say
        result["times"] = times
    return result
