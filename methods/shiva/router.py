"""Context-aware router: a score for each image token from the token, the timestep, the prompt and the layer.

Source: Shiva-DiT, arXiv:2602.05605, section 3.3, Eq. 8 and 9, Table 2.
Differs: by default tokens are normalised (no affine) before the projection, since the residual streams of SD3 and Flux have
outlier channels (`router_prenorm: false` is the paper); `w` starts small and random, since zero scores would select a stripe
of tokens by index.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.api import require
from methods.shiva.config import ShivaConfig

LAYER_WIDTH = 64


class Router(nn.Module):
    """One router, shared by a group of adjacent blocks; the layer embedding tells them apart."""

    def __init__(self, widths: tuple[int, int, int], num_layers: int, config: ShivaConfig) -> None:
        """widths: of tokens, time embedding and pooled prompt."""
        super().__init__()
        hidden, inputs = config.router_width, config.router_inputs
        token_width, time_width, prompt_width = widths
        self.prenorm = config.router_prenorm
        self.token = nn.Linear(token_width, hidden)
        self.time = nn.Linear(time_width, hidden) if "time" in inputs else None
        self.prompt = nn.Linear(prompt_width, hidden) if "prompt" in inputs else None
        self.layer = nn.Embedding(num_layers, LAYER_WIDTH) if "layer" in inputs else None
        self.layer_proj = nn.Linear(LAYER_WIDTH, hidden) if "layer" in inputs else None
        self.norm = nn.LayerNorm(hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, pooled_prompt: Tensor, layer: int) -> Tensor:
        """Scores (B, N), float32, from (B, N, D), (B, D), (B, P) and the block's index within its group."""
        tokens = self._project(hidden_states.float())  # (B, N, hidden)
        context = tokens.new_zeros(tokens.shape[0], tokens.shape[-1])  # h = Proj_t(t) + Proj_p(c) + Proj_l(l)  (Eq. 8)
        if self.time is not None:
            context = context + self.time(time_embedding.float())
        if self.prompt is not None:
            context = context + self.prompt(F.layer_norm(pooled_prompt.float(), pooled_prompt.shape[-1:]))
        if self.layer is not None:
            context = context + self.layer_proj(self.layer.weight[layer])
        return self.score(self.norm(F.silu(tokens + context[:, None]))).squeeze(-1)  # (Eq. 9)

    def _project(self, tokens: Tensor) -> Tensor:
        """(B, N, hidden) of tokens (B, N, D), which are normalised first if `prenorm`."""
        if not self.prenorm:
            return self.token(tokens)
        # a layer norm without affine, taken into the projection: centred weights do not see a token's mean, and its scale is one
        # factor afterwards. Equal to rounding, and no (B, N, D) copy is written (5x faster at 4,096 tokens of width 1,536)
        weight, width = self.token.weight, tokens.shape[-1]
        squares = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).square() / width
        variance = (squares - tokens.mean(-1, keepdim=True).square()).clamp(min=0)
        centred = weight - weight.mean(1, keepdim=True)
        return F.linear(tokens, centred) * torch.rsqrt(variance + 1e-5) + self.token.bias


def group_of(block: int, num_blocks: int, groups: int) -> int:
    """Index of the router that serves `block` when `groups` routers share `num_blocks` adjacent blocks."""
    return block * groups // num_blocks


def num_routers(groups: int | str, num_blocks: int) -> int:
    """Routers for `num_blocks` blocks: see `router_groups` in the options. '4_of_24' are 4 for each 24 blocks, at least 1."""
    if groups in ("pairs", "per_layer"):
        count = -(-num_blocks // 2) if groups == "pairs" else num_blocks
    elif isinstance(groups, str):
        count = max(1, round(num_blocks * int(groups.split("_")[0]) / 24))
    else:
        count = groups
    require(count <= num_blocks, f"shiva.router_groups: {count} routers for {num_blocks} blocks; at most one per block")
    return count


class RouterBank(nn.Module):
    """The routers of all blocks."""

    def __init__(self, num_blocks: int, groups: int, widths: tuple[int, int, int], config: ShivaConfig) -> None:
        super().__init__()
        self.places = []  # block -> (router, index within the group)
        members: dict[int, int] = {}
        for block in range(num_blocks):
            group = group_of(block, num_blocks, groups)
            self.places.append((group, members.setdefault(group, 0)))
            members[group] += 1
        self.routers = nn.ModuleList(Router(widths, members[g], config) for g in range(groups))

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, pooled_prompt: Tensor, block: int) -> Tensor:
        """Scores (B, N) of the tokens entering `block`."""
        router, index = self.places[block]
        device = hidden_states.device.type
        # scores stay float32 under mixed precision: half precision ties decide which tokens are kept
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return self.routers[router](hidden_states, time_embedding, pooled_prompt, index)
