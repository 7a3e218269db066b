"""Finished jobs of a results folder that a sweep asks for by the same words and may not use, told with the reason.

They were made from other files under the same name, before files were recorded at all, by other code, or by a version of it that
had other options. Their files stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from harness.api import Part, Trial
from harness.execution.results_folder import ResultsFolder
from harness.sweep.file import Sweep


def unused(folder: ResultsFolder, sweep: Sweep) -> list[str]:
    """A sentence for each reason why finished jobs in the folder are not results of `sweep`."""
    asked = {_words(entry.trial): entry for entry in reversed(sweep.entries)}
    reasons: Counter[str] = Counter()
    for path in sorted((folder.path / "parts").glob("*.json")):
        part = folder.part(path.stem) or {}
        entry = asked.get(_words(part.get("trial")))
        if not part or part.get("error"):
            continue
        if entry is None:
            if options := _other_options(part, sweep):
                reasons[f"they were made by a version of the code with other options ({', '.join(options)})"] += 1
        elif part["trial"] != entry.trial:
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


def _other_options(part: Part, sweep: Sweep) -> list[str]:
    """The options that only a part by other code, or only a trial of `sweep` has, where the two differ in nothing else."""
    alike = (entry for entry in sweep.entries if entry.code != part["code"] and "method" in part["trial"])
    return next((found for entry in alike if (found := _lacking(part["trial"], entry.trial))), [])


def _lacking(old: Any, new: Any, place: str = "") -> list[str] | None:
    """Dotted keys that only one of the two has; None where something else differs, too."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(f"{place}.{key}".lstrip("."), key) for key in {**new, **old} if key != "fingerprint"]
        found = [[at] if key not in old or key not in new else _lacking(old[key], new[key], at) for at, key in pairs]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = [_lacking(one, other, f"{place}[{index}]") for index, (one, other) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else None
    return None if None in found else [key for keys in found for key in keys or ()]


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
