"""What a benchmark says: rows with a value and, where one was promised, a bar; as a table and as JSON."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from harness.statistics.intervals import Interval

COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt}


@dataclass(frozen=True)
class Bar:
    """value `sense` limit, such as Bar('>=', 5)."""

    sense: Literal["<=", ">=", "<"]
    limit: float

    def met(self, value: float) -> bool:
        """Whether `value` passes; a value that is not a number does not."""
        return bool(COMPARE[self.sense](value, self.limit))


@dataclass(frozen=True)
class Measurement:
    """name: what was measured, with its unit. interval: 95 % over the rounds. facts: JSON-able, raw times among them.

    by_cpu_time: the same ratio by CPU time, where the value is a ratio of wall times; the verdict is by wall time.
    """

    name: str
    value: float
    bar: Bar | None = None
    interval: Interval | None = None
    by_cpu_time: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or nothing where there is no bar."""
        return "" if self.bar is None else "PASS" if self.bar.met(self.value) else "FAIL"


def as_table(rows: Sequence[Measurement]) -> str:
    """Lines of text: name, value, interval, value by CPU time, bar, verdict."""
    cells = [("", "value", "95 % interval", "by CPU time", "bar", "")]
    for row in rows:
        interval = "" if row.interval is None else f"{row.interval[0]:.4g} to {row.interval[1]:.4g}"
        cpu = "" if row.by_cpu_time is None else f"{row.by_cpu_time:.4g}"
        bar = "" if row.bar is None else f"{row.bar.sense} {row.bar.limit:g}"
        cells.append((row.name, f"{row.value:.4g}", interval, cpu, bar, row.verdict))
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def as_json(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The rows with their raw numbers and verdicts."""
    return [{**asdict(row), "verdict": row.verdict} for row in rows]
