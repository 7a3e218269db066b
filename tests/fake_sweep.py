"""Sweeps whose jobs cost nothing: a backbone, a metric, a trainable method and a `run_job` that writes down that it was there."""

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.api import BACKBONES, METHODS, METRICS, Backbone, Method, Metric

TEXT = """
name: fake
question: Does it resume?
seeds: 0-3
backbone: nothing
sampler: {num_steps: 4}
metrics: [probe]
methods:
  - {name: random_drop, keep_ratio: {grid_search: [0.9, 0.5]}}
  - dense
resources: {workers: 2}
"""


class Probe(Metric):
    """A metric that measures nothing."""

    measures = ("fidelity/fake_{n}", "latency/fake_ms")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """size: an option to misspell."""

        size: int = 8

    def measure(self, subject):
        """Nothing."""
        return iter(())


class Learner(Method):
    """A method with parameters, as far as a sweep can tell."""

    trainable, needs_adapters = True, False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: the knob. width: an option."""

        keep_ratio: float = 0.5
        width: int = 16


class Nothing(Backbone):
    """A backbone that costs no import of diffusers. None is ever made: trials with it are resolved and not run."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """device: as torch names it."""

        device: str = "cpu"


def install(monkeypatch=None) -> None:
    """Make 'nothing', 'probe' and 'learner' known, and spare the real metrics' imports; undone with `monkeypatch`."""
    import methods as methods
    from harness.sweep import resolve

    for registry, cls in ((BACKBONES, Nothing), (METRICS, Probe), (METHODS, Learner)):
        cls.name = cls.__name__.lower()
        if monkeypatch:
            monkeypatch.setitem(registry._classes, cls.name, cls)
        else:
            registry._classes[cls.name] = cls
    if monkeypatch:
        monkeypatch.setattr(resolve, "_fill_registries", lambda: None)
    else:
        resolve._fill_registries = lambda: None


def fail(place: Path, out_dir: Path) -> None:
    raise ValueError("no such token")


def interrupt(place: Path, out_dir: Path) -> None:
    raise KeyboardInterrupt


def hang(place: Path, out_dir: Path) -> None:
    """Until the file `go` is there."""
    while not (place / "go").exists():
        time.sleep(0.05)


def kill(place: Path, out_dir: Path) -> None:
    """As the kernel does to a process that took all memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def die(place: Path, out_dir: Path) -> None:
    """Once."""
    if not (out_dir / "died").exists():
        (out_dir / "died").touch()
        kill(place, out_dir)


def allocate(place: Path, out_dir: Path) -> None:
    """More memory than this process may have."""
    limits, used = resource.getrlimit(resource.RLIMIT_AS), psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, limits[1]))
    try:
        bytearray(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fill(place: Path, out_dir: Path) -> None:
    """Leave no byte free where the results are."""
    with open(place / "ballast", "ab", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def limit(place: Path, out_dir: Path) -> None:
    """From now on this process can make no file longer than 0 bytes: a full disk, as far as it can tell."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


ORDERS = {"raise": fail, "interrupt": interrupt, "hang": hang, "kill": kill, "die": die, "allocate": allocate, "fill": fill,
          "limit": limit}


def run_job(job, trial, store, progress, out_dir) -> dict:
    """Append '<job> <method> <keep_ratio> <began> <ended>' to a diary beside the store; do what the file `orders` there says.

    orders: lines '<job> <keep_ratio> <what>', what being a key of ORDERS.
    """
    began, place = time.time(), Path(store.root).parent
    ratio = trial["method"].get("keep_ratio", 1)
    progress("sample", 0, 2)
    orders = (place / "orders").read_text().splitlines() if (place / "orders").exists() else []
    for what in (line.split()[2] for line in orders if line.split()[:2] == [job, str(ratio)]):
        ORDERS[what](place, out_dir)
    time.sleep(0.05)
    progress("sample", 2, 2)
    with open(place / "diary", "a") as diary:
        diary.write(f"{job} {trial['method']['name']} {ratio} {began} {time.time()}\n")
    name = "fidelity/fake_4" if job == "score" else "latency/fake_ms"
    return {"metrics": {name: {"value": float(ratio), "better": "lower", "interval": None, "n": 4}}, "per_image": {},
            "executed": {}, "series": {}, "artifacts": {}, "environment": {"threads": 1}, "stages": {"sample": 0.2},
            "timestamp_ms": 1}


def diary(results: Path) -> list[str]:
    """'<job> <keep_ratio>' of every job that ran to its end, in order."""
    path = Path(results) / "diary"
    return [f"{line.split()[0]} {line.split()[2]}" for line in path.read_text().splitlines()] if path.exists() else []
