"""Whether this machine has what a sweep asks for: cores, GPUs, kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass

from harness.api import ConfigError, Trial, require
from harness.execution.worker import num_cores
from harness.sweep.file import Sweep

CROWDED = 4
"""Threads of jobs for each core, beyond which they only wait for each other and fill the memory."""


@dataclass(frozen=True)
class Machine:
    """Where the jobs will run. elsewhere: on a cluster, of which nothing is known here. ray: as Ray's jobs, or in this process.

    workers: of the command line, over what the sweep file says.
    """

    elsewhere: bool = False
    ray: bool = True
    workers: int | None = None

    @classmethod
    def of(cls, local: bool, workers: int | None = None) -> Machine:
        """That of a run with these options."""
        return cls(elsewhere=bool(os.environ.get("RAY_ADDRESS")) and not local, ray=not local, workers=workers)

    def check(self, sweep: Sweep) -> None:
        """Raises ConfigError where `resources` ask for more than there is."""
        if self.ray:
            self._check_gpus(sweep)
        if not self.elsewhere:
            self._check_cores(sweep)

    def timing_threads(self, sweep: Sweep) -> int | None:
        """Of torch in a timing job; None where a machine elsewhere decides."""
        return sweep.resources.timing_threads or (None if self.elsewhere else num_cores())

    def _check_cores(self, sweep: Sweep) -> None:
        wanted, cores, where = sweep.resources, num_cores(), f"{sweep.path}: resources"
        for name in ("threads", "timing_threads"):
            asked = getattr(wanted, name)
            require(asked is None or asked <= cores, f"{where}.{name}: {asked} asked for, but there are {cores} cores here; "
                    f"write at most {cores}")
        workers = self.workers or wanted.workers or 1
        key = "--workers" if self.workers else f"{where}.workers"
        require(workers * wanted.threads <= CROWDED * cores or not self.ray, f"{key}: {workers} jobs at once with "
                f"{wanted.threads} thread(s) each are more than {CROWDED} for each of the {cores} cores here; lower it, or leave "
                "it out to have a job for each core")

    def _check_gpus(self, sweep: Sweep) -> None:
        asked, where = sweep.resources.gpu, f"{sweep.path}: resources.gpu"
        devices = {str(trial["backbone"].get("device", "cpu")).split(":")[0] for trial in sweep.trials}
        if asked is None:
            return
        require(asked > 0 or "cuda" not in devices, f"{where}: 0, but backbone.device is cuda; give a job a GPU "
                "(or a share such as 0.5), or set backbone.device to cpu")
        require(asked <= 1 or asked == int(asked), f"{where}: {asked:g}, but only a share of one GPU can be a "
                "fraction; write a whole number")
        if asked and not self.elsewhere:
            import torch

            there = torch.cuda.device_count()
            require(asked <= there, f"{where}: {asked:g} asked for, but torch sees {there} CUDA devices here, so no job would "
                    f"ever start; write at most {there}, or name a cluster in RAY_ADDRESS")

    def check_device(self, trial: Trial) -> None:
        """Raises ConfigError where the device, or the kernel of attention on it, is not here."""
        device, kernel = str(trial["backbone"].get("device", "cpu")), trial["sampler"]["attention"]
        if self.elsewhere:
            return
        if device != "cpu":
            from harness.backbones.loading import check_device

            check_device(device)
        if kernel != "auto":
            _check_kernel(kernel, device, str(trial["backbone"].get("dtype", "float32")))


def _check_kernel(kernel: str, device: str, dtype: str) -> None:
    """By trying it on a few numbers."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from harness.engine.sampler import attention_kernel

    some = torch.zeros(1, 1, 16, 64, device=device, dtype=getattr(torch, dtype))
    try:
        with attention_kernel(kernel):
            scaled_dot_product_attention(some, some, some)
    except RuntimeError as error:
        raise ConfigError(f"sampler.attention: '{kernel}' cannot run in {dtype} on '{device}' here "
                          f"({str(error).splitlines()[0]}); write auto, or another kernel") from None
