"""What is handed from room to room and stored as JSON: a trial, a part of it, its result, and a number in both.

These are plain dictionaries. What a stored one must be when it is read back is checked by `harness.storage.records`, whose
keys are these (a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

from harness.api.measure import Group

Named = Mapping[str, Any]
"""{'name': of a plug-in, option: value}."""
Notes = dict[str, Any]


class Trial(TypedDict):
    """One row of a sweep, complete and checked: all that decides its numbers. Its id is a hash of it (`harness.trial.ids`).

    seeds: first and last, one image each. budget: {'flops_cut' | 'speedup': asked}. train: options; None where nothing trains.
    threads: of torch in the score job.
    """

    backbone: Named
    sampler: Notes
    data: Named
    seeds: list[int]
    method: Named
    budget: Notes | None
    train: Notes | None
    metrics: list[Named]
    threads: int | None


class MeasureRecord(TypedDict):
    """A number as it is stored: `harness.api.Measure` without what is stored beside it.

    value: None where it could not be had; `unavailable` then says why. What stands from `group` on is missing in results made
    before measures said it, for which `harness.storage.measures` is the reader.
    """

    value: float | None
    better: Literal["lower", "higher", "none"]
    interval: list[float] | None
    n: int | None
    group: NotRequired[Group]
    heading: NotRequired[str]
    title: NotRequired[str]
    unit: NotRequired[str]
    percent: NotRequired[bool]
    lead: NotRequired[int]
    window: NotRequired[list[Any] | None]
    unavailable: NotRequired[str]


class Failure(TypedDict):
    """How a job failed."""

    job: str
    type: str
    message: str
    traceback: NotRequired[str]


class Measured(TypedDict, total=False):
    """What jobs found out, in a part and in a result. `metrics` and `series` by name of the measure.

    per_image: values in the order of the seeds. executed: kept tokens and the solved knob. artifacts: files below the sweep's
    folder. environment: code, machine and notes of metrics; in a result by job.
    """

    metrics: dict[str, MeasureRecord]
    per_image: dict[str, list[float]]
    executed: Notes
    series: dict[str, list[list[float]]]
    artifacts: dict[str, str]
    environment: Notes
    error: Failure | None
    timestamp_ms: int


class Part(Measured):
    """What a worker writes of one job. code: hash of what made it. stages: seconds. usage: of the machine, over time."""

    job: str
    trial_id: str
    trial: NotRequired[Trial]
    code: NotRequired[str]
    threads: NotRequired[int | None]
    stages: NotRequired[dict[str, float]]
    usage: NotRequired[Notes | None]
    began_ms: NotRequired[int]


class Result(Measured):
    """The parts of a trial as one. stages, usage, times: by job. stopped: at which rung its training was, and why."""

    schema: int
    trial_id: str
    sweep: str
    label: str
    status: Literal["done", "partial", "failed", "stopped"]
    trial: Trial
    varied: Notes
    code: str
    stages: NotRequired[dict[str, dict[str, float]]]
    usage: NotRequired[dict[str, Notes]]
    times: NotRequired[dict[str, list[int]]]
    stopped: NotRequired[Notes]
