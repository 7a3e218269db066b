"""The two stages of SDTM: which tokens are folded at a step. See the package for source and deviations."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.api import METHODS, Method, Reduction, Run, Site, require
from harness.engine.tokens import Fold, cells, cosine, fold_best, fold_into, num_kept, others, tiling_sides


@METHODS.register("sdtm")
class SDTM(Method):
    """Structure-then-detail merging, without cache."""

    sites = frozenset({"attention", "ffn"})
    presets: ClassVar = {
        "official": {"keep_ratio": 0.5, "delta": 0.2, "multiple": 16},
        "table1": {"keep_ratio": 0.75, "delta": 0.2},
    }

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens computed by what is reduced, midway of the swing; the authors' rho is 1 - keep_ratio.

        delta: the fraction folded falls along a cosine from rho + delta at the first step to rho - delta at the last (authors:
        0.2; with the default 0 every reduced site computes keep_ratio). structure_share: fraction of the steps in the first
        stage. window: side of windows and cells. priority_weight: of the counter in the score of a window (authors: a_s).
        multiple: round down to as many windows, or tokens in the second stage (authors: 16); 1 meets the count exactly.
        """

        keep_ratio: float = 0.5
        delta: float = 0.0
        structure_share: float = 0.4
        window: int = 2
        priority_weight: float = 0.05
        multiple: int = 1

        def __post_init__(self) -> None:
            require(self.window >= 2, f"sdtm.window must be at least 2, got {self.window}")
            floor = 1 / self.window**2
            require(floor <= self.keep_ratio <= 1, f"sdtm.keep_ratio must lie in [{floor:g}, 1] with window {self.window}, got "
                    f"{self.keep_ratio}: one token of each window stays")
            require(0 <= self.delta < 1, f"sdtm.delta must lie in [0, 1), got {self.delta}")
            require(0 <= self.structure_share <= 1, f"sdtm.structure_share must lie in [0, 1], got {self.structure_share}")
            require(self.multiple >= 1, f"sdtm.multiple must be at least 1, got {self.multiple}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.reset()

    def begin(self, run: Run) -> None:
        """Refuse grids that windows do not tile."""
        side = self.config.window
        require(run.grid[0] % side == 0 and run.grid[1] % side == 0,
                f"{self.name}.window: windows of {side} x {side} do not tile a grid of {run.grid} tokens; those that do "
                f"have window: {tiling_sides(run.grid)}")

    def reset(self) -> None:
        """No token has been folded yet."""
        self._waiting: Tensor | None = None  # (B, N) calls since a token was last computed for itself

    def num_folded(self, step: int, num_steps: int, num_tokens: int) -> int:
        """R, from the schedule: rho - delta + 2 delta cos(pi/2 t / (T - 1))."""
        folded = 1 - self.config.keep_ratio
        delta = min(self.config.delta, folded, max(0.0, 1 - 1 / self.config.window**2 - folded))
        swing = delta * (2 * math.cos(math.pi / 2 * step / max(1, num_steps - 1)) - 1)
        keep = min(1.0, self.config.keep_ratio - swing)
        return num_tokens - num_kept(keep, num_tokens)

    def in_structure(self, site: Site) -> bool:
        """Whether the step is in the first stage (authors: t <= 20 of 50)."""
        return site.step <= self.config.structure_share * site.run.num_steps

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D). The plan is made from the first attention's modulated input, also for the feed-forward."""
        if "sdtm" not in site.memory:
            site.memory["sdtm"] = self._plan(hidden_states, site)
        return site.memory["sdtm"] if site.kind == "ffn" or self.in_structure(site) else None

    def _plan(self, hidden_states: Tensor, site: Site) -> Fold | None:
        batch, num_tokens, _ = hidden_states.shape
        removed = self.num_folded(site.step, site.run.num_steps, num_tokens)
        unit = self.config.multiple * (self.config.window**2 - 1 if self.in_structure(site) else 1)
        removed = removed if self.config.multiple == 1 else removed // unit * unit
        if removed == 0:
            return None
        if self._waiting is None:
            self._waiting = torch.zeros(batch, num_tokens, device=hidden_states.device)
        match = self._windows if self.in_structure(site) else self._details
        src, dst, busy = match(hidden_states, site, removed)
        site.memory["busy"] = torch.zeros_like(self._waiting).scatter(1, busy, 1.0).scatter(1, src, 1.0)  # (B, N)
        self._waiting = (self._waiting + 1) * site.memory["busy"]
        return fold_into(num_tokens, src, dst)

    def _windows(self, hidden_states: Tensor, site: Site, removed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(src, dst, destinations): the most similar windows, each folded into a random member of itself."""
        members = cells(site.grid, self.config.window, hidden_states.device)  # (W, m^2)
        size = members.shape[1]
        total = normalize(hidden_states.float(), dim=-1)[:, members].sum(dim=2)  # (B, W, D)
        similarity = total.square().sum(dim=-1) / size**2  # the mean cosine over all pairs in a window
        priority = self._waiting / (self._waiting.mean(dim=1, keepdim=True) + 1e-6)
        score = similarity + self.config.priority_weight * priority[:, members].mean(dim=-1)
        chosen = score.topk(-(-removed // (size - 1)), dim=1).indices.unsqueeze(-1)  # (B, k, 1)
        pick = site.rand(hidden_states.shape[1])[:, members].argmax(dim=-1, keepdim=True).gather(1, chosen)
        turns = torch.arange(1, size, device=members.device)
        dst = members[chosen, pick]
        src = members[chosen, (pick + turns) % size]  # (B, k, m^2 - 1)
        return src.flatten(1)[:, :removed], dst.expand_as(src).flatten(1)[:, :removed], dst.flatten(1)

    def _details(self, hidden_states: Tensor, site: Site, removed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(src, dst, destinations): in each cell the token that waits longest is a destination, the best matches are folded."""
        members = cells(site.grid, self.config.window, hidden_states.device)
        dst = members.expand(len(self._waiting), -1, -1)
        dst = dst.gather(2, self._waiting[:, members].argmax(dim=-1, keepdim=True)).squeeze(2)  # (B, K)
        src = others(dst, hidden_states.shape[1])
        return *fold_best(cosine(hidden_states, src, dst), dst, src, removed), dst
