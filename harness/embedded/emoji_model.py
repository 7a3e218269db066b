"""The trainable part of the embedded backbone: SD3's transformer with its two text encoders.

`StableDiffusion3Pipeline` puts rows of zeros (`max_sequence_length` of them, 256 unless told) where T5 is
missing. They are all alike and stay alike through every block, so training carries a single one and counts it
as many by adding log(count) to its attention scores: the same function, exactly, at a fraction of its price.
The count is drawn from NUM_ZERO_ROWS for every sample, so the pipeline works with its default and with 16.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTokenizer

from harness.embedded.emoji_text import build_text_encoder

GRID = 16
LATENT_CHANNELS = 4
WIDTH = 192
NUM_LAYERS = 8
NUM_ZERO_ROWS = (16, 256)


class CompactAttention:
    """Diffusers' joint attention (`JointAttnProcessor2_0`) with a bias (B, 1, 1, N + T) on the keys."""

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states: (B, N, D), encoder_hidden_states: (B, T, D); returns both after attention."""
        num_tokens = hidden_states.shape[1]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = torch.cat([attn.norm_q(heads(attn.to_q(hidden_states))),
                           attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))], dim=2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(hidden_states))),
                         attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))], dim=2)
        value = torch.cat([heads(attn.to_v(hidden_states)),
                           heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        query, key = query.to(value.dtype) / math.sqrt(query.shape[-1]), key.to(value.dtype)
        # Not F.scaled_dot_product_attention: at 81 tokens in bf16 its backward on CPU takes 4 times as long.
        scores = query @ key.transpose(-1, -2) + attention_mask.to(value.dtype)
        mixed = scores.softmax(dim=-1).to(value.dtype) @ value
        mixed = mixed.transpose(1, 2).flatten(2)
        image, text = mixed[:, :num_tokens], mixed[:, num_tokens:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def build_transformer(grid: int = GRID) -> SD3Transformer2DModel:
    """An untrained SD3 transformer of 8 blocks, width 192; as in DiT, every block starts as the identity."""
    transformer = SD3Transformer2DModel(
        sample_size=grid, patch_size=1, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=NUM_LAYERS, attention_head_dim=32, num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH,
        pos_embed_max_size=grid, qk_norm="rms_norm")
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1_context.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class EmojiModel(nn.Module):
    """Transformer and text encoders as one module: token ids and noisy latents in, velocity out."""

    def __init__(self, tokenizer: CLIPTokenizer, grid: int = GRID) -> None:
        super().__init__()
        self.grid = grid
        self.transformer = build_transformer(grid)
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)
        self.transformer.set_attn_processor(CompactAttention())
        self.register_buffer("positions", self.transformer.pos_embed.pos_embed.clone(), persistent=False)

    def set_grid(self, grid: int) -> None:
        """Lay a coarser grid of tokens over the same picture: at half the grid, a token takes its 4 places' mean.

        SD3 would crop the middle of the position table, and what is learnt at 8 would sit elsewhere at 16.
        """
        whole = self.grid
        assert whole % grid == 0
        table = self.positions.view(1, whole, whole, WIDTH).clone()
        if grid < whole:
            means = F.avg_pool2d(table.permute(0, 3, 1, 2), whole // grid).permute(0, 2, 3, 1)
            low = (whole - grid) // 2
            table[:, low : low + grid, low : low + grid] = means
        self.transformer.pos_embed.pos_embed.copy_(table.view(1, whole * whole, WIDTH))

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) to text tokens (B, T + 1, D), the last a row of zeros, and pooled text (B, D)."""
        encoders = (self.text_encoder, self.text_encoder_2)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return F.pad(tokens, (0, 0, 0, 1)), pooled

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, num_zero_rows: Tensor) -> Tensor:
        """Velocity (B, 4, H, W); timestep (B,) in [0, 1], 1 = pure noise; num_zero_rows (B,)."""
        tokens, pooled = self.encode(ids)
        num_keys = latents.shape[-1] * latents.shape[-2] + tokens.shape[1]
        bias = F.pad(num_zero_rows.float().log().view(-1, 1, 1, 1), (num_keys - 1, 0))
        return self.transformer(latents, tokens, pooled, timestep * 1000,
                                joint_attention_kwargs={"attention_mask": bias}, return_dict=False)[0]
