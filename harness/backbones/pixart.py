"""PixArt-Sigma and PixArt-alpha (cross-attention to text, noise prediction), from a hub id, a local folder, or shapes only.

Source: Chen et al. 2024, arXiv:2403.04692 (Sigma) and arXiv:2310.00426 (alpha); diffusers `PixArtSigmaPipeline`. Sites are the
block, its self-attention and its feed-forward: the queries of the cross-attention, whose keys are text, are fewer only where the
whole block is given fewer tokens.
Differs: prompts are lowered and stripped, but not cleaned of markup (diffusers: `clean_caption`); the asked resolution is not
moved to a bin of aspect ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor, nn

from harness.api import BACKBONES
from harness.backbones.loading import (
    EMBEDDED,
    EMBEDDED_GUIDANCE,
    EMBEDDED_STEPS,
    EMBEDDED_TEXT_LENGTH,
    fingerprint,
    load,
)
from harness.backbones.pipeline import EpsilonBackbone, check_options, on_device
from harness.backbones.shapes import ShapesOnly
from harness.engine.ports import BlockView, ModulePort, Port

_IMAGE_ONLY = ModulePort("hidden_states", 0, output=None)
_BRANCHES = {"attn1": ("attention", _IMAGE_ONLY), "ff": ("ffn", _IMAGE_ONLY)}


def _blocks(transformer: nn.Module) -> list[BlockView]:
    return [BlockView(block, _IMAGE_ONLY, _BRANCHES) for block in transformer.transformer_blocks]


def _mean_of_text(transformer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """(B, P): the mean of the prompt's own tokens, as the text encoder gives them. The model itself pools nothing."""
    text, mask = kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"].unsqueeze(-1)
    return (text * mask).sum(1) / mask.sum(1).clamp(min=1)


@BACKBONES.register("pixart")
class PixArt(EpsilonBackbone):
    """A PixArt pipeline. See `Config` for where the weights come from."""

    port = Port(_blocks, "adaln_single.emb.timestep_embedder", _mean_of_text)
    kinds = (PixArtSigmaPipeline, PixArtAlphaPipeline)
    default_num_steps, default_guidance_scale = 20, 4.5

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """weights: 'embedded', a hub id, a local pipeline folder, or 'shape_only': random weights in the sizes of `architecture`.
        dtype and device as torch names them. resolution: pixels of a side; None: the model's own. text_length: tokens given to
        the T5 encoder; None: 300 for Sigma, 120 for alpha, 16 for the embedded model. offload: text encoder and autoencoder wait
        in main memory between their calls.
        """

        weights: str = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
        architecture: str | None = None
        dtype: Literal["float32", "bfloat16", "float16"] = "float32"
        device: str = "cpu"
        offload: bool = False
        resolution: int | None = None
        text_length: int | None = None

        def __post_init__(self) -> None:
            check_options("pixart", self)

    def __init__(self, config: Config) -> None:
        self._adopt(load(config, self.kinds, self.name), config)
        if config.weights == EMBEDDED:
            self.text_length = config.text_length or EMBEDDED_TEXT_LENGTH
            self.default_num_steps, self.default_guidance_scale = EMBEDDED_STEPS, EMBEDDED_GUIDANCE

    @classmethod
    def from_pipeline(cls, pipe: PixArtSigmaPipeline | PixArtAlphaPipeline, resolution: int | None = None,
                      text_length: int | None = None) -> PixArt:
        """The backbone of a pipeline already in memory (tests and notebooks)."""
        self = cls.__new__(cls)
        self._adopt(pipe, cls.Config(weights="in memory", resolution=resolution, text_length=text_length))
        return self

    def _adopt(self, pipe: Any, config: Config) -> None:
        self.adopt(pipe, config)
        self.text_length = config.text_length or (120 if isinstance(pipe, PixArtAlphaPipeline) else 300)
        # alpha at 1024 px is told the size of the image, in pixels, and its aspect
        self.side = self.resolution

    @cached_property
    def fingerprint(self) -> str:
        """See `harness.backbones.loading.fingerprint`."""
        return fingerprint(self.pipe, f"{self.config.dtype} {self.text_length} {self.latent_shape}")

    @property
    def pooled_width(self) -> int:
        """P, the width of the text encoder's features."""
        config = self.transformer.config
        return config.caption_channels or config.cross_attention_dim

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{'encoder_hidden_states': (B, T, P), 'encoder_attention_mask': (B, T), 1 at the prompt's own tokens}."""
        if isinstance(self.pipe, ShapesOnly):
            embeds = self.pipe.rows(prompts, self.text_length, self.pooled_width)
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": torch.ones_like(embeds[..., 0], dtype=torch.int64)}
        self.need("text_encoder")
        with on_device(self.pipe, "text_encoder") as device:
            embeds, mask, _, _ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=device,
                                                         max_sequence_length=self.text_length)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def text_limits(self) -> dict[str, int]:
        """Of T5."""
        return {"tokenizer": self.text_length}

    def spelled(self, prompt: str) -> str:
        """Lowered and stripped."""
        return prompt.lower().strip()

    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The noise (B, C, H, W) in `latents` at `timestep` (B,) in 0..T - 1."""
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            rows = latents.new_ones(len(latents), 1)
            size = {"resolution": self.side * rows.expand(-1, 2), "aspect_ratio": rows}
        output = self.transformer(latents, timestep=timestep, added_cond_kwargs=size, return_dict=False, **conditioning)[0]
        return self.predicted_noise(output)

    def on_meta(self) -> PixArt:
        """Same shapes, no weights; `encode` gives meta tensors of the right size."""
        twin = self.bare_twin(_MetaPixArt)
        twin.text_length, twin.side = self.text_length, self.side
        return twin


class _MetaPixArt(PixArt):
    """Counting twin: the transformer on the meta device, nothing else."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text = (len(prompts), self.text_length)
        return {"encoder_hidden_states": torch.empty(*text, self.pooled_width, device="meta"),
                "encoder_attention_mask": torch.empty(text, device="meta", dtype=torch.int64)}
