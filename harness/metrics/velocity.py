"""How far the method's guided prediction is from the dense model's at the same latents.

The latents are those of the dense trajectory, so that the error of one step does not feed the next: it is the method's own
error per step, and far less noisy than a difference of images.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import injection, sampler
from harness.api import METHODS, METRICS, Measure, Metric, Subject, require
from harness.injection import attach
from harness.sampler import Loop, initial_noise
from harness.stats import mean_interval
from harness.store import code_version


@METRICS.register("velocity")
class Velocity(Metric):
    """Relative L2 error of the guided prediction, mean over steps and images."""

    against_dense = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """num_images: the first images of the trial that are used."""

        num_images: int = 16

        def __post_init__(self) -> None:
            require(self.num_images >= 1, f"velocity.num_images must be at least 1, got {self.num_images}")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """||v_method - v_dense|| / ||v_dense|| per image and step."""
        count = min(self.config.num_images, len(subject.seeds))
        size = min(subject.sampler.batch_size, count)
        parts = []
        for start in range(0, count, size):
            subject.progress("measure velocity", start, count)
            parts.append(_errors(subject, slice(start, min(start + size, count))))
        errors = torch.cat(parts, dim=1).double()  # (steps, images)
        per_image = tuple(errors.mean(0).tolist())
        series = tuple(enumerate(errors.mean(1).tolist()))
        yield Measure("dense/velocity_error", float(errors.mean()), "lower", mean_interval(per_image), count, per_image, series)


def _errors(subject: Subject, part: slice) -> Tensor:
    """(steps, images) relative errors of one batch."""
    trajectory = _dense_trajectory(subject, part)
    backbone, method, seeds = subject.student, subject.method, subject.seeds[part]
    loop = Loop(backbone, subject.sampler)
    conditioning = loop.conditioning(subject.prompts[part])
    device = backbone.transformer.device
    rows = torch.tensor(seeds * loop.guidance_halves, dtype=torch.int64).to(device)
    method.begin(loop.run)
    method.reset()
    errors = []
    with torch.no_grad(), attach(backbone, method, loop.run) as injected:
        for step in range(loop.num_steps):
            dense = trajectory["predictions"][step].to(device).float()
            found = loop.predict(injected, step, trajectory["latents"][step].to(device), conditioning, rows).float()
            errors.append((found - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1))
    return torch.stack(errors).cpu()


def _dense_trajectory(subject: Subject, part: slice) -> dict[str, Tensor]:
    """{'latents', 'predictions'}: (steps, B, C, H, W) of the dense model, shared through the store."""
    backbone, seeds, prompts = subject.backbone, subject.seeds[part], subject.prompts[part]
    loop = Loop(backbone, subject.sampler)
    resolved = {**asdict(subject.sampler), "num_steps": loop.num_steps, "guidance_scale": loop.guidance_scale}
    inputs = {"backbone": backbone.fingerprint, "sampler": resolved, "prompts": prompts, "seeds": seeds,
              "device": backbone.transformer.device.type,
              "code": code_version(Path(__file__), sampler, injection, inspect.getfile(type(backbone)))}

    def make(folder: Path) -> None:
        dense, latents, predictions = METHODS.build("dense", {}), [], []

        def watch(step: int, before: Tensor, prediction: Tensor) -> None:
            latents.append(before.cpu().contiguous())
            predictions.append(prediction.cpu().contiguous())

        start = initial_noise(seeds, backbone.latent_shape, backbone.transformer.device, backbone.transformer.dtype)
        with attach(backbone, dense, loop.run) as injected:
            loop(injected, start, loop.conditioning(prompts), seeds, watch)
        save_file({"latents": torch.stack(latents), "predictions": torch.stack(predictions)}, folder / "trajectory.safetensors")

    return load_file(subject.store.get_or_make("trajectory", inputs, make) / "trajectory.safetensors")
