"""What a metric gives: a number that says itself how it is shown, and with what it may be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from harness.api.registry import require

Group = Literal["fidelity", "prompt", "image", "dense", "cost", "memory", "latency", "other"]
"""What a number is about, which decides its table, and which rows may stand in one ranking of it (`Row.comparison_key`).

fidelity: likeness to real images. prompt: how images fit their prompts. image: images on their own. dense: likeness to what the
dense model draws. cost: what is counted. memory, latency: what a timing job measures. other: images in any other way.
"""
GROUPS: tuple[str, ...] = get_args(Group)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a number says of itself beside its value; it travels with it in the results.

    group: see `Group`; None is that of its metric. heading: of its column in tables; '' is its name. title: of its axis in
    figures; '' is its heading. unit: follows both, where they do not hold it. percent: a fraction that is shown as a percentage.
    lead: of the numbers of a group the one with the greatest comes first, and the first of 'fidelity', else of 'dense', is what a
    sweep is judged by. window: within how much of dense's value a row is as good as dense, as a share of that value or in the
    measure's own unit; None where it is not to be judged so.
    """

    group: Group | None = None
    heading: str = ""
    title: str = ""
    unit: str = ""
    percent: bool = False
    lead: int = 0
    window: tuple[Literal["share", "absolute"], float] | None = ("share", 0.02)

    def __post_init__(self) -> None:
        require(self.group is None or self.group in GROUPS, f"a measure's group is '{self.group}'; take one of "
                f"{', '.join(GROUPS)}")

    def traits(self) -> dict[str, Any]:
        """These fields alone, JSON-able."""
        values = {one.name: getattr(self, one.name) for one in fields(Traits)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Measure(Traits):
    """One number with its direction, and its uncertainty where it has one. Unit and sample count are part of its name.

    interval: (low, high), 95 %. n: how many values stand behind it. per_image: those values, in the order of the trial's images.
    series: (x, value) pairs, as over steps. notes: JSON-able facts that belong to the number, such as a warning.
    artifact: a file that the metric left in `subject.out_dir`, for the report. The rest: see `Traits`.
    """

    name: str
    value: float
    better: Literal["lower", "higher", "none"]
    interval: tuple[float, float] | None = None
    n: int | None = None
    per_image: tuple[float, ...] | None = None
    series: tuple[tuple[float, float], ...] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    artifact: Any = None
