"""Tiny random pipelines of the true diffusers classes, one for each family beside SD3's in conftest, without text encoders."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor

from harness.backbones.flux import Flux
from harness.backbones.pixart import PixArt

CLASSES = {3: "goldfish", 7: "tabby, tabby cat"}
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SIZES = dict(sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=4, attention_head_dim=16,
             num_attention_heads=2)


def tiny_vae() -> AutoencoderKL:
    """Two pixels per latent, 4 channels."""
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.4)


def dpm_solver() -> DPMSolverMultistepScheduler:
    """PixArt's: second order, two states kept between steps."""
    return DPMSolverMultistepScheduler(**BETAS)


def ddim() -> DDIMScheduler:
    """DiT's."""
    return DDIMScheduler(**BETAS, clip_sample=False)


def tiny_pixart(scheduler=None, alpha: bool = False, **changes) -> PixArtSigmaPipeline | PixArtAlphaPipeline:
    """4 blocks of width 32 over a 16 x 16 latent (64 tokens). alpha: conditioned on the image's size."""
    torch.manual_seed(0)
    config = {**SIZES, "cross_attention_dim": 32, "caption_channels": 24, "interpolation_scale": 1,
              "use_additional_conditions": alpha, **changes}
    kind = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    return kind(transformer=PixArtTransformer2DModel(**config), vae=tiny_vae(), scheduler=scheduler or dpm_solver(),
                text_encoder=None, tokenizer=None)


def tiny_dit(scheduler=None, **changes) -> DiTPipeline:
    """4 blocks of width 32 over a 16 x 16 latent (64 tokens), 1000 classes."""
    torch.manual_seed(0)
    return DiTPipeline(transformer=DiTTransformer2DModel(**{**SIZES, **changes}), vae=tiny_vae(),
                       scheduler=scheduler or ddim(), id2label=CLASSES)


def tiny_flux() -> FluxPipeline:
    """2 double and 3 single blocks of width 32 over a 16 x 16 latent (64 tokens)."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
                                         num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
                                         guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)


def _rows(prompts) -> Tensor:
    return torch.stack([torch.randn(6, 24, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in prompts])


class TinyFlux(Flux):
    """Flux whose prompts are encoded by a fixed random table."""

    def encode(self, prompts) -> dict[str, Tensor]:
        """Embeddings that depend on the text alone."""
        return {"encoder_hidden_states": _rows(prompts), "pooled_projections": _rows(prompts).mean(1)[:, :20].contiguous()}


class TinyPixArt(PixArt):
    """PixArt whose prompts are encoded by a fixed random table; of 6 tokens, longer prompts have more of their own."""

    def encode(self, prompts) -> dict[str, Tensor]:
        """Embeddings and masks that depend on the text alone."""
        own = torch.tensor([min(6, 1 + len(text) // 3) for text in prompts])
        return {"encoder_hidden_states": _rows(prompts), "encoder_attention_mask": (torch.arange(6) < own[:, None]).long()}
