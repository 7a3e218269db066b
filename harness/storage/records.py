"""What a results folder holds, as it must be when it is read: parts, results, sweep.json, progress.

A file that another program, another version or a damaged disk left there does not fit; it counts as missing, and is named once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.api.measure import GROUPS
from harness.storage import strict_json
from harness.storage.strict_json import Unreadable

log = logging.getLogger(__name__)

Check = Callable[[Any, str], None]
"""Raises Unreadable for a value that does not fit. The text: where it stands, such as 'metrics.fd.value'."""

_said: set[tuple[str, str]] = set()


def load(path: Path, check: Check) -> dict[str, Any]:
    """The mapping in a file that fits `check`. Raises FileNotFoundError, or Unreadable with the reason."""
    value = strict_json.read(path, nonfinite=True)
    check(value, "")
    return value


def read(path: Path, check: Check) -> dict[str, Any] | None:
    """The mapping in a file; None where there is no file, and where it does not fit, which is said once."""
    try:
        return load(path, check)
    except FileNotFoundError:
        return None
    except Unreadable as error:
        said = (str(path), str(error))
        if said not in _said:
            _said.add(said)
            log.warning("%s counts as missing: %s", path, error)
        return None


# ---------------------------------------------------------------------------------------------- kinds of values


def _is(what: str, test: Callable[[Any], bool]) -> Check:
    def check(value: Any, place: str) -> None:
        if not test(value):
            raise Unreadable(f"{place or 'it'} should be {what}, and is {type(value).__name__} {str(value)[:60]!r}")

    return check


def _number(value: Any) -> bool:
    return type(value) in (int, float)


TEXT = _is("text", lambda value: isinstance(value, str))
NUMBER = _is("a number", _number)
VALUE = _is("a number", lambda value: _number(value) and not math.isnan(value))
FINITE = _is("a finite number", lambda value: _number(value) and math.isfinite(value))
COUNT = _is("a whole number", lambda value: type(value) is int)
TRUTH = _is("true or false", lambda value: isinstance(value, bool))
MAPPING = _is("a mapping", lambda value: isinstance(value, dict))
LIST = _is("a list", lambda value: isinstance(value, list))
_numbers = _is("a list of numbers", lambda value: isinstance(value, list) and set(map(type, value)) <= {int, float})
_shares = _is("a list of shares of tokens", lambda value: isinstance(value, list) and set(map(type, value)) <= {int, float}
              and all(0 <= share <= 100 for share in value))


def one_of(*choices: str) -> Check:
    """One of these texts."""
    return _is(" or ".join(choices), lambda value: isinstance(value, str) and value in choices)


def maybe(check: Check) -> Check:
    """null, or what `check` allows."""
    return lambda value, place: None if value is None else check(value, place)


def each(check: Check) -> Check:
    """A list whose items all fit."""
    def whole(value: Any, place: str) -> None:
        LIST(value, place)
        for index, item in enumerate(value):
            check(item, f"{place}[{index}]")

    return whole


def values(check: Check) -> Check:
    """A mapping whose values all fit."""
    def whole(value: Any, place: str) -> None:
        MAPPING(value, place)
        for key, item in value.items():
            check(item, f"{place}.{key[:80]}" if place else key[:80])

    return whole


class record:  # noqa: N801  (one of the checks, which are all written alike)
    """A mapping with the keys `needed`, and whose known keys fit; others may stand beside them."""

    def __init__(self, needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> None:
        self.needed, self.known = needed, {**needed, **(optional or {})}

    def __call__(self, value: Any, place: str) -> None:
        """Check it."""
        MAPPING(value, place)
        for key in self.needed:
            if key not in value:
                raise Unreadable(f"{f'{place}.' if place else ''}{key} is missing")
        for key in value.keys() & self.known.keys():
            self.known[key](value[key], f"{place}.{key}" if place else key)


def both(*checks: Check) -> Check:
    """What fits all of `checks`."""
    def whole(value: Any, place: str) -> None:
        for check in checks:
            check(value, place)

    return whole


def _pair(first: Check, second: Check) -> Check:
    def whole(value: Any, place: str) -> None:
        if not isinstance(value, list) or len(value) != 2:
            raise Unreadable(f"{place} should be a pair, and is {str(value)[:60]!r}")
        first(value[0], place)
        second(value[1], place)

    return whole


# ---------------------------------------------------------------------------------------------- what they are made of

MEASURE = record({"value": maybe(VALUE), "better": one_of("lower", "higher", "none")},
                 {"interval": maybe(_pair(VALUE, VALUE)), "n": maybe(FINITE), "unavailable": maybe(TEXT),
                  "group": one_of(*GROUPS), "heading": TEXT, "title": TEXT, "unit": TEXT, "percent": TRUTH, "lead": COUNT,
                  "window": maybe(_pair(one_of("share", "absolute"), FINITE))})
OPTIONS = maybe(MAPPING)
NAMED = record({"name": TEXT})
TRIAL = record({}, {"method": NAMED, "backbone": maybe(NAMED), "data": maybe(NAMED), "sampler": OPTIONS, "train": OPTIONS,
                    "budget": maybe(values(maybe(FINITE))), "seeds": maybe(_pair(COUNT, COUNT)), "metrics": maybe(each(NAMED)),
                    "threads": maybe(COUNT)})
USAGE = record({}, {"began_ms": FINITE, "curves": maybe(values(each(_pair(FINITE, NUMBER))))})
STOPPED = record({"rung": COUNT, "of": COUNT, "step": COUNT, "metric": TEXT, "value": NUMBER, "rank": COUNT, "rows": COUNT,
                  "went_on": COUNT})
ERROR = record({"job": TEXT, "type": TEXT, "message": TEXT}, {"traceback": TEXT})
ENVIRONMENT = maybe(record({}, {"score": MAPPING, "timing": MAPPING}))
_RATIOS = maybe(both(each(_shares), _is("a table of rows of one length", lambda rows: len(set(map(len, rows))) <= 1)))
_MEASURED = {
    "error": maybe(ERROR), "metrics": maybe(values(MEASURE)), "per_image": maybe(values(maybe(_numbers))),
    "executed": maybe(record({}, {"kept_attention": _RATIOS, "kept_ffn": _RATIOS, "keep_ratio_solved": maybe(FINITE)})),
    "series": maybe(values(each(_pair(FINITE, NUMBER)))), "artifacts": maybe(values(TEXT)), "environment": ENVIRONMENT,
    "timestamp_ms": maybe(FINITE)}
PART = record({"trial": TRIAL, "code": TEXT}, {**_MEASURED, "stages": maybe(values(FINITE)), "usage": maybe(USAGE),
                                               "threads": maybe(COUNT), "job": TEXT, "trial_id": TEXT, "began_ms": FINITE})
"""What a worker writes of one job: `harness.api.records.Part`."""
RESULT = record({"trial_id": TEXT, "label": TEXT, "status": one_of("done", "partial", "failed", "stopped"), "trial": TRIAL,
                  "sweep": TEXT},
                 {**_MEASURED, "varied": MAPPING, "code": maybe(TEXT), "stopped": maybe(STOPPED),
                  "stages": maybe(values(values(FINITE))), "usage": maybe(values(USAGE)), "schema": COUNT,
                  "times": maybe(values(_pair(FINITE, FINITE)))})
"""`harness.api.records.Result`."""
SEARCH = record(
    {"algorithm": one_of("grid", "random", "optuna"), "sampler": maybe(TEXT), "parallel": maybe(COUNT), "seed": maybe(COUNT),
     "num_trials": maybe(COUNT), "numbers": values(COUNT), "space": values(TEXT)},
    {"objectives": maybe(each(record({"metric": TEXT, "direction": one_of("minimize", "maximize"),
                                      "reference": maybe(FINITE)})))})
HEADER = record({}, {
    "name": TEXT, "question": maybe(TEXT), "file_hash": maybe(TEXT), "trial_ids": maybe(each(TEXT)),
    "labels": maybe(values(TEXT)), "search": maybe(SEARCH),
    "asha": maybe(record({"rungs": each(FINITE), "metric": TEXT, "reduction_factor": FINITE}, {"synchronous": TRUTH}))})
"""sweep.json."""
PROGRESS = record({"stage": TEXT, "done": FINITE, "total": FINITE, "pid": COUNT})


def result_of(trial_id: str) -> Check:
    """The result of a trial, which names it."""
    def own(value: Any, place: str) -> None:
        if value["trial_id"] != trial_id:
            raise Unreadable(f"trial_id should be {trial_id!r}, as the file is called, and is {value['trial_id'][:60]!r}")
        if value["status"] == "stopped" and not value.get("stopped"):
            raise Unreadable("stopped is missing")

    return both(RESULT, own)
