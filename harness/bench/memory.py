"""Peak memory of a function: bytes that torch's own allocator held at once on top of what it held before.

On the CPU every allocation and release is read from the trace of torch's profiler, operators' temporaries included, so the
number is exact and does not depend on what the C library gives back to the system. On CUDA it is the caching allocator's peak.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Peak of `function`, called once to warm up and once to measure. Its arguments, made before, do not count."""
    function()
    return _cuda_peak(function, torch.device(device)) if device.startswith("cuda") else _cpu_peak(function)


def _cuda_peak(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(function: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events
               if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    held = peak = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        held += change
        peak = max(peak, held)
    return peak
