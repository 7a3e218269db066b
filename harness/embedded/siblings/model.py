"""A small Flux and a small PixArt on emoji, beside the embedded SD3: its autoencoder, its text encoders, its data.

They are trained through the same `Backbone` interface that the harness measures, so they learn what the loop asks of them.
Flux takes guidance as an input, distilled from the model's own guided prediction (Meng et al. 2023, arXiv:2210.03142).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, T5EncoderModel, T5TokenizerFast

from harness.api import METHODS, Backbone
from harness.backbones.flux import Flux
from harness.backbones.pixart import PixArt
from harness.data.emoji import RESOLUTION, load_emoji
from harness.embedded.emoji_flow import CAPTION_DROP, PROMPTS, sample_timesteps
from harness.embedded.emoji_loop import LearningRate
from harness.embedded.emoji_text import MAX_LENGTH
from harness.embedded.emoji_vae import tile
from harness.engine.sampler import SamplerConfig, sample

WIDTH, HEADS = 192, 6
GUIDANCE_SCALES = (1.0, 4.0)
"""Range of the distilled guidance."""


@dataclass(frozen=True)
class ModelStage:
    """half: on images of 32 px. distilled: on the guided prediction of the stage before."""

    batch_size: int
    schedule: LearningRate
    half: bool = False
    distilled: bool = False


STAGES = {
    "flux_plain": ModelStage(64, LearningRate(peak=1e-3, decay_from=0.6, floor=0.05)),
    "flux_guided": ModelStage(64, LearningRate(peak=3e-4, decay_from=0.3, floor=0.02), distilled=True),
    "pixart_low": ModelStage(64, LearningRate(peak=1e-3, decay_from=0.7, floor=0.5), half=True),
    "pixart_high": ModelStage(32, LearningRate(peak=8e-4, decay_from=0.5, floor=0.02)),
}


def build_flux(sd3: StableDiffusion3Pipeline, t5: T5EncoderModel, t5_tokenizer: T5TokenizerFast) -> FluxPipeline:
    """Untrained: 4 double and 6 single blocks over 8 x 8 tokens, since Flux packs 2 x 2 latents into one."""
    transformer = _initialised(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=4, num_single_layers=6, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH // 2, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12)))
    clip = CLIPTextModel(sd3.text_encoder.config)
    getattr(clip, "text_model", clip).load_state_dict(sd3.text_encoder.text_model.state_dict())  # transformers 4 nests it
    return FluxPipeline(transformer=transformer, vae=sd3.vae, text_encoder=clip, tokenizer=sd3.tokenizer, text_encoder_2=t5,
                        tokenizer_2=t5_tokenizer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))


def build_pixart(sd3: StableDiffusion3Pipeline, t5: T5EncoderModel, t5_tokenizer: T5TokenizerFast) -> PixArtSigmaPipeline:
    """Untrained: 8 blocks over 16 x 16 tokens. A variance is predicted as in the original, and never used."""
    transformer = _initialised(PixArtTransformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=8, num_layers=8, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, cross_attention_dim=WIDTH, caption_channels=WIDTH, interpolation_scale=1,
        use_additional_conditions=False))
    vae = AutoencoderTiny.from_config(sd3.vae.config)
    vae.load_state_dict(sd3.vae.state_dict())
    vae.register_to_config(shift_factor=0.0)  # PixArt's pipeline knows none
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtSigmaPipeline(transformer=transformer, vae=vae.eval(), text_encoder=t5, tokenizer=t5_tokenizer,
                               scheduler=scheduler)


def _initialised(transformer: nn.Module) -> nn.Module:
    """Every block begins as the identity and the output as zero, as in DiT."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")) \
                    and not name.endswith("transformer_blocks.proj_out"):
                nn.init.zeros_(module.weight)
    return transformer


BUILD: dict[str, Callable[..., Any]] = {"flux": build_flux, "pixart": build_pixart}


def backbone_of(family: str, pipe: Any, half: bool = False) -> Backbone:
    """The backbone that trains and samples `pipe`, at 64 px or at 32."""
    side = RESOLUTION // 2 if half else RESOLUTION
    made: Any = {"flux": Flux, "pixart": PixArt}[family].from_pipeline(pipe, side, MAX_LENGTH)
    made.default_num_steps, made.default_guidance_scale = 20, 2.0
    return made


class SiblingTask:
    """A stage of one family, on cached latents and cached text features of the train split."""

    def __init__(self, name: str, pipe: Any, teacher: nn.Module | None, *, compiled: bool) -> None:
        self.name, self.stage, self.family = name, STAGES[name], name.partition("_")[0]
        self.schedule, self.module = self.stage.schedule, pipe.transformer
        self.backbone = backbone_of(self.family, pipe, self.stage.half)
        self.module.train().requires_grad_(True)
        emoji = load_emoji("train")
        images = torch.from_numpy(emoji.images).permute(0, 3, 1, 2)
        self.latents = torch.cat([self._encoded(part) for part in images.split(256)])
        texts = [self.backbone.encode(emoji.captions[i : i + 256]) for i in range(0, len(emoji.captions), 256)]
        self.text = {key: torch.cat([part[key] for part in texts]) for key in texts[0]}
        self.empty = self.backbone.encode([""])
        self.teacher = None if teacher is None else self.backbone.with_transformer(teacher, "teacher")
        if compiled and self.family == "pixart":
            self.backbone.transformer = torch.compile(self.module, dynamic=False)
        elif compiled:  # the double blocks' compiled backward pass in bfloat16 gives NaN (torch 2.14.1 on a CPU with AMX)
            for block in self.module.single_transformer_blocks:
                block.compile(dynamic=False)
        self._order = torch.empty(0, dtype=torch.long)

    def _encoded(self, images: Tensor) -> Tensor:
        images = images.float() / 255
        return self.backbone.encode_images(F.avg_pool2d(images, 2) if self.stage.half else images)

    def begin(self) -> None:
        """Nothing to lay out: both families compute their positions from the grid."""

    def loss(self, step: int) -> Tensor:
        """Mean squared error of what the family predicts, at logit-normal noise levels (Flux) or uniform ones (PixArt)."""
        size = self.stage.batch_size
        if len(self._order) < size:
            self._order = torch.randperm(len(self.latents))
        chosen, self._order = self._order.split((size, len(self._order) - size))
        latents, noise = self.latents[chosen], torch.randn_like(self.latents[chosen])
        uniform = (torch.randperm(size) + torch.rand(size)) / size
        level = sample_timesteps(size, 1.0) if self.family == "flux" else uniform
        noisy, timestep, target = self.backbone.noised(latents, noise, level)
        text, scale = {key: value[chosen] for key, value in self.text.items()}, torch.ones(size)
        if self.teacher is not None:
            scale = torch.empty(size).uniform_(*GUIDANCE_SCALES)
            target = self._guided(noisy, timestep, text, scale)
        dropped = torch.rand(size) < (0 if self.teacher is not None else CAPTION_DROP)
        for key, empty in self.empty.items():
            text[key] = torch.where(dropped.view(-1, *[1] * (empty.dim() - 1)), empty, text[key])
        if self.family == "flux":
            text["guidance"] = scale
        return (self._predict(self.backbone, noisy, timestep, text) - target).square().mean()

    def _predict(self, backbone: Any, noisy: Tensor, timestep: Tensor, text: dict[str, Tensor]) -> Tensor:
        # the fused CPU kernel's backward pass in bfloat16 takes longer at so few tokens, and so does computing in float32 instead
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return backbone.denoise(noisy, timestep, text).float()

    @torch.no_grad()
    def _guided(self, noisy: Tensor, timestep: Tensor, text: dict[str, Tensor], scale: Tensor) -> Tensor:
        """The earlier stage's prediction under classifier-free guidance of `scale` (B,)."""
        ones = torch.ones_like(scale)
        empty = {key: value.expand(len(noisy), *value.shape[1:]) for key, value in self.empty.items()}
        without = self._predict(self.teacher, noisy, timestep, {**empty, "guidance": ones})
        given = self._predict(self.teacher, noisy, timestep, {**text, "guidance": ones})
        return without + scale.view(-1, 1, 1, 1) * (given - without)

    def picture(self, averaged: nn.Module) -> Image.Image:
        """The twelve prompts, guided, 20 steps."""
        return draw(self.backbone.with_transformer(averaged, "averaged"))


def draw(backbone: Backbone) -> Image.Image:
    """The twelve prompts as one picture, six in a row; image i from seed i."""
    config = SamplerConfig(num_steps=20, guidance_scale=2.0, batch_size=len(PROMPTS))
    batches = sample(backbone, METHODS.build("dense", {}), config, PROMPTS, list(range(len(PROMPTS))), lambda live: None)
    images = torch.cat([batch.images for batch in batches])
    return tile(images * 2 - 1, columns=6)
