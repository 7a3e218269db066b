"""Finished jobs of a results folder that a sweep asks for by the same words and may not use, told with the reason.

They were made from other files under the same name, before files were recorded at all, or by other code. Their files stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from harness.api import Trial
from harness.execution.results_folder import ResultsFolder
from harness.sweep.file import Sweep


def unused(folder: ResultsFolder, sweep: Sweep) -> list[str]:
    """A sentence for each reason why finished jobs in the folder are not results of `sweep`."""
    asked = {_words(entry.trial): entry for entry in reversed(sweep.entries)}
    reasons: Counter[str] = Counter()
    for path in sorted((folder.path / "parts").glob("*.json")):
        part = folder.part(path.stem) or {}
        entry = asked.get(_words(part.get("trial")))
        if entry is None or part.get("error"):
            continue
        if part["trial"] != entry.trial:
            reasons[" and ".join(_differing(part["trial"], entry.trial))] += 1
        elif part.get("code") != entry.code:
            reasons["they were made by other code"] += 1
    return [f"{folder.path}: {count} finished job{'s are' if count > 1 else ' is'} not used, for {reason}; made again here."
            for reason, count in reasons.items()]


def _words(trial: Any) -> str:
    """The trial as a sweep file would write it: without the fingerprints of what it names."""
    if isinstance(trial, Mapping):
        return json.dumps({key: _words(value) for key, value in trial.items() if key != "fingerprint"}, sort_keys=True)
    return json.dumps([_words(one) for one in trial] if isinstance(trial, list) else trial)


def _differing(old: Trial, new: Trial) -> list[str]:
    """What of two trials of the same words has other files, or had no files recorded."""
    before, now = _fingerprints(old), _fingerprints(new)
    return [f"the files of {name} {'are others now' if name in before else 'were not recorded then'}"
            for name in {**now, **before} if before.get(name) != now.get(name)]


def _fingerprints(tree: Any, place: str = "") -> dict[str, str]:
    """{place in the trial, such as 'backbone' or 'metrics[0]': fingerprint}."""
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    found = {place: tree["fingerprint"]} if isinstance(tree, Mapping) and "fingerprint" in tree else {}
    for key, value in pairs:
        found |= _fingerprints(value, f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}".lstrip("."))
    return found
