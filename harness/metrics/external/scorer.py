"""Scorers that need other versions of our packages: each runs in an environment of its own, as a process.

`command` names that environment's Python. The script in `drivers/` gets the images as npz and the prompts
as json, and writes one score per image as json; nothing else passes between the two.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.api import Measure, Subject, Unavailable, require
from harness.metrics.extractors.base import count_name
from harness.statistics.intervals import mean_interval
from harness.storage.code_hash import code_hash
from harness.storage.fingerprints import file_hashes

DRIVERS = Path(__file__).parent / "drivers"
MISSING = 3
"""Exit code of a driver whose package cannot be imported; its last line says why."""
LISTING_S = 60
LISTING = """import sys
try:
    from importlib.metadata import distributions
except ImportError:
    from importlib_metadata import distributions
print(sys.version)
print("\\n".join(sorted({"%s %s" % (one.metadata["Name"], one.version) for one in distributions()})))
"""
"""Python and packages of an environment, for old Python too."""


@dataclass(frozen=True, kw_only=True)
class OutsideOptions:
    """command: the Python of an environment that holds the package. timeout_s: after which the scorer is given up."""

    command: str | None = None
    timeout_s: int = 3600

    def check(self, name: str) -> None:
        """ConfigError when an option of metric `name` cannot be right."""
        require(self.timeout_s > 0, f"{name}.timeout_s must be positive, got {self.timeout_s}")
        require(self.command is None or shutil.which(str(Path(self.command).expanduser())) is not None,
                f"{name}.command: '{self.command}' is no program that can be run; give the path of that environment's python")


@dataclass(frozen=True)
class Environment:
    """What makes the scores of `metric`: its driver here, and the Python, packages and places that `command` finds.

    Not seen: files of a package that were edited in place, and weights that the package fetches itself.
    """

    metric: str
    command: str

    def digest(self) -> str:
        """Hex digits over all of it; of the program's own file where it lists nothing."""
        program = Path(shutil.which(str(Path(self.command).expanduser())) or self.command)
        drivers = code_hash(*(f"harness.metrics.external.drivers.{name}" for name in ("exchange", self.metric)))
        try:
            done = subprocess.run([str(program), "-c", LISTING], capture_output=True, text=True, timeout=LISTING_S, check=True)
            listed = done.stdout
        except (OSError, subprocess.SubprocessError):
            listed = file_hashes([program])[0]
        return hashlib.sha256(f"{drivers}\n{listed}".encode()).hexdigest()


def environment_sources(metric: str, options: OutsideOptions) -> tuple[Environment, ...]:
    """See `Metric.sources`: the environment, where one is named."""
    return (Environment(metric, options.command),) if options.command else ()


def outside_name(metric: str, num_images: int) -> str:
    """'prompt/<metric>_<n>'."""
    return f"prompt/{metric}_{count_name(num_images)}"


def outside_measure(metric: str, package: str, subject: Subject, options: OutsideOptions) -> Iterator[Measure]:
    """Scores per image of the driver of `metric`, their mean and interval; higher is better. Raises Unavailable."""
    if options.command is None:
        raise Unavailable(f"{package} needs an environment of its own; name its python in {metric}.command (docs/metrics.md)")
    subject.progress(metric, 0, len(subject.images))
    found = _run(metric, subject, options)
    scores = tuple(map(float, found["scores"]))
    if len(scores) != len(subject.images) or not all(map(math.isfinite, scores)):
        raise RuntimeError(f"metric {metric}: its scorer gave {len(scores)} scores for {len(subject.images)} images, or one that "
                           "is not finite")
    yield Measure(outside_name(metric, len(scores)), float(np.mean(scores)), "higher", mean_interval(scores), len(scores), scores,
                  notes={"scorer_id": found["scorer"]})


def _run(metric: str, subject: Subject, options: OutsideOptions) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "images.npz", images=subject.images)
        (folder / "prompts.json").write_text(json.dumps(list(subject.prompts)), encoding="utf-8")
        command = [str(Path(options.command or "").expanduser()), str(DRIVERS / f"{metric}.py"), str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout_s)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{metric}: its scorer gave nothing in {options.timeout_s} s ({type(error).__name__})") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            what = "its package is not there" if done.returncode == MISSING else f"its scorer ended with code {done.returncode}"
            raise Unavailable(f"{metric}: {what}: {last[:200]}")
        return json.loads((folder / "scores.json").read_text(encoding="utf-8"))
