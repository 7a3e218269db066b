"""`sweep`: what of a sweep's wall clock is not the model, and what the same command costs when there is nothing left to do.

`python -m harness.run` runs the sweep file (--sweep; the default is the whole of sweeps/ablation.yaml) in a new process, in an
empty results folder without caches, and then once more. The clock covers everything: imports, Ray, workers, MLflow, report.
Outside model compute is every moment in which no job is in a stage that runs a model: training, sampling, measuring. Building,
solving budgets and counting FLOPs and tokens are not such stages.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.bench.jobs import covered, drive, parts, span, stages
from harness.bench.measurements import Bar, Measurement
from harness.bench.options import BenchOptions
from harness.sweep.file import load

OVERHEAD_BAR, REPEAT_BAR = Bar("<=", 0.10), Bar("<=", 0.03)
NO_MODEL = ("build", "budget", "fit budget", "measure flops", "measure tokens")


def run(options: BenchOptions) -> Iterator[Measurement]:
    """Shares of the wall clock, and where the time outside model compute goes."""
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as place:
        results = Path(place)
        folder = results / load(options.sweep).name
        began, ended = _timed(options.sweep, results)
        yield from account(list(parts(folder)), began, ended)
        again, done = _timed(options.sweep, results)
        yield Measurement("wall clock of the repeated sweep / of the first", (done - again) / (ended - began), REPEAT_BAR,
                          facts={"seconds": done - again})


def account(found: list[dict[str, Any]], began: float, ended: float) -> Iterator[Measurement]:
    """Rows over the parts of a sweep whose driver ran from `began` to `ended`, in seconds of the system's clock."""
    wall = ended - began
    model = [when for part in found for name, when in stages(part) if name not in NO_MODEL]
    seconds: Counter[str] = Counter()
    for part in found:
        seconds.update(part["stages"])
    jobs = [span(part) for part in found]
    first, last = min(start for start, _ in jobs), max(end for _, end in jobs)
    yield Measurement("time outside model compute / wall clock", 1 - covered(model) / wall, OVERHEAD_BAR,
                      facts={"wall_seconds": wall, "seconds_by_stage": dict(seconds), "jobs": len(found)})
    yield Measurement("  before the first job / wall clock", (first - began) / wall)
    yield Measurement("  while jobs run / wall clock", (last - first - covered(model)) / wall)
    yield Measurement("  after the last job / wall clock", (ended - last) / wall)


def _timed(file: Path, results: Path) -> tuple[float, float]:
    began = time.time()
    drive(file, results)
    return began, time.time()
