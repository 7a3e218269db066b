"""What a stage is trained and validated on: images, noise levels, noise, captions, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.api import Backbone, Stage, require
from harness.training.config import TrainConfig
from harness.training.ranks import Ranks

HELD_OUT_SEED = 20260
"""Of the permutation whose end is held out, and of the noise of validation: the same for every training."""


@dataclass(frozen=True)
class TrainingSet:
    """latents: (n, C, H, W) float32 on the CPU, as the transformer sees them. captions: n. fingerprint: of the images."""

    latents: Tensor
    captions: list[str]
    fingerprint: str


@dataclass(frozen=True)
class TrainBatch:
    """This process's rows of a step, on the device.

    noisy, target: (B, C, H, W). timestep: (B,) in the scheduler's unit. level: (B,) noise level. seeds: (B,) int64, one per row.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor
    level: Tensor
    seeds: Tensor
    conditioning: dict[str, Tensor]


class Batches:
    """The batches of one stage. All draws are for the global batch: they do not depend on the number of processes."""

    def __init__(self, backbone: Backbone, data: TrainingSet, config: TrainConfig, stage: Stage, seed: int) -> None:
        self.backbone, self.data, self.config, self.stage, self.ranks = backbone, data, config, stage, Ranks.current()
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        num_images, held_out = len(data.captions), config.num_held_out
        require(held_out < num_images, f"train.validation_images: {held_out} held out of {num_images} training images leaves "
                "none to train on; lower it")
        shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
        self._trained_on = shuffled[:num_images - held_out].sort().values
        self._held_out = shuffled[num_images - held_out:]

    def draw(self, step: int) -> TrainBatch:
        """The batch of `step`; steps are drawn in order."""
        size, generator = self.config.batch_size, self.generator
        picks = self._trained_on[torch.randint(len(self._trained_on), (size,), generator=generator)]
        level = self._levels(step, size).clamp(1e-3, 1 - 1e-3)
        dropped = torch.rand(size, generator=generator) < self.config.caption_drop
        return self._batch(picks, level, dropped, generator)

    def validation(self) -> Iterator[TrainBatch]:
        """The held-out images, each with its caption, noise and level, the same at every call; a batch shares its level.

        Levels are the middles of equal slices of (0, 1), one per batch, so that their mean is a midpoint rule over levels.
        """
        generator, size = torch.Generator().manual_seed(HELD_OUT_SEED), self.config.batch_size
        groups = self._held_out.split(size)
        for index, picks in enumerate(groups):
            level = torch.full((size,), (index + 0.5) / len(groups))
            yield self._batch(picks, level, torch.zeros(size, dtype=torch.bool), generator)

    def state(self) -> dict[str, Tensor]:
        """What the next draw depends on besides the step."""
        return {"generator": self.generator.get_state(), "order": self.order}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.generator.set_state(state["generator"])
        self.order = state["order"]

    def _levels(self, step: int, size: int) -> Tensor:
        strata, generator = self.config.strata, self.generator
        if not self.stage.one_timestep:
            uniform = torch.rand(size, generator=generator)
            return uniform if self.config.timesteps == "uniform" else (torch.randperm(size, generator=generator) + uniform) / size
        uniform = torch.rand((), generator=generator)
        if self.config.timesteps == "stratified":
            if step % strata == 0:
                self.order = torch.randperm(strata, generator=generator)
            uniform = (self.order[step % strata] + uniform) / strata
        return uniform.expand(size)

    def _batch(self, picks: Tensor, level: Tensor, dropped: Tensor, generator: torch.Generator) -> TrainBatch:
        clean = self.data.latents[picks]
        noise = torch.randn(clean.shape, generator=generator)
        seeds = torch.randint(2**62, (len(picks),), generator=generator)
        rows = self.ranks.rows(len(picks))
        device, dtype = self.backbone.transformer.device, self.backbone.transformer.dtype
        level = level[rows].to(device)
        noisy, timestep, target = self.backbone.noised(clean[rows].to(device, dtype), noise[rows].to(device, dtype), level)
        captions = ["" if drop else self.data.captions[i]
                    for i, drop in zip(picks[rows].tolist(), dropped[rows].tolist(), strict=True)]
        return TrainBatch(noisy, timestep, target, level, seeds[rows].to(device), self.backbone.encode(captions))
