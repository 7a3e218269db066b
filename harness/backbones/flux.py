"""Flux.1 (double and single stream blocks, rotary positions, distilled guidance), from a hub id, a local folder, or shapes only.

Source: Black Forest Labs 2024; diffusers `FluxPipeline`. Guidance is an input of the model: one row per image. Blocks are the
double ones, then the single ones. Attention and feed-forward are sites of their own in the double blocks alone: a single block
projects text and image together, so only the block as a whole can compute fewer image tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from harness.api import BACKBONES, Run
from harness.backbones.loading import (
    EMBEDDED,
    EMBEDDED_GUIDANCE,
    EMBEDDED_RESOLUTION,
    EMBEDDED_STEPS,
    EMBEDDED_TEXT_LENGTH,
    fingerprint,
    load,
)
from harness.backbones.pipeline import FlowBackbone, check_options, latent_side, on_device
from harness.backbones.shapes import ShapesOnly
from harness.engine.ports import BlockView, ModulePort, Port

# both kinds of block take the streams apart and return (text, image); the joint attention returns (image, text)
_BLOCK = ModulePort("hidden_states", 0, output=1, rotary="image_rotary_emb", text="encoder_hidden_states")
_ATTENTION = ModulePort("hidden_states", 0, output=0, rotary="image_rotary_emb")
_IMAGE_ONLY = ModulePort("hidden_states", 0, output=None)


def _blocks(transformer: nn.Module) -> list[BlockView]:
    double = [BlockView(block, _BLOCK, {"attn": ("attention", _ATTENTION), "ff": ("ffn", _IMAGE_ONLY)})
              for block in transformer.transformer_blocks]
    return double + [BlockView(block, _BLOCK, {}) for block in transformer.single_transformer_blocks]


FLUX_PORT = Port(_blocks, "time_text_embed.timestep_embedder", lambda transformer, kwargs: kwargs["pooled_projections"])


@BACKBONES.register("flux")
class Flux(FlowBackbone):
    """A Flux pipeline. Latents are (B, C, H, W) here; they are packed into tokens of 2 x 2 for the transformer."""

    port = FLUX_PORT
    kinds = (FluxPipeline,)
    distilled_guidance = True
    usual_max_shift = 1.15

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """weights: 'embedded', a hub id, a local pipeline folder, or 'shape_only': random weights in the sizes of `architecture`.
        dtype and device as torch names them. resolution: pixels of a side; None: 1024, the embedded model's 64. text_length:
        tokens given to the T5 encoder; None: 512, the embedded model's 16. offload: text encoders and autoencoder wait in main
        memory between their calls.
        """

        weights: str = "black-forest-labs/FLUX.1-dev"
        architecture: str | None = None
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        device: str = "cpu"
        offload: bool = False
        resolution: int | None = None
        text_length: int | None = None

        def __post_init__(self) -> None:
            check_options("flux", self)

    def __init__(self, config: Config) -> None:
        embedded = config.weights == EMBEDDED
        resolution, length = (EMBEDDED_RESOLUTION, EMBEDDED_TEXT_LENGTH) if embedded else (1024, 512)
        self._adopt(load(config, self.kinds, self.name), dataclasses.replace(
            config, resolution=config.resolution or resolution, text_length=config.text_length or length))
        if embedded:
            self.default_num_steps, self.default_guidance_scale = EMBEDDED_STEPS, EMBEDDED_GUIDANCE

    @classmethod
    def from_pipeline(cls, pipe: FluxPipeline, resolution: int, text_length: int = 512) -> Flux:
        """The backbone of a pipeline already in memory (tests and notebooks)."""
        self = cls.__new__(cls)
        self._adopt(pipe, cls.Config(weights="in memory", resolution=resolution, text_length=text_length))
        return self

    def _adopt(self, pipe: FluxPipeline, config: Config) -> None:
        self.take(pipe, config)
        side = latent_side(pipe, config.resolution, native=128, patch=2)
        self.latent_shape = (pipe.transformer.config.in_channels // 4, side, side)
        self.default_num_steps, self.default_guidance_scale = 50, 3.5

    @cached_property
    def fingerprint(self) -> str:
        """See `harness.backbones.loading.fingerprint`."""
        facts = f"{self.config.dtype} {self.config.text_length} {self.config.resolution}"
        return fingerprint(self.pipe, facts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{'encoder_hidden_states': (B, T, D_text), 'pooled_projections': (B, P)}."""
        if isinstance(self.pipe, ShapesOnly):
            config = self.transformer.config
            return {"encoder_hidden_states": self.pipe.rows(prompts, self.config.text_length, config.joint_attention_dim),
                    "pooled_projections": self.pipe.rows(prompts, config.pooled_projection_dim)}
        self.need("text_encoder", "text_encoder_2")
        with on_device(self.pipe, "text_encoder", "text_encoder_2") as device:
            embeds, pooled, _ = self.pipe.encode_prompt(list(prompts), device=device, max_sequence_length=self.config.text_length)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def text_limits(self) -> dict[str, int]:
        """Of CLIP and of T5."""
        return {"tokenizer": self.pipe.tokenizer_max_length, "tokenizer_2": self.config.text_length}

    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Velocity (B, C, H, W) at `timestep` (B,) in 0..1000. conditioning['guidance']: (B,), unused by models without."""
        conditioning, timestep = dict(conditioning), timestep.to(latents.dtype)  # as the pipeline: before it is divided
        guidance = conditioning.pop("guidance", None)
        if self.transformer.config.guidance_embeds:
            scale = torch.full(timestep.shape, self.default_guidance_scale, device=latents.device, dtype=torch.float32)
            conditioning["guidance"] = scale if guidance is None else guidance
        text_ids = torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=latents.device, dtype=latents.dtype)
        tokens = self.transformer(hidden_states=_pack(latents), timestep=timestep / 1000, txt_ids=text_ids,
                                  img_ids=self._image_ids(latents), return_dict=False, **conditioning)[0]
        return _unpack(tokens, self.grid)

    def _image_ids(self, latents: Tensor) -> Tensor:
        height, width = self.grid
        rows = torch.arange(height, device=latents.device, dtype=latents.dtype)[:, None].expand(height, width)
        columns = torch.arange(width, device=latents.device, dtype=latents.dtype).expand(height, width)
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """Flux's own levels, unless the scheduler makes its own, and the shift by resolution, where the scheduler has one."""
        options = self.scheduler.config
        levels = {} if options.get("use_flow_sigmas") else {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)}
        return levels | ({"mu": self.shift()} if options.get("use_dynamic_shifting") else {})

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in image tokens."""
        return self.latent_shape[1] // 2, self.latent_shape[2] // 2

    def run(self, timesteps: Tensor, guidance_halves: int) -> Run:
        """The description handed to `Method.begin`; without `num_heads`, for single blocks have no attention of their own."""
        config = self.transformer.config
        return Run(backbone=self.name, num_blocks=config.num_layers + config.num_single_layers, grid=self.grid,
                   width=config.num_attention_heads * config.attention_head_dim, pooled_width=config.pooled_projection_dim,
                   timesteps=tuple(self.noise_level(timesteps.double()).tolist()), guidance_halves=guidance_halves,
                   device=str(self.transformer.device), attention="rotary")

    def on_meta(self) -> Flux:
        """Same shapes, no weights; `encode` gives meta tensors of the right size."""
        twin = self.bare_twin(_MetaFlux)
        twin.default_guidance_scale = self.default_guidance_scale
        return twin


class _MetaFlux(Flux):
    """Counting twin: the transformer on the meta device, nothing else."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        config = self.transformer.config
        text = (len(prompts), self.config.text_length, config.joint_attention_dim)
        return {"encoder_hidden_states": torch.empty(text, device="meta"),
                "pooled_projections": torch.empty(len(prompts), config.pooled_projection_dim, device="meta")}


def _pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C): tokens of 2 x 2."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def _unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The reverse of `_pack`."""
    batch, _, channels = tokens.shape
    cells = tokens.view(batch, *grid, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, channels // 4, 2 * grid[0], 2 * grid[1])
