"""Architectures by name: the sizes of published transformers, for counting without their weights."""

from __future__ import annotations

from typing import Any

_SD3 = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048}
SD3_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd3-medium": {**_SD3, "pos_embed_max_size": 192},
    "sd3.5-medium": {**_SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
}
"""From the transformer configs of stabilityai/stable-diffusion-3-medium-diffusers and stable-diffusion-3.5-medium."""
SD3_TEXT_TOKENS = 77 + 256
"""Of CLIP and T5, as the pipeline gives them."""
SD3_SHIFT = 3.0
"""Of the flow-matching schedule."""
