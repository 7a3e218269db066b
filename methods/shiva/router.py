"""Context-aware router: a score for each image token from the token, the timestep, the prompt and the layer.

Source: Shiva-DiT, arXiv:2602.05605, section 3.3, Eq. 8 and 9, Table 2.
Differs: tokens are normalised (no affine) before the projection, since the residual streams of SD3 and Flux have outlier
channels; `w` starts small and random, since zero scores would select a stripe of tokens by index.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_WIDTH = 64


class Router(nn.Module):
    """One router, shared by a group of adjacent blocks; the layer embedding tells them apart."""

    def __init__(self, token_width: int, time_width: int, prompt_width: int, num_layers: int, hidden: int,
                 inputs: frozenset[str]) -> None:
        super().__init__()
        self.inputs = inputs
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
        tokens = self.token(F.layer_norm(hidden_states.float(), hidden_states.shape[-1:]))  # (B, N, hidden)
        context = tokens.new_zeros(tokens.shape[0], tokens.shape[-1])  # h = Proj_t(t) + Proj_p(c) + Proj_l(l)  (Eq. 8)
        if self.time is not None:
            context = context + self.time(time_embedding.float())
        if self.prompt is not None:
            context = context + self.prompt(F.layer_norm(pooled_prompt.float(), pooled_prompt.shape[-1:]))
        if self.layer is not None:
            context = context + self.layer_proj(self.layer.weight[layer])
        return self.score(self.norm(F.silu(tokens + context[:, None]))).squeeze(-1)  # (Eq. 9)


def group_of(block: int, num_blocks: int, groups: int) -> int:
    """Index of the router that serves `block` when `groups` routers share `num_blocks` adjacent blocks."""
    return block * groups // num_blocks


class RouterBank(nn.Module):
    """The routers of all blocks."""

    def __init__(self, num_blocks: int, groups: int, widths: tuple[int, int, int], hidden: int, inputs: frozenset[str]) -> None:
        super().__init__()
        self.places = []  # block -> (router, index within the group)
        members: dict[int, int] = {}
        for block in range(num_blocks):
            group = group_of(block, num_blocks, groups)
            self.places.append((group, members.setdefault(group, 0)))
            members[group] += 1
        self.routers = nn.ModuleList(Router(*widths, members[g], hidden, inputs) for g in range(groups))

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, pooled_prompt: Tensor, block: int) -> Tensor:
        """Scores (B, N) of the tokens entering `block`."""
        router, index = self.places[block]
        device = hidden_states.device.type
        # scores stay float32 under mixed precision: half precision ties decide which tokens are kept
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return self.routers[router](hidden_states, time_embedding, pooled_prompt, index)
