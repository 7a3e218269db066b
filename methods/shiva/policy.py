"""Ratio policies: the keep ratio of every (timestep, block), and the loss that holds their mean at the budget.

Source: Shiva-DiT, arXiv:2602.05605, section 3.4, Eq. 10 to 13, appendix A.2 (Eq. 29).
Differs: the output layers start at zero, so every ratio starts at the target; the budget term is taken on noise-free ratios,
because N(0, 1) noise before the sigmoid shifts the mean (a noisy mean of 0.8 is a noise-free 0.839).
"""

import math

import torch
from torch import Tensor, nn

HIDDEN = 256


def _head() -> nn.Sequential:
    head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1))
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    return head


def sinusoid(level: Tensor, width: int = HIDDEN) -> Tensor:
    """(B,) noise levels in [0, 1] -> (B, width) sinusoidal embedding, on the 0..1000 scale that diffusion models use."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=level.device, dtype=torch.float32) / half)
    angles = level.float()[:, None] * 1000 * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RatioPolicy(nn.Module):
    """logit(r_{t,l}) = Phi_time(t) + Phi_layer(l) + anchor (Eq. 10, 11), or a part of it.

    kind: 'additive' (the paper), 'per_layer', 'per_timestep', 'fixed' (one ratio everywhere, nothing to learn).
    """

    def __init__(self, kind: str, num_layers: int, target: float) -> None:
        super().__init__()
        self.kind = kind
        self.time = _head() if kind in ("additive", "per_timestep") else None
        self.layer = _head() if kind in ("additive", "per_layer") else None
        self.embedding = nn.Embedding(num_layers, HIDDEN) if self.layer is not None else None
        self.num_layers = num_layers
        self.anchor = nn.Parameter(torch.tensor(_logit(target)), requires_grad=kind != "fixed")
        self.register_buffer("shift", torch.zeros(()))  # set at export so that the budget is met exactly

    def logits(self, level: Tensor) -> Tensor:
        """(B,) noise levels -> (B, layers)."""
        logits = self.anchor.expand(level.shape[0], self.num_layers) + self.shift
        if self.time is not None:
            logits = logits + self.time(sinusoid(level))
        if self.layer is not None:
            logits = logits + self.layer(self.embedding.weight).squeeze(-1)
        return logits

    def forward(self, level: Tensor) -> Tensor:
        """Keep ratios (B, layers) in (0, 1)."""
        return torch.sigmoid(self.logits(level))


def _logit(ratio: float) -> float:
    ratio = min(ratio, 1 - 1e-6)
    return math.log(ratio / (1 - ratio))


class BudgetLoss:
    """L = weight * mean(r) * stopgrad(2 (mu - target)), mu an exponential moving average of mean(r)  (Eq. 12, 13).

    beta weighs the new sample; mu starts at the first mean. A proportional controller: it settles where the task's pull on
    the ratios balances it, which export corrects.
    """

    def __init__(self, target: float, weight: float, beta: float) -> None:
        self.target, self.weight, self.beta = target, weight, beta
        self.mean: float | None = None

    def __call__(self, mean_ratio: Tensor) -> Tensor:
        """The loss of one batch; updates mu first."""
        value = float(mean_ratio.detach())
        self.mean = value if self.mean is None else self.beta * value + (1 - self.beta) * self.mean
        return self.weight * mean_ratio * (2 * (self.mean - self.target))
