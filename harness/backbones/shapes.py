"""Architectures by name: published sizes, for counting and timing without the published weights."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor
from torch.nn import functional as F

from harness.api import did_you_mean, require

SHAPE_ONLY = "shape_only"
"""The value of `backbone.weights` that asks for random weights."""
LEAST_BLOCKS = 3
VAE_SCALE = 8
"""Pixels per latent, of every published autoencoder here."""


@dataclass(frozen=True)
class Architecture:
    """family: name of its backbone. hub: id of the pipeline with these sizes. transformer: its class and config. scheduler: class
    and config. clip_length: tokens of CLIP that come before those of T5.
    """

    family: str
    hub: str
    transformer: tuple[type, Mapping[str, Any]]
    scheduler: tuple[type, Mapping[str, Any]]
    clip_length: int = 0


_SD3 = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048}
_SD3_MEDIUM = {**_SD3, "pos_embed_max_size": 192}
_SD35_MEDIUM = {**_SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
_FLUX_DEV = {"patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
             "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
             "axes_dims_rope": (16, 56, 56)}
_XL_2 = {"patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 28, "attention_head_dim": 72,
         "num_attention_heads": 16, "attention_bias": True, "num_embeds_ada_norm": 1000}
_PIXART = {**_XL_2, "sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 2,
           "use_additional_conditions": False}
_FLOW = (FlowMatchEulerDiscreteScheduler, {"shift": 3.0})
_FLUX_FLOW = (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "use_dynamic_shifting": True})
_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
ARCHITECTURES: dict[str, Architecture] = {
    "sd3-medium": Architecture("sd3", "stabilityai/stable-diffusion-3-medium-diffusers",
                                 (SD3Transformer2DModel, _SD3_MEDIUM), _FLOW, 77),
    "sd3.5-medium": Architecture("sd3", "stabilityai/stable-diffusion-3.5-medium",
                                 (SD3Transformer2DModel, _SD35_MEDIUM), _FLOW, 77),
    "flux-dev": Architecture("flux", "black-forest-labs/FLUX.1-dev",
                                 (FluxTransformer2DModel, _FLUX_DEV), _FLUX_FLOW, 77),
    "pixart-sigma": Architecture("pixart", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
                                 (PixArtTransformer2DModel, _PIXART), (DPMSolverMultistepScheduler, _BETAS)),
    "dit-xl-2": Architecture("dit", "facebook/DiT-XL-2-256", (DiTTransformer2DModel, {**_XL_2, "sample_size": 32}),
                             (DDIMScheduler, {**_BETAS, "clip_sample": False})),
}
"""From the configs of the pipelines that they name."""


def check_architecture(family: str, weights: str, architecture: str | None) -> None:
    """ConfigError unless `architecture` is given with 'shape_only' weights and with these alone, and is one of the family's."""
    known = [name for name, one in ARCHITECTURES.items() if one.family == family]
    name, _, blocks = (architecture or "").partition("@")
    require(weights == SHAPE_ONLY or architecture is None,
            f"backbone.architecture: '{architecture}' is for random weights; say weights: {SHAPE_ONLY}, or remove architecture")
    require(weights != SHAPE_ONLY or architecture is not None,
            f"backbone.architecture: weights: {SHAPE_ONLY} needs the name of an architecture. Known: {', '.join(known)}.")
    require(architecture is None or name in known,
            f"backbone.architecture: backbone '{family}' has no architecture '{name}'.{did_you_mean(name, known)}")
    require("@" not in (architecture or "") or (blocks.isdecimal() and int(blocks) >= LEAST_BLOCKS),
            f"backbone.architecture: '{architecture}': after @ comes a number of blocks, at least {LEAST_BLOCKS}")


def find(architecture: str) -> Architecture:
    """The architecture of a checked name; 'NAME@N' has N of its blocks, of Flux a third of them double."""
    name, _, blocks = architecture.partition("@")
    whole = ARCHITECTURES[name]
    if not blocks:
        return whole
    kind, config = whole.transformer
    count = int(blocks)
    fewer = {"num_layers": count}
    if "num_single_layers" in config:
        fewer = {"num_layers": max(1, count // 3), "num_single_layers": count - max(1, count // 3)}
    if "dual_attention_layers" in config:
        fewer["dual_attention_layers"] = tuple(layer for layer in config["dual_attention_layers"] if layer < count)
    return dataclasses.replace(whole, transformer=(kind, {**config, **fewer}))


def architecture_of(backbone: Mapping[str, Any]) -> str:
    """The architecture whose sizes stand for a backbone's options: that of its hub id, or its family's first."""
    known = {name: one for name, one in ARCHITECTURES.items() if one.family == backbone["name"]}
    require(bool(known), f"backbone.name: no architecture of '{backbone['name']}' is known, so it has no shape-only twin")
    written = backbone.get("architecture")
    found = [name for name, one in known.items() if one.hub == backbone.get("weights")]
    return str(written or next(iter(found or known)))


class ShapesOnly:
    """What stands in the place of a diffusers pipeline: a random transformer of published size and its scheduler.

    There is no text encoder (`rows` gives random embeddings of a prompt) and the autoencoder is a resize. Latency, memory and
    FLOPs of the loop are those of the published model; images mean nothing.
    """

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        self.name, architecture = name, find(name)
        self.transformer = random_transformer(*architecture.transformer, device, dtype)
        scheduler, config = architecture.scheduler
        self.scheduler = scheduler(**config)
        self.vae = _Resize(self.transformer)
        self.tokenizer = SimpleNamespace(model_max_length=architecture.clip_length)
        self.components = {"transformer": self.transformer}

    def set_progress_bar_config(self, **options: Any) -> None:
        """There is no progress bar."""

    @property
    def identity(self) -> str:
        """What the numbers depend on: random weights come from one seed, a device's generator and a version of torch."""
        device = self.transformer.device.type
        return f"{SHAPE_ONLY} {self.name} {sorted(self.transformer.config.items(), key=str)} {device} {torch.__version__}"

    def rows(self, prompts: Sequence[str], *shape: int) -> Tensor:
        """(B, *shape) standard normal embeddings; a row depends on its prompt alone."""
        made = [torch.randn(shape, generator=torch.Generator().manual_seed(prompt_seed(prompt))) for prompt in prompts]
        return torch.stack(made).to(self.transformer.device, self.transformer.dtype)


def prompt_seed(prompt: str) -> int:
    """A number in [0, 2^63) from the text alone, the same in every process."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 1


def random_transformer(kind: type, config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A transformer with seeded random weights, made on its device and in its dtype: 12 billion in float32 fit few machines."""
    cuda = list(range(torch.cuda.device_count())) if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(0)
        return kind(**config).eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Resize:
    """Latents to images and back by resizing: right shapes, no content."""

    config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, block_out_channels=(1,) * 4)

    def __init__(self, transformer: Any) -> None:
        config = transformer.config
        self.dtype, self.device = transformer.dtype, transformer.device
        self._channels = config.in_channels // 4 if isinstance(transformer, FluxTransformer2DModel) else config.in_channels

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        """(B, C, H, W) -> (B, 3, 8 H, 8 W), about in [-1, 1]."""
        return (F.interpolate(latents[:, :3].float() / 3, scale_factor=VAE_SCALE),)

    def encode(self, images: Tensor) -> typing.Any:
        """(B, 3, 8 H, 8 W) -> (B, C, H, W)."""
        small = F.avg_pool2d(images, VAE_SCALE)
        return SimpleNamespace(latents=small[:, [channel % 3 for channel in range(self._channels)]])
