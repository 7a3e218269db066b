"""The id of a trial: a hash of all that it says."""

from __future__ import annotations

import hashlib
import json

from harness.api import Trial

SCHEMA = 1
"""Of results: part of every id, so that results of another schema are other trials."""


def trial_id(trial: Trial) -> str:
    """First 12 hex digits of sha256 over the trial's canonical JSON and the schema version."""
    text = json.dumps([SCHEMA, trial], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
