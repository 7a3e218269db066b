"""Where and with what a number was made, as observed. No host names, no paths, no environment variables."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "tomesd", "peft", "torch-fidelity", "ray", "mlflow")


def environment(device: str, dtype: str) -> dict[str, Any]:
    """JSON-able facts about this process and machine. device and dtype: of the backbone's transformer."""
    return {"git": git_state(), "packages": packages(), "python": platform.python_version(), "platform": platform.system(),
            "machine": platform.machine(), "cpu_model": cpu_model(), "num_cpus": num_cpus(), "device": device_name(device),
            "dtype": dtype, "threads": torch.get_num_threads(), "attention_kernels": attention_kernels(device),
            "deterministic": torch.are_deterministic_algorithms_enabled()}


@cache
def git_state() -> dict[str, Any]:
    """{'commit': 40 hex digits or None outside a repository, 'dirty': whether tracked files differ from it or None}."""
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit or None, "dirty": None if commit is None or changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def packages() -> dict[str, str]:
    """Versions of the packages that make numbers; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def cpu_model() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def clock_mhz() -> float | None:
    """Mean clock of the processors that this process may run on, in MHz, as the system tells it now; None where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    clocks = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    ours = [clocks[number] for number in os.sched_getaffinity(0) if number < len(clocks)]
    return round(sum(ours) / len(ours), 1) if ours else None


def num_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: str) -> str:
    """'cpu', or the accelerator's name."""
    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else device


def attention_kernels(device: str) -> str:
    """The scaled-dot-product kernels that torch may choose from here, by preference."""
    if not device.startswith("cuda"):
        return "flash_cpu,math"  # torch has one fused CPU kernel and the plain one
    enabled = {"flash": torch.backends.cuda.flash_sdp_enabled(), "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
               "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(), "math": torch.backends.cuda.math_sdp_enabled()}
    return ",".join(name for name, on in enabled.items() if on)
