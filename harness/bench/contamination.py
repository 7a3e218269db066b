"""`contamination`: is a latency taken in a busy sweep the latency taken alone?

One trial (random_drop, keep ratio 0.5, embedded model) is timed by `python -m harness.run`: in a sweep of its own, and as one of
seven trials of a sweep that has just scored on every core, with timings before and after it. In turns, each in new processes and
an empty folder. Bar: the medians of the two latency ratios differ by at most 3 %, and no job of ours overlapped a timing. At last
a process that is not ours burns a core meanwhile: the row must say so. And one burns a core for 0.3 s in every 2 s: the row must
say so, or its ratio be that of a quiet machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.bench.jobs import drive, parts, span
from harness.bench.measurements import Bar, Measurement
from harness.bench.options import BenchOptions

RATIO = "latency/ratio_to_dense"
DIFFERENCE_BAR, NONE_BAR, ALL_BAR = Bar("<=", 0.03), Bar("<=", 0), Bar(">=", 1)
PROBE = 0.5
BURSTS = """
import time
while True:
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    time.sleep(1.7)
"""
TEXT = """
name: NAME
seeds: 0-15
backbone: {name: sd3, weights: embedded, dtype: float32}
sampler: {num_steps: 12, guidance_scale: 2.0, batch_size: 8}
metrics: [fd, flops, {name: latency, rounds: 12}]
methods:
  - {name: random_drop, keep_ratio: {grid_search: [RATIOS]}}
"""
ALONE = TEXT.replace("NAME", "alone").replace("RATIOS", str(PROBE))
BUSY = TEXT.replace("NAME", "busy").replace("RATIOS", f"0.9, 0.8, 0.7, {PROBE}, 0.4, 0.3, 0.2")


def run(options: BenchOptions) -> Iterator[Measurement]:
    """Both ratios, their difference, overlaps, and what was marked."""
    taken: dict[str, list[dict[str, Any]]] = {"alone": [], "busy": [], "burnt": [], "bursts": []}
    overlaps = after = 0
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as place:
        for turn in range(options.rounds or 3):
            probe, _ = timing(ALONE, Path(place) / f"{turn}-alone")
            taken["alone"].append(probe)
            probe, others = timing(BUSY, Path(place) / f"{turn}-busy")
            taken["busy"].append(probe)
            began, ended = span(probe)
            overlaps += sum(start < ended and began < end for start, end in map(span, others))
            after += sum(start >= ended for start, _ in map(span, others))
        for name, program in (("burnt", "while True: pass"), ("bursts", BURSTS)):
            burner = subprocess.Popen([sys.executable, "-c", program])
            try:
                taken[name].append(timing(ALONE, Path(place) / name)[0])
            finally:
                burner.kill()
                burner.wait()
    yield from rows(taken, overlaps, after)


def rows(taken: dict[str, list[dict[str, Any]]], overlaps: int, after: int) -> Iterator[Measurement]:
    """taken: timing parts of the probe alone, in a busy sweep, beside a foreign process, and beside bursts of one."""
    proofs = {name: [part["environment"][RATIO] for part in found] for name, found in taken.items()}
    ratios = {name: [part["metrics"][RATIO]["value"] for part in found] for name, found in taken.items()}
    alone, busy, burnt, bursts = (statistics.median(ratios[name]) for name in ("alone", "busy", "burnt", "bursts"))
    yield Measurement("latency ratio to dense, alone", alone, facts={"ratios": ratios, "proofs": proofs})
    yield Measurement("latency ratio to dense, in a busy sweep", busy)
    yield Measurement("difference of the two, as a fraction", abs(busy / alone - 1), DIFFERENCE_BAR)
    yield Measurement("jobs of the sweep that overlapped the timing", overlaps, NONE_BAR)
    yield Measurement("jobs of the sweep that came after it", after)
    yield Measurement("timings marked as disturbed, alone and busy",
                      sum(one["contaminated"] is not False for one in proofs["alone"] + proofs["busy"]))
    yield Measurement("latency ratio to dense, a foreign process on a core", burnt)
    yield Measurement("  and marked as disturbed", float(all(one["contaminated"] is True for one in proofs["burnt"])), ALL_BAR)
    marked = all(one["contaminated"] is True for one in proofs["bursts"])
    yield Measurement("latency ratio to dense, beside bursts of 0.3 s in every 2 s", bursts)
    yield Measurement("  and marked as disturbed, or that of a quiet machine",
                      float(marked or abs(bursts / alone - 1) <= DIFFERENCE_BAR.limit), ALL_BAR)


def timing(text: str, results: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The part of the probe's timing job in the sweep of the YAML `text`, and the parts of all other jobs."""
    results.mkdir()
    file = results / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    drive(file, results)
    probes, others = [], []
    for part in parts(next(results.glob("*/parts")).parent):
        wanted = part["job"] == "timing" and part["trial"]["method"].get("keep_ratio") == PROBE
        (probes if wanted else others).append(part)
    (probe,) = probes
    return probe, others
