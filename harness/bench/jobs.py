"""Jobs of a sweep for the benchmarks that run the real driver or the real scheduler, and when each of them ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.api import Part
from harness.execution.driver import resolved
from harness.execution.results_folder import Job, ResultsFolder
from harness.sweep.file import Sweep

Span = tuple[float, float]
"""Beginning and end, in seconds of the system's clock."""


def begin(text: str, results: Path) -> tuple[Sweep, ResultsFolder, list[Job]]:
    """The sweep of the YAML `text`, its folder in `results`, and the jobs to do: all of them in an empty folder."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    sweep = resolved(file)
    folder = ResultsFolder(results / sweep.name)
    folder.begin(sweep)
    return sweep, folder, folder.missing(sweep)


def drive(file: Path, results: Path) -> None:
    """`python -m harness.run` in a process of its own, on this machine, with MLflow beside the results.

    RuntimeError with its last words when it did not finish every trial.
    """
    own = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    driver = subprocess.Popen([sys.executable, "-m", "harness.run", str(file), "--results", str(results)], text=True, env=own,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = driver.communicate()
    finally:
        driver.terminate()  # when we are interrupted it must not go on alone
    if driver.returncode:
        raise RuntimeError(f"the sweep ended with code {driver.returncode}: {output[-2000:]}")


def parts(folder: Path) -> Iterator[Part]:
    """The parts in results/<sweep>; RuntimeError for a job that failed."""
    for path in sorted((folder / "parts").glob("*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        if part.get("error"):
            raise RuntimeError(f"{part['error']['job']} job of {path.stem}: {part['error']['message']}")
        yield part


def stages(part: Part) -> Iterator[tuple[str, Span]]:
    """(name, when) of each stage of a job. A part notes how long a stage took and when the last one ended."""
    end = part["timestamp_ms"] / 1000
    for name, seconds in reversed(part["stages"].items()):
        yield name, (end - seconds, end)
        end -= seconds


def span(part: Part) -> Span:
    """When a job ran, its process's imports left out."""
    end = part["timestamp_ms"] / 1000
    return end - sum(part["stages"].values()), end


def covered(spans: list[Span]) -> float:
    """Seconds in at least one of `spans`."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
