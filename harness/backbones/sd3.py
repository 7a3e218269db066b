"""Stable Diffusion 3 and 3.5 (MMDiT, flow matching), from a hub id, a local folder, the embedded emoji model, or shapes only.

Source: Esser et al. 2024, arXiv:2403.03206; diffusers `StableDiffusion3Pipeline`. The embedded default loads through the same
code as `stabilityai/stable-diffusion-3.5-medium`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from harness.api import BACKBONES, require
from harness.backbones.loading import (
    EMBEDDED,
    EMBEDDED_GUIDANCE,
    EMBEDDED_STEPS,
    EMBEDDED_TEXT_LENGTH,
    fingerprint,
    load,
)
from harness.backbones.pipeline import FlowBackbone, check_options, latent_side, on_device
from harness.backbones.shapes import SHAPE_ONLY, ShapesOnly
from harness.engine.ports import BlockView, ModulePort, Port

# JointTransformerBlock and its joint attention return (text, image) and (image, text); dual attention (SD3.5) is image-only
_BLOCK = ModulePort("hidden_states", 0, output=1, text="encoder_hidden_states")
_ATTENTION = ModulePort("hidden_states", 0, output=0)
_IMAGE_ONLY = ModulePort("hidden_states", 0, output=None)


def _blocks(transformer: nn.Module) -> list[BlockView]:
    views = []
    for block in transformer.transformer_blocks:
        branches = {"attn": ("attention", _ATTENTION), "ff": ("ffn", _IMAGE_ONLY)}
        if block.attn2 is not None:
            branches["attn2"] = ("attention", _IMAGE_ONLY)
        views.append(BlockView(block, _BLOCK, branches))
    return views


SD3_PORT = Port(_blocks, "time_text_embed.timestep_embedder", lambda transformer, kwargs: kwargs["pooled_projections"])


@BACKBONES.register("sd3")
class SD3(FlowBackbone):
    """An SD3 pipeline. See `Config` for where the weights come from."""

    port = SD3_PORT
    kinds = (StableDiffusion3Pipeline,)
    usual_max_shift = 1.16

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Where the pipeline comes from and how it runs.

        weights: 'embedded', a hub id, a local pipeline folder, or 'shape_only': random weights in the sizes of `architecture`.
        dtype and device as torch names them. resolution: pixels of a side; None takes the model's own. offload: text encoders and
        autoencoder wait in main memory between their calls.
        text_length: tokens given to the T5 encoder or to its zero padding where there is none; None takes the model's own
        (the embedded model's README states 16; diffusers' default is 256).
        """

        weights: str = "embedded"
        architecture: str | None = None
        dtype: Literal["float32", "bfloat16", "float16"] = "float32"
        device: str = "cpu"
        offload: bool = False
        resolution: int | None = None
        text_length: int | None = None

        def __post_init__(self) -> None:
            check_options("sd3", self)

    def __init__(self, config: Config) -> None:
        self.config = config
        embedded = config.weights == EMBEDDED
        self._adopt(load(config, self.kinds, self.name))
        self.text_length = config.text_length or (EMBEDDED_TEXT_LENGTH if embedded else 256)
        self.default_num_steps, self.default_guidance_scale = (EMBEDDED_STEPS, EMBEDDED_GUIDANCE) if embedded else (50, 7.0)

    @classmethod
    def from_pipeline(cls, pipe: StableDiffusion3Pipeline, text_length: int = 256) -> SD3:
        """The backbone of a pipeline already in memory (tests and notebooks)."""
        self = cls.__new__(cls)
        self.config = cls.Config(weights="in memory")
        self.text_length = text_length
        self.default_num_steps, self.default_guidance_scale = 50, 7.0
        self._adopt(pipe)
        return self

    @classmethod
    def on_shapes(cls, architecture: str) -> SD3:
        """A published architecture at its native resolution on the meta device: it can be counted, and nothing else."""
        return SD3(cls.Config(weights=SHAPE_ONLY, architecture=architecture, device="meta")).on_meta()

    def _adopt(self, pipe: StableDiffusion3Pipeline) -> None:
        self.take(pipe, self.config)
        config = pipe.transformer.config
        side = latent_side(pipe, self.config.resolution, config.sample_size, config.patch_size)
        require(side // config.patch_size <= config.pos_embed_max_size, f"backbone.resolution: {self.config.resolution} pixels "
                f"are more than the {config.pos_embed_max_size} tokens a side that the model has positions for")
        self.latent_shape = (config.in_channels, side, side)

    @cached_property
    def fingerprint(self) -> str:
        """See `harness.backbones.loading.fingerprint`."""
        resized = "" if self.config.resolution is None else f" {self.config.resolution}"
        return fingerprint(self.pipe, f"{self.config.dtype} {self.text_length}{resized}")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{'encoder_hidden_states': (B, T, D_text), 'pooled_projections': (B, P)}."""
        if isinstance(self.pipe, ShapesOnly):
            config, length = self.transformer.config, self.pipe.tokenizer.model_max_length + self.text_length
            return {"encoder_hidden_states": self.pipe.rows(prompts, length, config.joint_attention_dim),
                    "pooled_projections": self.pipe.rows(prompts, config.pooled_projection_dim)}
        self.need("text_encoder", "text_encoder_2")  # without the third, T5, zeros stand for it
        with on_device(self.pipe, "text_encoder", "text_encoder_2", "text_encoder_3") as device:
            embeds, _, pooled, _ = self.pipe.encode_prompt(list(prompts), None, None, device, do_classifier_free_guidance=False,
                                                           max_sequence_length=self.text_length)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def text_limits(self) -> dict[str, int]:
        """Of CLIP, twice, and of T5."""
        clip = self.pipe.tokenizer_max_length
        return {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": self.text_length}

    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Velocity (B, C, H, W) at `timestep` (B,) in 0..1000."""
        return self.transformer(hidden_states=latents, timestep=timestep, return_dict=False, **conditioning)[0]

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """The shift by resolution, where the scheduler has one."""
        return {"mu": self.shift()} if self.scheduler.config.get("use_dynamic_shifting") else {}

    def on_meta(self) -> SD3:
        """Same shapes, no weights; `encode` gives meta tensors of the right size."""
        twin = self.bare_twin(_MetaSD3)
        twin.text_length = self.text_length
        twin.default_num_steps, twin.default_guidance_scale = self.default_num_steps, self.default_guidance_scale
        clip_length = self.pipe.tokenizer.model_max_length if self.pipe.tokenizer else 0
        twin.num_text_tokens = clip_length + self.text_length
        return twin


class _MetaSD3(SD3):
    """Counting twin: the transformer on the meta device, nothing else."""

    num_text_tokens: int

    def on_meta(self) -> SD3:
        return self

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        config = self.transformer.config
        text = (len(prompts), self.num_text_tokens, config.joint_attention_dim)
        return {"encoder_hidden_states": torch.empty(text, device="meta"),
                "pooled_projections": torch.empty(len(prompts), config.pooled_projection_dim, device="meta")}
