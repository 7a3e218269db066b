"""What a job used of its machine, sampled while it ran: the curves that MLflow shows as system metrics."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

import psutil

log = logging.getLogger(__name__)

PERIOD_S = 10.0
MOST_POINTS = 500
"""Of a curve; then every second one is dropped and the period doubled, so a day's training stays a small file."""
MIB = 2**20


class Usage:
    """`with Usage() as usage: ...`; `usage.curves` is {name: [[seconds since `usage.began_ms`, value], ...]}.

    Names and units are those of MLflow's own system metrics, and `process_*` of this process alone. A sample costs about a
    millisecond of one core. GPU: by NVML and not by CUDA, which must not be called while a graph is captured; left out where
    the package nvidia-ml-py is missing.
    """

    def __init__(self, period_s: float | None = None) -> None:
        self.period_s = period_s or PERIOD_S
        self.began_ms = 0
        self.curves: dict[str, list[list[float]]] = {}
        self._process, self._stop = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="usage")

    def __enter__(self) -> Usage:
        self._began, self.began_ms = time.monotonic(), round(1000 * time.time())
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        try:
            sample(self._process)  # only sets the marks of the percentages, which psutil keeps per thread
            while not self._stop.wait(self.period_s):
                self._keep(sample(self._process))
        except Exception:  # a curve must never cost a trial
            log.exception("system metrics end here")

    def _keep(self, values: dict[str, float]) -> None:
        second = round(time.monotonic() - self._began)
        for name, value in values.items():
            self.curves.setdefault(name, []).append([second, round(value, 2)])
        if max(map(len, self.curves.values())) > MOST_POINTS:
            self.curves = {name: points[::2] for name, points in self.curves.items()}
            self.period_s *= 2


def sample(process: psutil.Process) -> dict[str, float]:
    """{name: value} now; percentages of CPU are means since the last sample."""
    memory = psutil.virtual_memory()
    return {"cpu_utilization_percentage": psutil.cpu_percent(), "process_cpu_percentage": process.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MIB, "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": process.memory_info().rss / MIB, **_gpu()}


def _gpu() -> dict[str, float]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    try:
        return {"gpu_0_utilization_percentage": torch.cuda.utilization(0),
                "gpu_0_memory_usage_megabytes": torch.cuda.device_memory_used(0) / MIB}
    except (ModuleNotFoundError, RuntimeError):  # no NVML here
        return {}
