"""Ratio policies: the keep ratio of every (timestep, block).

Source: Shiva-DiT, arXiv:2602.05605, section 3.4, Eq. 10 and 11; FiLM, Perez et al. 2018, arXiv:1709.07871 (`film`, the
multiplicative design that the paper argues against); SDTM's structure-then-detail schedule in spirit (`structure_first`).
Differs: the output layers start at zero, so every ratio starts at the target.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

HIDDEN = 256
LEARNED = ("additive", "per_layer", "per_timestep", "film")
HAND_MADE = ("fixed", "structure_first", "random")
RAMP = 3.0
"""Logit between the first and the last noise level of `structure_first`: keep 0.25 to 0.87 around a mean of 0.6."""
KNOTS = 16


def _hidden() -> nn.Sequential:
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU())


def _head() -> nn.Sequential:
    return nn.Sequential(*_hidden(), _zeroed(1))


def _zeroed(width: int) -> nn.Linear:
    linear = nn.Linear(HIDDEN, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def sinusoid(level: Tensor, width: int = HIDDEN) -> Tensor:
    """(B,) noise levels in [0, 1] -> (B, width) sinusoidal embedding, on the 0..1000 scale that diffusion models use."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=level.device, dtype=torch.float32) / half)
    angles = level.float()[:, None] * 1000 * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RatioPolicy(nn.Module):
    """logit(r_{t,l}) = Phi_time(t) + Phi_layer(l) + anchor (Eq. 10, 11), or another way to spend the same mean.

    Learned: 'additive' (the paper), 'per_layer' and 'per_timestep' (one of its terms), 'film' (the timestep scales and shifts
    the layer's hidden features). Not learned: 'fixed' (one ratio everywhere), 'structure_first' (few tokens while noise is
    high and structure forms, more for the detail), 'random' (offsets of random layers and of a random curve over noise).
    """

    def __init__(self, kind: str, num_layers: int, target: float) -> None:
        super().__init__()
        self.kind, self.num_layers = kind, num_layers
        self.time = _head() if kind in ("additive", "per_timestep") else None
        self.layer = _head() if kind in ("additive", "per_layer") else None
        self.embedding = nn.Embedding(num_layers, HIDDEN) if kind in ("additive", "per_layer", "film") else None
        if kind == "film":
            self.layer_hidden, self.output = _hidden(), _zeroed(1)
            self.modulation = nn.Sequential(*_hidden(), _zeroed(2 * HIDDEN))
        self.anchor = nn.Parameter(torch.tensor(_logit(target)), requires_grad=kind in LEARNED)
        self.register_buffer("shift", torch.zeros(()))  # set at export so that the budget is met exactly
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**62)  # the training seed's, drawn from by no one else
        for name, count in (("random_layer", num_layers), ("random_time", KNOTS)) if kind == "random" else ():
            self.register_buffer(name, torch.randn(count, generator=generator))

    def logits(self, level: Tensor) -> Tensor:
        """(B,) noise levels -> (B, layers)."""
        logits = self.anchor.expand(level.shape[0], self.num_layers) + self.shift
        if self.time is not None:
            logits = logits + self.time(sinusoid(level))
        if self.layer is not None:
            logits = logits + self.layer(self.embedding.weight).squeeze(-1)
        if self.kind == "film":
            logits = logits + self._film(level)
        if self.kind == "structure_first":
            logits = logits + RAMP * (0.5 - level.float())[:, None]
        if self.kind == "random":
            logits = logits + self.random_layer + self._random_curve(level)[:, None]
        return logits

    def forward(self, level: Tensor) -> Tensor:
        """Keep ratios (B, layers) in (0, 1)."""
        return torch.sigmoid(self.logits(level))

    def _film(self, level: Tensor) -> Tensor:
        """(B, layers)."""
        scale, offset = self.modulation(sinusoid(level))[:, None].chunk(2, dim=-1)  # (B, 1, HIDDEN) each
        return self.output((1 + scale) * self.layer_hidden(self.embedding.weight) + offset).squeeze(-1)

    def _random_curve(self, level: Tensor) -> Tensor:
        """(B,): straight lines between random knots."""
        place = level.float().clamp(0, 1) * (KNOTS - 1)
        low = place.floor().long().clamp(max=KNOTS - 2)
        return torch.lerp(self.random_time[low], self.random_time[low + 1], place - low)


def nearest_root(excess: Callable[[float], float], start: float, tolerance: float, rounds: int = 40) -> float:
    """The argument at which `excess`, which never falls, is nearest to zero; done within `tolerance`, or after `rounds` values.

    A bracket grown from `start`, then false position (Illinois): an evaluation that counts FLOPs takes a second.
    """
    points = {start: excess(start)}
    place, step = start, 0.25 if points[start] < 0 else -0.25
    while abs(points[place]) > tolerance and points[place] * step < 0 and len(points) < rounds:
        place, step = place + step, 2 * step
        points[place] = excess(place)
    below = max((point for point, value in points.items() if value <= 0), default=place)
    above = min((point for point, value in points.items() if value > 0), default=place)
    low, high, last = points[below], points[above], 0
    while min(map(abs, points.values())) > tolerance and len(points) < rounds and above - below > 1e-6:
        place = (below * high - above * low) / (high - low)
        value = points[place] = excess(place)
        if value <= 0:
            below, low, high, last = place, value, high / 2 if last < 0 else high, -1
        else:
            above, high, low, last = place, value, low / 2 if last > 0 else low, 1
    return min(points, key=lambda point: abs(points[point]))


def _logit(ratio: float) -> float:
    ratio = min(ratio, 1 - 1e-6)
    return math.log(ratio / (1 - ratio))
