"""Class-conditional DiT (adaLN-Zero, noise prediction), from a hub id, a local folder, or shapes only.

Prompts are classes: a number, a name that the pipeline knows ('golden retriever'), or '' for the null class of guidance.
Source: Peebles & Xie 2023, arXiv:2212.09748; diffusers `DiTPipeline`. Guidance acts on all latent channels, as in diffusers (the
authors' code: on the first three).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import DiTPipeline
from torch import Tensor, nn

from harness.api import BACKBONES, require
from harness.backbones.loading import fingerprint, load
from harness.backbones.pipeline import EpsilonBackbone, check_options
from harness.backbones.shapes import ShapesOnly, prompt_seed
from harness.engine.ports import BlockView, ModulePort, Port

_IMAGE_ONLY = ModulePort("hidden_states", 0, output=None)
_BRANCHES = {"attn1": ("attention", _IMAGE_ONLY), "ff": ("ffn", _IMAGE_ONLY)}


def _blocks(transformer: nn.Module) -> list[BlockView]:
    return [BlockView(block, _IMAGE_ONLY, _BRANCHES) for block in transformer.transformer_blocks]


def _time_embedding(transformer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """(B, D). Every block embeds timestep and class itself, so block 0's embedder is asked once more, by methods that read it."""
    embedder = transformer.transformer_blocks[0].norm1.emb
    return embedder.timestep_embedder(embedder.time_proj(kwargs["timestep"]).to(transformer.dtype))


def _class_embedding(transformer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """(B, D), of block 0."""
    return transformer.transformer_blocks[0].norm1.emb.class_embedder(kwargs["class_labels"])


@BACKBONES.register("dit")
class DiT(EpsilonBackbone):
    """A DiT pipeline. See `Config` for where the weights come from."""

    port = Port(_blocks, _time_embedding, _class_embedding)
    kinds = (DiTPipeline,)
    default_num_steps, default_guidance_scale = 50, 4.0

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """weights: a hub id, a local pipeline folder, or 'shape_only': random weights in the sizes of `architecture`. dtype and
        device as torch names them. resolution: pixels of a side; None: the model's own. offload: the autoencoder waits in main
        memory between its calls.
        """

        weights: str = "facebook/DiT-XL-2-256"
        architecture: str | None = None
        dtype: Literal["float32", "bfloat16", "float16"] = "float32"
        device: str = "cpu"
        offload: bool = False
        resolution: int | None = None

        def __post_init__(self) -> None:
            check_options("dit", self)

    def __init__(self, config: Config) -> None:
        self.adopt(load(config, self.kinds), config)

    @classmethod
    def from_pipeline(cls, pipe: DiTPipeline, resolution: int | None = None) -> DiT:
        """The backbone of a pipeline already in memory (tests and notebooks)."""
        self = cls.__new__(cls)
        self.adopt(pipe, cls.Config(weights="in memory", resolution=resolution))
        return self

    @cached_property
    def fingerprint(self) -> str:
        """See `harness.backbones.loading.fingerprint`."""
        return fingerprint(self.pipe, f"{self.config.dtype} {self.latent_shape}")

    @property
    def pooled_width(self) -> int:
        """P = D: what stands for the prompt is the embedding of the class."""
        return self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim

    @property
    def num_classes(self) -> int:
        """Number of classes; it is also the label of the null class."""
        return self.transformer.config.num_embeds_ada_norm

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{'class_labels': (B,)}."""
        labels = [self._label(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(labels, device=self.transformer.device)}

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Each names a class."""
        for prompt in prompts:
            self._label(prompt)

    def _label(self, prompt: str) -> int:
        if prompt == "":
            return self.num_classes
        if prompt.isdecimal():
            require(int(prompt) < self.num_classes, f"prompt '{prompt}': the model has classes 0 to {self.num_classes - 1}")
            return int(prompt)
        if isinstance(self.pipe, ShapesOnly):
            return prompt_seed(prompt) % self.num_classes
        names = self.pipe.labels
        require(prompt in names, f"prompt '{prompt[:80]}': backbone 'dit' draws classes, and this is no name of one; give a "
                f"number from 0 to {self.num_classes - 1}{', or a name such as ' + repr(next(iter(names))) if names else ''}")
        return names[prompt]

    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The noise (B, C, H, W) in `latents` at `timestep` (B,) in 0..T - 1."""
        return self.predicted_noise(self.transformer(latents, timestep=timestep, return_dict=False, **conditioning)[0])

    def on_meta(self) -> DiT:
        """Same shapes, no weights."""
        return self.bare_twin(_MetaDiT)


class _MetaDiT(DiT):
    """Counting twin: the transformer on the meta device, nothing else."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"class_labels": torch.empty(len(prompts), device="meta", dtype=torch.int64)}
