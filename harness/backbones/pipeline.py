"""What the backbones that are diffusers pipelines share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from harness.api import Backbone, Run, require
from harness.backbones.loading import META, source_of
from harness.backbones.schedules import FLOW, NOISE, check_scheduler, copied, draws_noise, spread
from harness.backbones.shapes import SHAPE_ONLY, ShapesOnly, check_architecture


def check_options(family: str, config: Any) -> None:
    """ConfigError where options of a backbone's Config contradict each other; for its __post_init__."""
    check_architecture(family, config.weights, config.architecture)
    require(not config.offload or config.device != "cpu", "backbone.offload: true, but backbone.device is cpu, where all parts "
            "are in main memory anyway; remove offload")


@contextmanager
def on_device(pipe: Any, *names: str) -> Iterator[torch.device]:
    """Within the context these parts of a pipeline are where its transformer is; those that wait elsewhere go back after it.

    diffusers' own `enable_model_cpu_offload` would move the transformer too, within the timings, and replace its forward.
    """
    device, moved = pipe.transformer.device, []
    try:
        for name in names:
            part = getattr(pipe, name, None)
            home = next((weight.device for weight in part.parameters()), device) if isinstance(part, nn.Module) else device
            if home != device:
                moved.append((part, home))
                part.to(device)
        yield device
    finally:
        for part, home in moved:
            part.to(home)


def freeze(pipe: Any) -> None:
    """No progress bar, no dropout, no gradients."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def latent_side(pipe: Any, resolution: int | None, native: int, patch: int) -> int:
    """Height and width in latents of images of `resolution` pixels; `native` where it is None. `patch`: latents per token."""
    if resolution is None:
        return native
    scale = pixels_per_latent(pipe)
    require(resolution > 0 and resolution % (scale * patch) == 0,
            f"backbone.resolution: {resolution} pixels are no whole number of tokens of {scale * patch} x {scale * patch}")
    return resolution // scale


def pixels_per_latent(pipe: Any) -> int:
    """Pixels of a side that a latent stands for; of shapes without an autoencoder 8, as in all published ones."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1) if pipe.vae is not None else 8


class PipelineBackbone(Backbone):
    """What every backbone from a diffusers pipeline shares: its parts, its scheduler, pictures to latents and back."""

    pipe: Any
    config: Any
    kinds: ClassVar[tuple[type[DiffusionPipeline], ...]]
    """The pipelines that it runs."""
    predicts: ClassVar[str]
    """What its transformer predicts; see `harness.backbones.schedules`."""

    attention: ClassVar[Literal["joint", "rotary", "self"]] = "joint"
    """See `Run.attention`."""

    def take(self, pipe: Any, config: Any) -> None:
        """Take a pipeline over; ConfigError where its scheduler needs more of the sampler than it does."""
        freeze(pipe)
        check_scheduler(type(pipe.scheduler).__name__, pipe.scheduler.config, self.name, self.predicts)
        self.config, self.pipe, self.transformer, self.scheduler = config, pipe, pipe.transformer, pipe.scheduler

    def need(self, *parts: str) -> None:
        """ConfigError where the pipeline was saved without one of these text encoders."""
        missing = [part for part in parts if getattr(self.pipe, part) is None]
        require(not missing, f"backbone.weights: '{self.config.weights}' has no text encoder ({', '.join(missing)} in "
                "model_index.json is null), so it cannot take prompts; take a copy of the model with it")

    def text_limits(self) -> dict[str, int]:
        """{name of a tokenizer of the pipeline: tokens of a prompt that its encoder is given}."""
        return {}

    def spelled(self, prompt: str) -> str:
        """A prompt as the family's pipeline hands it to its tokenizers."""
        return prompt

    def cut_prompts(self, prompts: Sequence[str]) -> dict[str, dict[str, int]]:
        """Asked of each tokenizer, those of the embedded models too."""
        if isinstance(self.pipe, ShapesOnly):
            return {}
        encoders = {name: name.replace("tokenizer", "text_encoder") for name in self.text_limits()}
        limits = {name: limit for name, limit in self.text_limits().items()
                  if getattr(self.pipe, name) is not None and getattr(self.pipe, encoders[name]) is not None}
        spelled = [self.spelled(prompt) for prompt in prompts]
        counts = {name: [len(ids) for ids in getattr(self.pipe, name)(spelled, verbose=False).input_ids] for name in limits}
        return {name: {"cut": sum(length > limits[name] for length in lengths), "of": len(prompts), "tokens": limits[name]}
                for name, lengths in counts.items()}

    @property
    def draws_noise(self) -> bool:
        """Whether the scheduler's steps draw noise."""
        return draws_noise(self.scheduler)

    def set_timesteps(self, num_steps: int) -> Tensor:
        """See `harness.backbones.schedules.spread`."""
        return spread(self.scheduler, num_steps, self.transformer.device, **self.schedule_options(num_steps))

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """What the family's pipeline gives its scheduler beside the number of steps."""
        return {}

    def bare_twin(self, kind: type[PipelineBackbone]) -> Any:
        """A backbone of class `kind` with the same shapes and no weights, on the meta device."""
        twin = kind.__new__(kind)
        twin.config, twin.latent_shape, twin.scheduler = self.config, self.latent_shape, copied(self.scheduler)
        with torch.device("meta"):
            twin.transformer = type(self.transformer).from_config(self.transformer.config).eval()
        return twin

    @classmethod
    def sources(cls, config: Any) -> Sequence[Any]:
        """The pipeline's folder or hub id; random weights follow from the code."""
        source = source_of(config.weights, cls.name)
        nothing = config.weights == SHAPE_ONLY or (isinstance(source, Path) and not source.exists())  # which `load` refuses
        return () if nothing else (source,)

    @classmethod
    def sketch(cls, config: Any) -> Backbone | None:
        """Made as it will be made, of its configs alone: what its pipeline or its scheduler cannot do is refused here too."""
        require(config.device != META, "backbone.device: 'meta' holds shapes and no values; write cpu or cuda")
        return cls(dataclasses.replace(config, device=META, offload=False))

    @property
    def resolution(self) -> int:
        """Pixels of a side of its images."""
        return self.latent_shape[1] * pixels_per_latent(self.pipe)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [0, 1]."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        with on_device(self.pipe, "vae"):
            images = vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5
        return torch.where(images.isfinite(), images.clamp(0, 1), images)  # a clamp would make white of infinity

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, H, W), scaled as the transformer sees them; a variational encoder gives its mode."""
        vae = self.pipe.vae
        with on_device(self.pipe, "vae") as device:
            encoded = vae.encode(images.to(device, vae.dtype) * 2 - 1)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @property
    def pooled_width(self) -> int:
        """P: of the pooled text."""
        return self.transformer.config.pooled_projection_dim

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in image tokens."""
        patch = self.transformer.config.patch_size
        return self.latent_shape[1] // patch, self.latent_shape[2] // patch

    def run(self, timesteps: Tensor, guidance_halves: int) -> Run:
        """The description handed to `Method.begin`; of blocks that are all of one kind."""
        config = self.transformer.config
        return Run(backbone=self.name, num_blocks=config.num_layers, grid=self.grid, attention=self.attention,
                   width=config.num_attention_heads * config.attention_head_dim, pooled_width=self.pooled_width,
                   timesteps=tuple(self.noise_level(timesteps.double()).tolist()), guidance_halves=guidance_halves,
                   device=str(self.transformer.device), num_heads=config.num_attention_heads)



class FlowBackbone(PipelineBackbone):
    """What SD3 and Flux share: rectified flow. The diffusers timestep 0..1000 is the noise level 0..1."""

    predicts = FLOW
    usual_max_shift: ClassVar[float]

    def shift(self) -> float:
        """`mu` of a schedule that is shifted by resolution, from the scheduler's config or else diffusers' own numbers."""
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": self.usual_max_shift}
        short, long, low, high = (self.scheduler.config.get(name, usual) for name, usual in names.items())
        slope = (high - low) / (long - short)
        return math.prod(self.grid) * slope + (low - slope * short)

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t = (1 - t) x + t noise; the target velocity is noise - x (Esser et al. 2024, arXiv:2403.03206, Eq. 13)."""
        t = level[:, None, None, None]
        noisy = ((1 - t) * latents + t * noise).to(latents.dtype)
        return noisy, level * self.scheduler.config.num_train_timesteps, noise - latents

    def noise_level(self, timestep: Tensor) -> Tensor:
        """0..1000 -> 0..1."""
        return timestep / self.scheduler.config.num_train_timesteps


class EpsilonBackbone(PipelineBackbone):
    """What PixArt and DiT share: self-attention of image tokens with absolute positions, and a prediction of the noise.

    The diffusers timestep t = 0 ... T - 1 is the noise level (t + 1) / T: a fraction of the T noising steps, 1 = pure noise.
    A learned variance, the second half of the output's channels, is not used by the schedulers here and is dropped.
    """

    attention = "self"
    predicts = NOISE

    def adopt(self, pipe: Any, config: Any) -> None:
        """Take a pipeline over, at the resolution that is asked for."""
        self.take(pipe, config)
        sizes = self.transformer.config
        side = latent_side(pipe, config.resolution, sizes.sample_size, sizes.patch_size)
        self.latent_shape = (sizes.in_channels, side, side)

    def predicted_noise(self, output: Tensor) -> Tensor:
        """eps (B, C, H, W) of the transformer's output (B, C or 2 C, H, W)."""
        return output[:, : self.latent_shape[0]]

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """DDPM (Ho et al. 2020, Eq. 4 and 14): sqrt(a) x + sqrt(1 - a) noise, a = alphas_cumprod[t]; the target is the noise."""
        total = self.scheduler.config.num_train_timesteps
        timestep = ((level.double() * total - 1e-3).ceil().long() - 1).clamp(0, total - 1)
        kept = self.scheduler.alphas_cumprod.to(latents.device)[timestep][:, None, None, None]
        noisy = kept.sqrt().to(latents.dtype) * latents + (1 - kept).sqrt().to(latents.dtype) * noise
        return noisy, timestep, noise

    def noise_level(self, timestep: Tensor) -> Tensor:
        """0..T - 1 -> (0, 1]."""
        return (timestep + 1) / self.scheduler.config.num_train_timesteps
