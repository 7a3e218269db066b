"""Latency of the denoising loop against dense, in one process, in interleaved rounds.

A round is dense, method, method, dense (A-B-B-A), so that a drift of the machine's speed falls on both alike; its ratio is the
number that counts. What is timed is the sampler's whole loop over one fixed batch: text encoding and autoencoder are left out.
Both loops run their full schedule before the clock starts, for a method may meet new shapes at any step. Each loop is watched
(see `neighbours`): a round with a disturbed loop is dropped whole, for a burst falls on one arm, and taken again; when that does
not help, the timing is marked.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from harness.api import METHODS, METRICS, Backbone, ConfigError, Measure, Method, Metric, Planned, Subject, require
from harness.engine.injection import attach
from harness.engine.sampler import Loop, initial_noise
from harness.hardware import provenance
from harness.hardware.neighbours import WINDOW_S, Neighbours, Seen
from harness.statistics.intervals import median_interval

MOST_CALLS = 16
"""Of a loop in a row, to fill the window over which neighbours can be seen; a loop that is faster still is no model."""


@METRICS.register("latency")
class Latency(Metric):
    """Median of the rounds' ratios with its interval, and milliseconds per image of both."""

    group = "latency"
    measures = ("latency/ratio_to_dense", "latency/ms_per_image")
    job = "timing"
    needs_weights = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """batch_size: images per loop. rounds: A-B-B-A rounds. retakes: as many rounds' loops may be dropped as disturbed.

        threads: what torch must run on; None accepts what the job was given. It is checked and recorded, never set here.
        """

        batch_size: int = 1
        rounds: int = 8
        retakes: int = 8
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
                      series=tuple(enumerate(ratios)), notes=notes, heading="latency (dense = 1)")
        for name, label, heading in (("method", "latency/ms_per_image", "ms / image"),
                                     ("dense", "latency/dense_ms_per_image", "dense ms / image")):
            yield Measure(label, float(np.median(per_image[name])), "lower" if name == "method" else "none",
                          median_interval(per_image[name]), len(per_image[name]), heading=heading, unit="ms")

    def _notes(self, subject: Subject, rounds: Sequence[TimedRound], times: dict[str, list[float]]) -> dict:
        device, kernel = subject.backbone.transformer.device, subject.sampler.attention
        return {"contaminated": verdict(rounds), "contaminated_rounds": sum(one.contaminated is not False for one in rounds),
                "loops_dropped": sum(one.dropped for one in rounds), "foreign_cpu_cores": [one.foreign for one in rounds],
                "foreign_cpu_s_in_window": [one.worst_window_s for one in rounds], "load_average": list(os.getloadavg()),
                "seconds_dense": times["dense"], "seconds_method": times["method"], "batch_size": self.config.batch_size,
                "threads": torch.get_num_threads(), "cpus": provenance.num_cpus(),
                "attention_kernels": provenance.attention_kernels(str(device)) if kernel == "auto" else kernel,
                "dtype": str(subject.student.transformer.dtype).removeprefix("torch."), "num_steps": subject.meter.run.num_steps}


@dataclass
class TimedRound:
    """Seconds of the two dense and the two method loops, and what was seen beside each. dropped: loops thrown away before it."""

    dense: list[float] = field(default_factory=list)
    method: list[float] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    dropped: int = 0

    @property
    def ratio(self) -> float:
        """Time of the method over time of dense."""
        return sum(self.method) / sum(self.dense)

    @property
    def foreign(self) -> float | None:
        """Cores that others used beside the worst of its loops; None if unknown."""
        return _worst([one.cores for one in self.seen])

    @property
    def worst_window_s(self) -> float | None:
        """CPU seconds of others in the worst window of its loops; None if unknown."""
        return _worst([one.window_s for one in self.seen])

    @property
    def contaminated(self) -> bool | None:
        """Whether any of its loops was disturbed; None where that is unknown, which is not clean."""
        found = {one.disturbed for one in self.seen}
        return True if True in found else None if None in found or not found else False


def verdict(rounds: Sequence[TimedRound]) -> bool | None:
    """Whether any of `rounds` was disturbed; None where that is unknown, which is not clean."""
    found = {one.contaminated for one in rounds}
    return True if True in found else None if None in found or not found else False


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


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
        wait_for(latents.device)

    return run


def take_rounds(dense: Callable[[], None], method: Callable[[], None], count: int, retakes: int,
                progress: Callable[[str, int, int], None], watch: Neighbours | None = None) -> list[TimedRound]:
    """`count` rounds after a full warm-up of both. A disturbed one is given up at once, while no more than 4 x `retakes` loops
    were thrown away that way; then rounds are taken as they come, and say so. A loop of which nothing is known is given up too
    on a machine that told of another: virtual machines lose a moment now and then. One that never tells is not asked again."""
    dense(), method()
    calls = {run: _calls(run) for run in (dense, method)}
    kept: list[TimedRound] = []
    dropped, spare, tells = 0, 4 * retakes, False
    with watch or Neighbours() as neighbours:
        while len(kept) < count:
            progress("latency", len(kept), count)
            one = _take_round((dense, method), calls, neighbours, stop=spare > 0)
            tells = tells or any(loop.disturbed is not None for loop in one.seen)
            if spare > 0 and (one.contaminated or (one.contaminated is None and tells)):
                dropped, spare = dropped + len(one.seen), spare - len(one.seen)
                continue
            one.dropped, dropped = dropped, 0
            kept.append(one)
    progress("latency", count, count)
    return kept


def _calls(run: Callable[[], None]) -> int:
    """How often `run` must be called in a row for its time to fill a window of the watch."""
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    return min(MOST_CALLS, math.ceil(WINDOW_S / seconds)) if seconds > 0 else 1


def _take_round(arms: tuple[Callable[[], None], Callable[[], None]], calls: dict[Callable[[], None], int], watch: Neighbours,
                stop: bool) -> TimedRound:
    """A-B-B-A. stop: at the first disturbed loop, for the round is lost."""
    (dense, method), one = arms, TimedRound()
    for run, times in ((dense, one.dense), (method, one.method), (method, one.method), (dense, one.dense)):
        mark, begin = watch.mark(), time.perf_counter()
        for _ in range(calls[run]):
            run()
        times.append((time.perf_counter() - begin) / calls[run])
        one.seen.append(watch.seen(mark, watch.mark()))
        if stop and one.seen[-1].disturbed:
            break
    return one


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given; an accelerator returns at once, and its clock would show nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
