"""A latency is a ratio of interleaved, warm, undisturbed loops, or it says that it is not."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinySD3, tiny_pipeline

import harness.metrics as metrics
from harness.api import METHODS, METRICS, ConfigError, Method, Subject
from harness.bench.timing import interleave
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig
from harness.hardware.neighbours import Neighbours
from harness.metrics.cost import latency
from harness.metrics.cost.latency import prepare_loop, take_rounds
from harness.metrics.cost.memory import cpu_peak_growth

assert metrics


def silent(stage: str, done: int, total: int) -> None:
    """No progress bar."""


@pytest.fixture(scope="module")
def backbone() -> TinySD3:
    return TinySD3.from_pipeline(tiny_pipeline(), text_length=6)


def make_subject(backbone, method: Method) -> Subject:
    config = SamplerConfig(num_steps=2, guidance_scale=4.0, batch_size=2)
    return Subject(trial={}, backbone=backbone, student=backbone, method=method, sampler=config, meter=Meter(backbone, config),
                   prompts=["a cat", "pizza"], seeds=[3, 4], store=None, progress=silent)


class Slow(Method):
    """Computes every token, and sleeps first at one block."""

    name = "slow"

    def reduce(self, hidden_states, site):
        if site.block == 0:
            time.sleep(0.02)


def blind() -> Neighbours:
    """A watch over a machine that tells nothing."""
    return Neighbours(lambda second: None, period_s=None)


def test_rounds_are_interleaved_after_a_full_warm_up_of_both(monkeypatch):
    monkeypatch.setattr(latency, "MOST_CALLS", 1)
    calls = []
    rounds = take_rounds(lambda: calls.append("A"), lambda: calls.append("B"), 3, 0, silent, blind())
    assert "".join(calls) == "ABAB" + "ABBA" * 3
    assert all(len(one.dense) == len(one.method) == 2 for one in rounds)


def test_a_fast_loop_is_called_until_its_neighbours_can_be_seen(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def loop(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    (one, _) = take_rounds(lambda: loop("A", 0.125), lambda: loop("B", 0.5), 2, 0, silent, blind())
    assert "".join(calls) == "ABAB" + "AABBAA" * 2 and one.dense == [0.125] * 2 and one.method == [0.5] * 2


def test_the_clock_waits_for_the_device_after_every_loop(monkeypatch):
    """A device that is told work and goes on: what is timed ends when the device says that it is done."""
    device, order = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda which=None: order.append(f"wait for {torch.device(which)}"))
    monkeypatch.setattr(latency, "initial_noise", lambda *facts: SimpleNamespace(device=device))
    monkeypatch.setattr(latency, "attach", lambda *facts: nullcontext())
    monkeypatch.setattr(latency, "Loop", lambda *facts: Queued(order))
    subject = SimpleNamespace(sampler=SamplerConfig(), prompts=["a"], seeds=[0])
    backbone = SimpleNamespace(latent_shape=(4, 8, 8), transformer=SimpleNamespace(device=device, dtype=torch.float32))
    run = prepare_loop(backbone, METHODS.build("dense", {}), subject, 1)
    for _ in range(2):
        order.clear()
        run()
        assert order[0] == "loop" and order[-1] == "wait for cuda:1"


class Queued:
    """A loop whose work is only begun when it returns."""

    run = None

    def __init__(self, order):
        self.order = order

    def conditioning(self, prompts):
        """Nothing."""
        return {}

    def __call__(self, *given):
        self.order.append("loop")


def test_a_benchmark_waits_for_the_device_before_and_after_every_slot(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda which=None: order.append("wait"))
    interleave({"a": lambda: order.append("a")}, 1, device="cuda:0")
    slots = "".join(name[0] for name in order).split("ww")
    assert order[0] == order[-1] == "wait" and all(set(slot.strip("w")) == {"a"} for slot in slots)
    order.clear()
    interleave({"a": lambda: order.append("a")}, 1, device="cpu")
    assert set(order) == {"a"}


def test_a_steady_drift_of_the_machine_falls_on_both_alike(monkeypatch):
    clock, speed = {"now": 0.0}, itertools.count(10)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock["now"])

    def work() -> None:  # every loop takes longer than the one before
        clock["now"] += next(speed)

    rounds = take_rounds(work, work, 3, 0, silent, blind())
    assert [one.ratio for one in rounds] == [1.0, 1.0, 1.0]


def test_the_clock_waits_for_an_accelerator_before_it_starts_and_before_it_stops(monkeypatch):
    """A device that returns from a loop at once and works later, as a GPU does: without a wait loops would seem to take 0 s."""
    now, queued, device = [0.0], [0.0], torch.device("cuda", 0)

    def synchronize(asked: torch.device) -> None:
        assert asked == device
        now[0], queued[0] = now[0] + queued[0], 0.0

    class Queue:
        def __init__(self, backbone, config, method) -> None:
            self.run, self.seconds = SimpleNamespace(), method.seconds

        def conditioning(self, prompts: list[str]) -> None:
            """None."""

        def __call__(self, *given: object) -> None:
            queued[0] += self.seconds

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(latency, "Loop", Queue)
    monkeypatch.setattr(latency, "attach", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(latency, "initial_noise", lambda *given: SimpleNamespace(device=device))
    backbone = SimpleNamespace(latent_shape=(1,), transformer=SimpleNamespace(device=device, dtype=torch.float16))
    subject = SimpleNamespace(sampler=None, prompts=["a"], seeds=[0])
    dense, method = (prepare_loop(backbone, SimpleNamespace(seconds=seconds, begin=lambda run: None), subject, 1)
                     for seconds in (1.0, 0.5))
    rounds = take_rounds(dense, method, 2, 0, silent, blind())
    assert [(one.dense, one.method) for one in rounds] == [([1.0, 1.0], [0.5, 0.5])] * 2


def test_a_slow_method_is_slower_than_dense(backbone):
    ratio, method_ms, dense_ms = METRICS.build("latency", {"rounds": 6, "retakes": 0}).measure(make_subject(backbone, Slow(None)))
    assert ratio.name == "latency/ratio_to_dense" and ratio.better == "lower"
    assert ratio.value > 1.2 and ratio.interval[0] <= ratio.value <= ratio.interval[1]
    assert method_ms.value - dense_ms.value > 35  # two steps, 20 ms each
    assert method_ms.n == dense_ms.n == 6 and len(ratio.series) == ratio.n == 6
    assert len(ratio.notes["seconds_dense"]) == len(ratio.notes["seconds_method"]) == 12
    assert ratio.notes["threads"] == torch.get_num_threads()


def test_time_is_given_per_image(backbone):
    subject = make_subject(backbone, Slow(None))
    one, four = (list(METRICS.build("latency", {"rounds": 2, "retakes": 0, "batch_size": size}).measure(subject))[1].value
                 for size in (1, 4))
    assert four < 0.6 * one


def test_other_threads_than_asked_for_are_an_error(backbone):
    subject = make_subject(backbone, METHODS.build("dense", {}))
    asked = torch.get_num_threads() + 1
    with pytest.raises(ConfigError, match=f"{asked} asked for, but torch runs on {torch.get_num_threads()} threads"):
        list(METRICS.build("latency", {"threads": asked}).measure(subject))


def test_the_timed_loop_makes_the_very_latents_of_the_sampler(backbone, monkeypatch):
    from harness.engine.sampler import Loop, sample

    results = []
    original = Loop.__call__

    def noted(self, *args, **kwargs):
        results.append(original(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(Loop, "__call__", noted)
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    subject = make_subject(backbone, method)
    prepare_loop(backbone, method, subject, 2)()
    next(sample(backbone, method, subject.sampler, subject.prompts, subject.seeds))
    assert torch.equal(results[0], results[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux lets a process reset its peak memory")
def test_peak_memory_is_what_a_loop_needs_on_top():
    size = 200 * 2**20

    def work() -> None:
        block = np.ones(size, np.uint8)
        del block

    first, again = cpu_peak_growth(work), cpu_peak_growth(work)
    assert first == pytest.approx(size, rel=0.1) and again == pytest.approx(size, rel=0.1)
    assert cpu_peak_growth(lambda: None) < 0.1 * size


def test_the_memory_metric_reports_mebibytes(backbone):
    (measure,) = METRICS.build("memory", {}).measure(make_subject(backbone, METHODS.build("dense", {})))
    assert measure.name == "memory/peak_mib" and 0 <= measure.value < 500 and "growth" in measure.notes["what"]
