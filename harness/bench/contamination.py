"""`contamination`: is a latency taken in a busy sweep the latency taken alone?

One trial's timing job (random_drop, keep ratio 0.5, embedded model, all cores) through the real scheduler: alone; and on a node
whose score jobs belong to another sweep, run by a driver of its own on the same cluster, so that jobs are running when the timing
is asked for. In turns, a fresh process each. Bar: the two median latency ratios differ by at most 3 %, and no job of ours
overlapped the timing. At last a process that is not ours burns a core meanwhile: the row must say so.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import worker
from harness.bench.jobs import Span, begin, finish, parts, span, start_driver
from harness.bench.options import Options
from harness.bench.rows import Bar, Row
from harness.scheduler import Cluster, Share

RATIO = "latency/ratio_to_dense"
DIFFERENCE_BAR, NONE_BAR, ALL_BAR = Bar("<=", 0.03), Bar("<=", 0), Bar(">=", 1)
TEXT = """
name: NAME
seeds: 0-15
backbone: {name: sd3, weights: embedded, dtype: float32}
sampler: {num_steps: 12, guidance_scale: 2.0, batch_size: 8}
metrics: [fd, flops, {name: latency, rounds: 12}]
methods:
  - {name: random_drop, keep_ratio: {grid_search: [RATIOS]}}
"""
PROBE = TEXT.replace("NAME", "probe").replace("RATIOS", "0.5")
CROWD = TEXT.replace("NAME", "crowd").replace("RATIOS", "0.9, 0.8, 0.7, 0.6, 0.4, 0.3")


def run(options: Options) -> Iterator[Row]:
    """Both ratios, their difference, overlaps, and what was marked."""
    alone, busy, overlaps, waiting = [], [], 0, 0
    share = Share(workers=max(2, worker.num_cores()), cpus=1, gpus=0)
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as place, Cluster(share) as cluster:
        for turn in range(options.rounds or 3):
            alone.append(timing(cluster, Path(place) / f"{turn}-alone"))
            with crowd(cluster, Path(place) / f"{turn}-busy") as neighbours:
                busy.append(timing(cluster, Path(place) / f"{turn}-busy"))
            began, ended = span(busy[-1])
            overlaps += sum(start < ended and began < end for start, end in neighbours)
            waiting += sum(start >= ended for start, _ in neighbours)
        burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            burnt = timing(cluster, Path(place) / "burnt")
        finally:
            burner.kill()
            burner.wait()
    values = {name: [part["metrics"][RATIO]["value"] for part in found] for name, found in (("alone", alone), ("busy", busy))}
    medians = {name: statistics.median(found) for name, found in values.items()}
    facts = {name: [_proof(part) for part in found] for name, found in (("alone", alone), ("busy", busy), ("burnt", [burnt]))}
    yield Row("latency ratio to dense, alone", medians["alone"], facts={"ratios": values, **facts})
    yield Row("latency ratio to dense, in a busy sweep", medians["busy"])
    yield Row("difference of the two, as a fraction", abs(medians["busy"] / medians["alone"] - 1), DIFFERENCE_BAR)
    yield Row("jobs of ours that overlapped a timing", overlaps, NONE_BAR)
    yield Row("jobs of ours that waited for it", waiting)
    yield Row("timings marked as disturbed, alone and busy", sum(_proof(part)["contaminated"] for part in alone + busy))
    yield Row("latency ratio to dense, a foreign process on a core", burnt["metrics"][RATIO]["value"])
    yield Row("  and marked as disturbed", float(_proof(burnt)["contaminated"]), ALL_BAR)


def timing(cluster: Cluster, results: Path) -> dict[str, Any]:
    """The part of the probe's timing job, run by `cluster`."""
    _, ledger, jobs = begin(PROBE, results / "probe")
    cluster.run([job for job in jobs if job.kind == "timing"], ledger.folder)
    (part,) = parts(ledger.folder)
    return part


@contextmanager
def crowd(cluster: Cluster, results: Path) -> Iterator[list[Span]]:
    """Another sweep on `cluster`, its workers at work; after the context the list says when each of its jobs ran."""
    results.mkdir(parents=True)
    file = results / "crowd.yaml"
    file.write_text(CROWD, encoding="utf-8")
    spans: list[Span] = []
    driver = start_driver(file, results, cluster.reached)
    try:
        begun = results / "crowd" / ".progress"
        while driver.poll() is None and len(list(begun.glob("*.score.json"))) < cluster.share.workers:
            time.sleep(0.2)
        yield spans
        finish(driver)
        spans += [span(part) for part in parts(results / "crowd")]
    finally:
        driver.kill()


def _proof(part: dict[str, Any]) -> dict[str, Any]:
    return part["environment"][RATIO]
