"""The dense model's own trajectory: the latents at which a method is asked for its prediction. Shared by metrics and trials."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.api import METHODS, Subject
from harness.engine.injection import attach
from harness.engine.sampler import Loop, initial_noise
from harness.storage.code_hash import code_hash

log = logging.getLogger(__name__)


def batches(subject: Subject, num_images: int, metric: str) -> Iterator[slice]:
    """Slices of the trial's first `num_images` images, each as large as a batch of its sampler; tells the progress."""
    count = min(num_images, len(subject.seeds))
    size = min(subject.sampler.batch_size, count)
    for start in range(0, count, size):
        subject.progress(f"measure {metric}", start, count)
        yield slice(start, min(start + size, count))


def shares_steps(subject: Subject, metric: str) -> bool:
    """Whether the method takes the dense model's steps; where it does not, its prediction cannot be compared step by step."""
    asked = Loop(subject.backbone, subject.sampler).scheduler_steps
    if subject.method.num_steps(asked) == asked:
        return True
    log.info("method '%s' takes other steps than dense: metric '%s' has nothing to compare", subject.method.name, metric)
    return False


def seed_rows(subject: Subject, part: slice, guidance_halves: int) -> Tensor:
    """(B,) int64 seeds of the rows of a batch, once per guided half."""
    return torch.tensor(subject.seeds[part] * guidance_halves, dtype=torch.int64).to(subject.student.transformer.device)


def dense_trajectory(subject: Subject, part: slice) -> dict[str, Tensor]:
    """{'latents', 'predictions'}: (steps, B, C, H, W) of the dense model, shared through the store."""
    backbone, seeds, prompts = subject.backbone, subject.seeds[part], subject.prompts[part]
    loop = Loop(backbone, subject.sampler)
    resolved = {**asdict(subject.sampler), "num_steps": loop.scheduler_steps, "guidance_scale": loop.guidance_scale}
    inputs = {"backbone": backbone.fingerprint, "sampler": resolved, "prompts": prompts, "seeds": seeds,
              "device": backbone.transformer.device.type,
              "code": code_hash(__name__, type(backbone), METHODS.get("dense"))}

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
