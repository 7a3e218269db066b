"""Random SD3 blocks of any width and number of tokens: for timing, where weights do not matter but shapes do."""

from __future__ import annotations

import torch

from harness import backbones as backbones
from harness.api import BACKBONES, Backbone
from harness.bench.options import BenchOptions

HEAD_WIDTH = 64
NUM_TEXT_TOKENS = 333
"""77 tokens of CLIP and 256 of T5, as SD3 has them."""


def embedded(options: BenchOptions) -> Backbone:
    """The embedded trained model."""
    return BACKBONES.build("sd3", {"weights": "embedded", "device": options.device, "dtype": options.dtype})


def shape_only(side: int, num_blocks: int, options: BenchOptions) -> Backbone:
    """An SD3 with `num_blocks` random blocks of width `options.width` over side x side image and 333 text tokens.

    The conditioning comes from the embedded model's encoders, so its width is theirs; only the first projection sees it.
    """
    clip_length = 16  # of the embedded model's tokenizer
    base = BACKBONES.build("sd3", {"weights": "embedded", "device": options.device, "dtype": options.dtype,
                                   "text_length": NUM_TEXT_TOKENS - clip_length})
    config = {**base.transformer.config, "num_layers": num_blocks, "attention_head_dim": HEAD_WIDTH,
              "num_attention_heads": options.width // HEAD_WIDTH, "caption_projection_dim": options.width, "sample_size": side,
              "pos_embed_max_size": side}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = type(base.transformer).from_config(config)
    transformer = transformer.to(options.device, getattr(torch, options.dtype)).eval().requires_grad_(False)
    backbone = base.with_transformer(transformer, f"shape only {options.width}x{num_blocks}x{side}")
    backbone.latent_shape = (base.latent_shape[0], side, side)
    return backbone
