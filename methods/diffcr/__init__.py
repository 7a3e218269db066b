"""DiffCR: mixture-of-depths routing with a compression ratio that is learned for each block and region of timesteps.

A linear router scores the tokens of each block; the best go through, gated; the rest pass by their residual. In training a block
runs at the two ratio bins next to its learned ratio and the outputs are blended, which gives the ratio its gradient.

Source: You et al. 2025, arXiv:2412.16822 (CVPR 2025), and the authors' pseudo-code (Apache-2.0), for a PixArt block. Here on any
port: text is always computed, and is blended between the two passes as image tokens are.
Differs: guided halves share their tokens (the larger score of the two). k is floor(ratio * N), not the ceiling. A ratio is held
inside the bins, where the authors extrapolate below the lowest. The table of ratios is moved at export, one bin of one entry
after the other in the order in which a common shift would move them, until its mean, or a FLOPs cut, is met. keep_ratio 1 leaves
the model alone; with any other the gate (0.5 at the start) is always on, unless `gate_norm`. A block without a feed-forward of
its own (Flux's single ones) is gated on its residual. No dense timesteps (their App. J).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.api import METHODS, Reduction, Run, Site, Stage, TrainableMethod
from harness.engine.tokens import Mixture, num_kept, top_indices
from methods.diffcr.bins import bins_after, nearest_moves
from methods.diffcr.config import DiffCRConfig
from methods.diffcr.gates import Gate, GatedKeep, gate_of


@METHODS.register("diffcr")
class DiffCR(TrainableMethod, nn.Module):
    """Routers, ratios per (block, region), and gates on the feed-forward of what is kept; every block is routed."""

    stages = (Stage("joint", share=1.0, adapters=True, one_timestep=True),)
    needs_teacher = False
    presets: ClassVar = {"official": {"keep_ratio": 0.8}, "table1": {"keep_ratio": 0.88}}

    Config = DiffCRConfig

    def __init__(self, config: DiffCRConfig) -> None:
        super().__init__(config)
        self.distils, self.num_bins = config.distill, config.num_bins
        self.sites = frozenset({"block", "ffn"} if config.gate_scope == "ffn" else {"block"})

    def build(self, run: Run) -> None:
        """Routers and ratios."""
        self.router_weights = nn.Parameter(torch.empty(run.num_blocks, run.width))
        nn.init.uniform_(self.router_weights, -(run.width**-0.5), run.width**-0.5)
        self.ratio = nn.Parameter(torch.ones(run.num_blocks, self.config.regions))

    def region(self, level: float) -> int:
        """Index of the region that a noise level in [0, 1] falls into."""
        return min(int(level * self.config.regions), self.config.regions - 1)

    # ------------------------------------------------------------------------------------------ the table

    def tabulate(self) -> None:
        """k[step][block], after the moves that bring its mean nearest to keep_ratio, or those that were fitted to a budget."""
        moves = self.fitted["moves"] if self.fitted else nearest_moves(self._mean, self._num_moves(), self.config.keep_ratio)
        ratios = self._at_steps(bins_after(moves, self.ratio.detach(), self.num_bins)).tolist()
        self.table = [[num_kept(ratio, self.run.num_tokens) for ratio in row] for row in ratios]

    def _num_moves(self) -> int:
        return (self.num_bins - 1) * self.ratio.numel()

    def _at_steps(self, bins: Tensor) -> Tensor:
        """(steps, blocks) ratios."""
        return bins[:, [self.region(level) for level in self.run.timesteps]].T / self.num_bins

    def _mean(self, moves: int) -> float:
        return float(self._at_steps(bins_after(moves, self.ratio.detach(), self.num_bins)).mean())

    def fit_budget(self, cut: Callable[[], float], flops_cut: float) -> dict[str, int]:
        """The number of moves whose executed cut is nearest to `flops_cut`; more moves keep more tokens."""
        def unsaved(moves: int) -> float:
            self.load_fit({"moves": moves})
            return -cut()

        fitted = {"moves": nearest_moves(unsaved, self._num_moves(), -flops_cut)}
        self.load_fit(fitted)
        return fitted

    # ------------------------------------------------------------------------------------------ at a site

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D) at a block, (B, M, D) at its feed-forward, whose plan is the gate alone."""
        if self.config.keep_ratio == 1:
            return None
        if site.kind == "ffn":
            return Gate(site.memory.pop("gate"))
        # a product of matrices, which the FLOPs counter knows; that of a matrix and a vector it does not
        scores = site.memory["scores"] = (hidden_states.float() @ self.router_weights[site.block, :, None]).squeeze(-1)
        gate = gate_of(scores, self.config.gate_norm)
        if site.call.training:
            return self._between_bins(site, scores, gate)
        return self._plan(self.table[site.step][site.block], scores, gate, site)

    def _plan(self, k: int, scores: Tensor, gate: Tensor, site: Site) -> GatedKeep:
        kept, halves = top_indices(scores, k, site.call.guidance_halves), site.call.guidance_halves
        # one index set for the batch goes through index_select and index_copy, about 3x cheaper
        return GatedKeep(kept[0] if len(kept) == halves else kept, scores.shape[1], gate, site.memory)

    def _between_bins(self, site: Site, scores: Tensor, gate: Tensor) -> Mixture:
        ratio, num_tokens = self._ratios[site.block] * self.num_bins, scores.shape[1]  # in bins
        # the bin below; at a bin itself, the slope above it
        lower = min(max(int(float(ratio.detach()) + 1e-6), 1), self.num_bins - 1)
        weight = lower + 1 - ratio
        counts = [num_kept(bin_ / self.num_bins, num_tokens) for bin_ in (lower, lower + 1)]
        plans = [self._plan(count, scores, gate, site) for count in counts]
        return Mixture(plans, [weight, 1 - weight], num_tokens)

    # ------------------------------------------------------------------------------------------ training

    def start_stage(self, stage: str, generator: torch.Generator) -> list[dict[str, Any]]:
        """Routers, and ratios without weight decay."""
        return [{"params": [self.router_weights], "lr": self.config.router_lr, "name": "router"},
                {"params": [self.ratio], "lr": self.config.ratio_lr, "name": "ratio", "weight_decay": 0.0}]

    def start_step(self, progress: float, level: Tensor, validating: bool = False) -> None:
        """level: (B,), all in one region."""
        with torch.no_grad():
            self.ratio.clamp_(1 / self.num_bins, 1.0)
        self._ratios = self.ratio[:, self.region(float(level[0]))]

    def losses(self) -> dict[str, Tensor]:
        """The penalty on the mean ratio of this batch's region."""
        return {"ratio": self.config.ratio_weight * (self._ratios.mean() - self.config.keep_ratio) ** 2}
