"""DyDiT's routers, their relaxed gates, the loss on their FLOPs, and what is fixed of them for sampling."""

import math

import torch
from torch import Tensor, nn

from harness.api import Run

LEVELS = 64
"""Noise levels at which the training's time embeddings and token rates are remembered."""


class Gates(nn.Module):
    """A block's routers. heads, groups: (B, D) -> (B, H - 1), for all but the first. tokens: (B, N, D) -> (B, N, 1)."""

    def __init__(self, run: Run, width_bias: float, token_bias: float) -> None:
        super().__init__()
        self.heads, self.groups = nn.Linear(run.width, run.num_heads - 1), nn.Linear(run.width, run.num_heads - 1)
        hidden = max(1, run.width // 16)
        self.tokens = nn.Sequential(nn.Linear(run.width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        for linear, bias in ((self.heads, width_bias), (self.groups, width_bias), (self.tokens[2], token_bias)):
            nn.init.constant_(linear.bias, bias)


def hard_gate(logits: Tensor, uniform: Tensor | None, tau: float) -> Tensor:
    """0 or 1 per logit, with the gradient of sigmoid((logit + logistic noise) / tau); uniform: its source, None for no noise."""
    if uniform is None:
        return (logits > 0).to(logits.dtype)
    uniform = uniform.clamp(1e-6, 1 - 1e-6)  # the difference of two Gumbel variables is logistic
    soft = torch.sigmoid((logits + uniform.log() - (1 - uniform).log()) / tau)
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


class FlopsLoss:
    """weight * (mean of F_dyn / F over rows - target)^2, with F = 4 N D^2 + 2 N^2 D of attention and 8 N D^2 of feed-forward."""

    def __init__(self, run: Run, target: float, weight: float) -> None:
        self.target, self.weight = target, weight
        self._attention = 4 * run.width + 2 * run.num_tokens
        self._ffn = 8 * run.width
        self._parts: list[Tensor] = []

    def add(self, heads: Tensor, groups: Tensor, tokens: Tensor) -> None:
        """The masks (B, H), (B, H), (B, N) of a block."""
        used = self._attention * heads.mean(1) + self._ffn * groups.mean(1) * tokens.mean(1)
        self._parts.append(used / (self._attention + self._ffn))

    def value(self) -> Tensor:
        """The loss of all blocks that were added."""
        return self.weight * (torch.stack(self._parts).mean() - self.target) ** 2


class Schedule(nn.Module):
    """What training saw, by noise level, and the plan made of it."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(LEVELS))
        self.register_buffer("embedding", torch.zeros(LEVELS, width))
        self.register_buffer("tokens", torch.zeros(num_blocks, LEVELS))
        self.register_buffer("token_seen", torch.zeros(num_blocks, LEVELS))

    def note_embedding(self, level: Tensor, embedding: Tensor) -> None:
        """level (B,), embedding (B, D): the last one of each level is kept."""
        place = self._place(level)
        self.embedding[place], self.seen[place] = embedding.detach(), 1.0

    def note_tokens(self, block: int, level: Tensor, rate: Tensor) -> None:
        """A running mean of the share of tokens (B,) that pass, a tenth of it new."""
        place = self._place(level)
        new = self.token_seen[block, place] == 0
        self.tokens[block, place] = torch.where(new, rate, 0.9 * self.tokens[block, place] + 0.1 * rate)
        self.token_seen[block, place] = 1.0

    @staticmethod
    def _place(level: Tensor) -> Tensor:
        return (level * LEVELS).long().clamp(0, LEVELS - 1)

    @torch.no_grad()
    def plan(self, gates: nn.ModuleList, run: Run, keep_ratio: float, shift: float) -> list[list[tuple]]:
        """[step][block]: (active heads, active groups, share of tokens), each logit raised by `shift`."""
        return [[self._active(gates[block], block, level, run, keep_ratio, shift) for block in range(run.num_blocks)]
                for level in run.timesteps]

    def _active(self, gate: Gates, block: int, level: float, run: Run, keep_ratio: float, shift: float) -> tuple:
        every = list(range(run.num_heads))
        if not bool(self.seen.any()):  # untrained: heads and tokens thinned alike, moved by the shift as learned ones are
            share = torch.sigmoid(torch.tensor(_logit(keep_ratio) + shift)).item()
            return every[:max(1, round(share * run.num_heads))], every, max(share, 1 / run.num_tokens)
        known = self.seen.nonzero().flatten()
        place = known[(known - min(int(level * LEVELS), LEVELS - 1)).abs().argmin()]
        width = [[0, *(1 + index for index, logit in enumerate(router(self.embedding[place]).tolist()) if logit + shift > 0)]
                 for router in (gate.heads, gate.groups)]
        known = self.token_seen[block].nonzero().flatten()
        rate = float(self.tokens[block, known[(known - place).abs().argmin()]])
        share = torch.sigmoid(torch.tensor(_logit(rate) + shift)).item()
        return *width, max(share, 1 / run.num_tokens)


def _logit(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))
