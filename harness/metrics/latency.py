"""Latency of the denoising loop against dense, in one process, in interleaved rounds.

A round is dense, method, method, dense (A-B-B-A), so that a drift of the machine's speed falls on both alike; its ratio is the
number that counts. What is timed is the sampler's whole loop over one fixed batch: text encoding and autoencoder are left out.
Both loops run their full schedule before the clock starts, for a method may meet new shapes at any step. A round in which other
processes used our cores is taken again, and marked when that does not help.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from harness import provenance
from harness.api import METHODS, METRICS, Backbone, ConfigError, Measure, Method, Metric, Planned, Subject, require
from harness.injection import attach
from harness.sampler import Loop, initial_noise
from harness.stats import median_interval

FOREIGN_CPU_LIMIT = 0.2
"""Cores that other processes may use of ours, on average over a round."""


@METRICS.register("latency")
class Latency(Metric):
    """Median of the rounds' ratios with its interval, and milliseconds per image of both."""

    measures = ("latency/ratio_to_dense", "latency/ms_per_image")
    job = "timing"
    needs_weights = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """batch_size: images per loop. rounds: A-B-B-A rounds. retakes: disturbed rounds taken again, over all rounds.

        threads: what torch must run on; None accepts what the job was given. It is checked and recorded, never set here.
        """

        batch_size: int = 1
        rounds: int = 8
        retakes: int = 4
        threads: int | None = None

        def __post_init__(self) -> None:
            require(self.batch_size >= 1, f"latency.batch_size must be at least 1, got {self.batch_size}")
            require(self.rounds >= 2, f"latency.rounds must be at least 2, got {self.rounds}: one ratio has no interval")
            require(self.retakes >= 0, f"latency.retakes must not be negative, got {self.retakes}")

    def check(self, planned: Planned) -> None:
        """The timing job is given the threads that are asked for."""
        asked, given = self.config.threads, planned.timing_threads
        require(asked is None or given is None or asked == given, f"latency.threads: {asked} asked for, but a timing job is "
                f"given {given} threads; write resources.timing_threads: {asked}, or leave latency.threads out")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Times in ms per image; `notes` hold every raw time, the machine's load and whether rounds were disturbed."""
        config, asked = self.config, self.config.threads
        if asked is not None and torch.get_num_threads() != asked:
            raise ConfigError(f"latency.threads: {asked} asked for, but torch runs on {torch.get_num_threads()} threads; set the "
                              "job's threads to match (resources.timing_threads), or leave latency.threads out")
        dense = prepare_loop(subject.backbone, METHODS.build("dense", {}), subject, config.batch_size)
        method = prepare_loop(subject.student, subject.method, subject, config.batch_size)
        clocks = [provenance.clock_mhz()]
        rounds = take_rounds(dense, method, config.rounds, config.retakes, subject.progress)
        clocks.append(provenance.clock_mhz())
        ratios = [one.ratio for one in rounds]
        times = {"dense": [t for one in rounds for t in one.dense], "method": [t for one in rounds for t in one.method]}
        # two loops of a round share the machine's speed, so a round is one value of each
        per_image = {"dense": [1000 * np.mean(one.dense) / config.batch_size for one in rounds],
                     "method": [1000 * np.mean(one.method) / config.batch_size for one in rounds]}
        notes = {**self._notes(subject, rounds, times), "clock_mhz_before_after": clocks}
        yield Measure("latency/ratio_to_dense", float(np.median(ratios)), "lower", median_interval(ratios), len(ratios),
                      series=tuple(enumerate(ratios)), notes=notes)
        for name, label in (("method", "latency/ms_per_image"), ("dense", "latency/dense_ms_per_image")):
            yield Measure(label, float(np.median(per_image[name])), "lower" if name == "method" else "none",
                          median_interval(per_image[name]), len(per_image[name]))

    def _notes(self, subject: Subject, rounds: Sequence[Round], times: dict[str, list[float]]) -> dict:
        device, kernel = subject.backbone.transformer.device, subject.sampler.attention
        disturbed = sum(one.contaminated for one in rounds)
        return {"contaminated": disturbed > 0, "contaminated_rounds": disturbed,
                "foreign_cpu_cores": [one.foreign for one in rounds], "load_average": list(os.getloadavg()),
                "seconds_dense": times["dense"], "seconds_method": times["method"], "batch_size": self.config.batch_size,
                "threads": torch.get_num_threads(), "cpus": provenance.num_cpus(),
                "attention_kernels": provenance.attention_kernels(str(device)) if kernel == "auto" else kernel,
                "dtype": str(subject.student.transformer.dtype).removeprefix("torch."), "num_steps": subject.meter.run.num_steps}


@dataclass
class Round:
    """Seconds of the two dense and the two method loops. foreign: cores that others used meanwhile, None if unknown."""

    dense: list[float] = field(default_factory=list)
    method: list[float] = field(default_factory=list)
    foreign: float | None = None

    @property
    def ratio(self) -> float:
        """Time of the method over time of dense."""
        return sum(self.method) / sum(self.dense)

    @property
    def contaminated(self) -> bool:
        """Whether others used our cores too much."""
        return self.foreign is not None and self.foreign > FOREIGN_CPU_LIMIT


def prepare_loop(backbone: Backbone, method: Method, subject: Subject, batch_size: int) -> Callable[[], None]:
    """A function that runs the whole denoising loop once for a fixed batch and waits for the device."""
    config = subject.sampler
    loop = Loop(backbone, config, method)
    prompts = [subject.prompts[i % len(subject.prompts)] for i in range(batch_size)]
    seeds = [subject.seeds[0] + i for i in range(batch_size)]
    latents = initial_noise(seeds, backbone.latent_shape, backbone.transformer.device, backbone.transformer.dtype)
    conditioning = loop.conditioning(prompts)
    method.begin(loop.run)

    def run() -> None:
        with attach(backbone, method, loop.run) as injection:
            loop(injection, latents, conditioning, seeds)
        _wait(latents.device)

    return run


def take_rounds(dense: Callable[[], None], method: Callable[[], None], count: int, retakes: int,
                progress: Callable[[str, int, int], None],
                foreign_clock: Callable[[], float | None] | None = None) -> list[Round]:
    """`count` rounds after a full warm-up of both; of disturbed rounds the quietest attempts are kept."""
    clock = foreign_clock or foreign_cpu_seconds
    dense(), method()
    kept: list[Round] = []
    for attempt in range(count + retakes):
        progress("latency", len(kept), count)
        kept.append(_take_round(dense, method, clock))
        if len(kept) > count:  # a retake replaces the most disturbed round, if it is quieter
            kept.remove(max(kept, key=lambda one: one.foreign or 0.0))
        if attempt >= count - 1 and not any(one.contaminated for one in kept):
            break
    progress("latency", count, count)
    return kept


def _take_round(dense: Callable[[], None], method: Callable[[], None], clock: Callable[[], float | None]) -> Round:
    one, before, started = Round(), clock(), time.perf_counter()
    for run, times in ((dense, one.dense), (method, one.method), (method, one.method), (dense, one.dense)):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    after, wall = clock(), time.perf_counter() - started
    if before is not None and after is not None:
        one.foreign = round(max(0.0, after - before) / wall, 4)
    return one


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def foreign_cpu_seconds() -> float | None:
    """CPU seconds that other processes have used on our processors so far, up to a constant; None where Linux does not tell.

    Busy time of the processors this process may run on (with time stolen by a hypervisor), less our own and our children's.
    """
    try:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in lines:
        name, *fields = line.split()
        if name in ours:
            user, nice, system, _, _, irq, softirq, steal = (int(value) for value in fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - (own.user + own.system + own.children_user + own.children_system)
