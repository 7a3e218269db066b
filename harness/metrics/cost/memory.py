"""Peak memory of the method's denoising loop.

On CUDA: the allocator's peak, weights included. On the CPU: by how much the process's peak resident memory rises above where it
stood when the loop began, after freed memory was handed back to the system; weights are not in it. The two are not comparable.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.api import METRICS, Measure, Metric, Subject, require
from harness.metrics.cost.latency import prepare_loop


@METRICS.register("memory")
class Memory(Metric):
    """peak_mib of one loop over a fixed batch, after one that warmed up."""

    group = "memory"
    measures = ("memory/peak_mib",)
    job = "timing"
    needs_weights = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """batch_size: images per loop."""

        batch_size: int = 1

        def __post_init__(self) -> None:
            require(self.batch_size >= 1, f"memory.batch_size must be at least 1, got {self.batch_size}")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Peak in MiB; nothing where the system offers no way to tell."""
        run = prepare_loop(subject.student, subject.method, subject, self.config.batch_size)
        device = subject.student.transformer.device
        run()
        peak = _cuda_peak(run, device) if device.type == "cuda" else cpu_peak_growth(run)
        if peak is not None:
            what = "allocator peak with weights" if device.type == "cuda" else "growth of resident memory without weights"
            yield Measure("memory/peak_mib", peak / 2**20, "lower", notes={"what": what, "batch_size": self.config.batch_size},
                          heading="peak MiB", unit="MiB")


def _cuda_peak(run: Callable[[], None], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def cpu_peak_growth(run: Callable[[], None]) -> int | None:
    """Bytes by which peak resident memory rises while `run` runs; None where Linux's /proc is not there."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory kept from earlier work would hide what the loop needs
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_kib("VmRSS")
        run()
        return 1024 * max(0, _status_kib("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int({key: value for key, _, value in (line.partition(":") for line in lines)}[name].split()[0])
