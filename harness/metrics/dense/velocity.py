"""How far the method's guided prediction is from the dense model's at the same latents.

The latents are those of the dense trajectory, so that the error of one step does not feed the next: it is the method's own
error per step, and far less noisy than a difference of images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.api import METRICS, Measure, Metric, Subject, require
from harness.engine.injection import attach
from harness.engine.sampler import Loop
from harness.metrics.dense.trajectory import batches, dense_trajectory, seed_rows, shares_steps
from harness.statistics.intervals import mean_interval


@METRICS.register("velocity")
class Velocity(Metric):
    """Relative L2 error of the guided prediction, mean over steps and images."""

    group = "dense"
    measures = ("dense/velocity_error",)
    against_dense = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """num_images: the first images of the trial that are used."""

        num_images: int = 16

        def __post_init__(self) -> None:
            require(self.num_images >= 1, f"velocity.num_images must be at least 1, got {self.num_images}")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """||v_method - v_dense|| / ||v_dense|| per image and step."""
        if not shares_steps(subject, self.name):
            return
        parts = [_errors(subject, part) for part in batches(subject, self.config.num_images, "velocity")]
        errors = torch.cat(parts, dim=1).double()  # (steps, images)
        per_image = tuple(errors.mean(0).tolist())
        series = tuple(enumerate(errors.mean(1).tolist()))
        yield Measure("dense/velocity_error", float(errors.mean()), "lower", mean_interval(per_image), len(per_image), per_image,
                      series, heading="velocity error", title="relative velocity error to dense", lead=3)


def _errors(subject: Subject, part: slice) -> Tensor:
    """(steps, images) relative errors of one batch."""
    trajectory = dense_trajectory(subject, part)
    backbone, method = subject.student, subject.method
    loop = Loop(backbone, subject.sampler)
    conditioning = loop.conditioning(subject.prompts[part])
    device = backbone.transformer.device
    rows = seed_rows(subject, part, loop.guidance_halves)
    method.begin(loop.run)
    method.reset()
    errors = []
    with torch.no_grad(), attach(backbone, method, loop.run) as injected:
        for step in range(loop.num_steps):
            dense = trajectory["predictions"][step].to(device).float()
            found = loop.predict(injected, step, trajectory["latents"][step].to(device), conditioning, rows).float()
            errors.append((found - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1))
    return torch.stack(errors).cpu()
