"""What a backbone is: a diffusers pipeline seen as parts."""

from __future__ import annotations

import copy
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.api.registry import sources_of
from harness.api.sites import Run

if typing.TYPE_CHECKING:  # names only: reading a sweep or a report must not cost an import of torch
    import torch
    from torch import Tensor


class Backbone(ABC):
    """A diffusers pipeline seen as parts. Subclasses: `harness/backbones/*.py`.

    transformer: the unmodified diffusers module. scheduler: diffusers scheduler. port: how tokens enter and leave its blocks.
    latent_shape: (C, H, W) of one image. fingerprint: hash of everything that makes its numbers (weights, config, dtype).
    """

    name: ClassVar[str]
    transformer: torch.nn.Module
    scheduler: Any
    port: Any
    latent_shape: tuple[int, int, int]
    fingerprint: str
    default_num_steps: int
    default_guidance_scale: float
    distilled_guidance: ClassVar[bool] = False
    """Whether the guidance scale is an input of the model, `conditioning['guidance']` (B,), and needs no unconditional half."""
    draws_noise: bool = False
    """Whether the scheduler's steps draw noise; the sampler then gives `scheduler.step` a generator for each image."""

    @classmethod
    def sources(cls, config: Any) -> Sequence[Any]:
        """Files, folders and hub ids that the options name: what is in them becomes part of the trial.

        By default the option `weights` and paths that exist; see `harness.storage.fingerprints` for what may stand here.
        """
        return sources_of(config)

    @classmethod
    def sketch(cls, config: Any) -> Backbone | None:
        """The backbone on the meta device from its configs alone, by which trials are checked before any of them runs.

        Raises ConfigError where making it would. None: nothing is known of it before it is made.
        """
        return None

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError for prompts that `encode` would refuse; without weights."""
        return None

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of `prompts`, a row each, keyed as the transformer's arguments."""

    def cut_prompts(self, prompts: Sequence[str]) -> dict[str, dict[str, int]]:
        """{tokenizer: {'cut': prompts that are longer than its text encoder takes, 'of': all, 'tokens': what it takes}}."""
        return {}

    @abstractmethod
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The transformer's prediction (B, C, H, W); `timestep` (B,) in the scheduler's unit."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [0, 1]; not finite (and not clamped) where the autoencoder gave no finite number."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, H, W) of images (B, 3, height, width) in [0, 1]."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, timestep in the scheduler's unit, target of the prediction) at noise level (B,) in (0, 1)."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Pixels of a side of its images, which are square."""

    def with_transformer(self, transformer: torch.nn.Module, fingerprint: str) -> Backbone:
        """The same pipeline around another transformer of the same shape (an adapted copy)."""
        twin = copy.copy(self)
        twin.__dict__.pop("fingerprint", None)
        twin.transformer, twin.fingerprint = transformer, fingerprint
        return twin

    @abstractmethod
    def set_timesteps(self, num_steps: int) -> Tensor:
        """Prepare the scheduler for `num_steps` and return its timesteps in the scheduler's unit, one for each call of the
        transformer: (num_steps,), or more where a scheduler of higher order asks more than once per step.
        """

    @abstractmethod
    def noise_level(self, timestep: Tensor) -> Tensor:
        """Scheduler unit -> noise level in [0, 1]."""

    @abstractmethod
    def run(self, timesteps: Tensor, guidance_halves: int) -> Run:
        """The description handed to `Method.begin`."""

    @abstractmethod
    def on_meta(self) -> Backbone:
        """The same architecture without weights on the meta device, for counting."""


@dataclass
class Batch:
    """What the sampler yields. indices: position of each image in the trial's list. images: (B, 3, H, W) in [0, 1]."""

    indices: list[int]
    prompts: list[str]
    seeds: list[int]
    images: Tensor
    latents: Tensor
