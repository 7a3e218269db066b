"""`workers`: do two workers score twice as much as one?

Eight score jobs of nearly equal cost, with the metrics of sweeps/ablation.yaml, through the real scheduler: with one worker and
with two, forth and back, each in a results folder of its own. The dense model's images and features, which all jobs share, are in
the store before. A throughput is jobs over the time from the first job's beginning to the last one's end; what a worker pays
once, its start and its imports, is in the sweep's own account (`sweep`).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness.bench.jobs import begin, parts, span
from harness.bench.measurements import Bar, Measurement
from harness.bench.options import BenchOptions
from harness.execution import worker
from harness.execution.pool import Cluster, Share
from harness.statistics.intervals import median_interval

THROUGHPUT_BAR = Bar(">=", 1.7)
JOBS = 8
TEXT = """
name: scoring
seeds: 0-31
backbone: {name: sd3, weights: embedded, dtype: float32}
sampler: {num_steps: 12, guidance_scale: 2.0, batch_size: 8}
metrics: [fd, paired, {name: velocity, num_images: 8}, flops, tokens]
methods:
  - dense
  - {name: random_drop, keep_ratio: {grid_search: [RATIOS]}}
"""


def run(options: BenchOptions) -> Iterator[Measurement]:
    """Throughput of two workers over that of one, a ratio per pair of runs."""
    text = TEXT.replace("RATIOS", ", ".join(f"{0.5 + 0.001 * i:.3f}" for i in range(JOBS)))
    throughput: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as place, Cluster(Share(workers=2, cpus=1, gpus=0)) as cluster:
        warm = Path(place) / "warm"
        _, folder, jobs = begin(text, warm)
        if not worker.run(jobs[0], folder.path):
            raise RuntimeError("the dense score job failed")
        for turn in range(options.rounds or 2):
            for workers in ((1, 2) if turn % 2 == 0 else (2, 1)):
                cluster.share = Share(workers=workers, cpus=1, gpus=0)
                throughput[workers].append(_jobs_per_s(cluster, text, warm, Path(place) / f"{turn}-{workers}"))
    ratios = [two / one for one, two in zip(throughput[1], throughput[2], strict=True)]
    yield Measurement("throughput of two workers / of one", statistics.median(ratios), THROUGHPUT_BAR, median_interval(ratios),
                      facts={"jobs": JOBS, "cores": worker.num_cores(), "jobs_per_s": throughput})


def _jobs_per_s(cluster: Cluster, text: str, warm: Path, results: Path) -> float:
    shutil.copytree(warm / ".cache", results / ".cache")
    _, folder, jobs = begin(text, results)
    cluster.run([job for job in jobs if job.kind == "score" and job.trial["method"]["name"] != "dense"], folder)
    spans = [span(part) for part in parts(folder.path)]
    if len(spans) != JOBS:
        raise RuntimeError(f"{len(spans)} of {JOBS} jobs ended; see {folder.path / '.progress' / 'ray.log'}")
    return JOBS / (max(end for _, end in spans) - min(start for start, _ in spans))
