"""ToMA: choose tokens that represent their neighbourhood best, and merge and unmerge by small dense matrices.

In each tile of the grid a greedy facility location picks destinations; a sharp softmax of similarities says how much each token
goes into each destination, and its transpose (or pseudo-inverse) brings results back. One plan serves many blocks and steps.

Source: Lu et al. 2025, arXiv:2509.10918; schedule, tiles and transpose as in the released Flux script, from a reading of it.
Differs: joint attention of MMDiT blocks on image tokens and, with the same plan, SD3.5's second attention and the feed-forward
(the script: attention in double blocks, all of single blocks). Destinations are chosen per image, not for the first row of the
batch; guided halves share those of the unconditional half. keep_ratio is met to the token by letting some tiles use one slot
more; `exact: false` rounds down per tile as the authors do. Selection is in float32. Unmerging follows the output projection,
which is the same for the transpose.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.api import METHODS, Method, Run, Site, require
from harness.engine.tokens import SoftMerge, cells, num_kept, tiling_sides


@dataclass
class _Group:
    """What blocks of a group share, and the steps at which it was made."""

    dst: Tensor | None = None
    dst_step: int = 0
    plan: SoftMerge | None = field(default=None, repr=False)
    plan_step: int = 0


@METHODS.register("toma")
class ToMA(Method):
    """Token merging by facility location and matrix products."""

    presets: ClassVar = {
        "official": {"keep_ratio": 0.5, "dense_blocks": 5, "merge_every": 3, "exact": False},
        "table1": {"keep_ratio": 0.75, "dense_blocks": 1},
    }

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens a reduced module computes.

        tile: side of the square tiles. beta: sharpness of the softmax. unmerge: how results come back. ffn: reduce the
        feed-forward too. dense_blocks: this many first blocks are left alone. plan_blocks: successive blocks that share a plan;
        None: all. dst_every, matrix_every: steps after which destinations and matrices are made anew. merge_every: only steps
        0, n, 2n, ... merge (authors' script: 3). exact: meet keep_ratio to the token.
        """

        keep_ratio: float = 0.5
        tile: int = 4
        beta: float = 1000.0
        unmerge: Literal["transpose", "pinv"] = "transpose"
        ffn: bool = True
        dense_blocks: int = 0
        plan_blocks: int | None = None
        dst_every: int = 1
        matrix_every: int = 1
        merge_every: int = 1
        exact: bool = True

        def __post_init__(self) -> None:
            require(self.tile >= 2, f"toma.tile must be at least 2, got {self.tile}")
            floor = 1 / self.tile**2
            require(floor <= self.keep_ratio <= 1, f"toma.keep_ratio must lie in [{floor:g}, 1] with tile {self.tile}, got "
                    f"{self.keep_ratio}: each tile keeps a token")
            require(self.beta > 0, f"toma.beta must be positive, got {self.beta}")
            require(self.dense_blocks >= 0, f"toma.dense_blocks must not be negative, got {self.dense_blocks}")
            for name in ("plan_blocks", "dst_every", "matrix_every", "merge_every"):
                value = getattr(self, name)
                require(value is None or value >= 1, f"toma.{name} must be at least 1, got {value}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sites = frozenset({"attention", "ffn"} if config.ffn else {"attention"})
        self.reset()

    def begin(self, run: Run) -> None:
        """Refuse grids that tiles do not cover and backbones that are too shallow."""
        side = self.config.tile
        require(run.grid[0] % side == 0 and run.grid[1] % side == 0,
                f"toma.tile: tiles of {side} x {side} do not cover a grid of {run.grid} tokens; those that do have "
                f"tile: {tiling_sides(run.grid)}")
        require(self.config.dense_blocks < run.num_blocks, f"toma.dense_blocks: {self.config.dense_blocks} leaves none of the "
                f"{run.num_blocks} blocks of backbone '{run.backbone}' to reduce")

    def reset(self) -> None:
        """No plan is kept from another batch."""
        self._groups: dict[int, _Group] = {}

    def slots(self, num_tokens: int) -> list[int]:
        """Destinations of each tile; where they differ, tiles with one more are spread evenly."""
        size = self.config.tile**2
        tiles = num_tokens // size
        keep = self.config.keep_ratio
        total = num_kept(keep, num_tokens) if self.config.exact else num_kept(keep, size) * tiles
        return [(p + 1) * total // tiles - p * total // tiles for p in range(tiles)]

    def reduce(self, hidden_states: Tensor, site: Site) -> SoftMerge | None:
        """hidden_states: (B, N, D), the modulated input of the module."""
        config, num_tokens = self.config, hidden_states.shape[1]
        idle = site.block < config.dense_blocks or site.step % config.merge_every != 0
        slots = self.slots(num_tokens)
        if idle or sum(slots) == num_tokens:
            return None
        number = 0 if config.plan_blocks is None else (site.block - config.dense_blocks) // config.plan_blocks
        group = self._groups.setdefault(number, _Group())
        if group.plan is None or site.step - group.plan_step >= config.matrix_every:
            order = cells(site.grid, config.tile, hidden_states.device)  # (P, n)
            unit = normalize(hidden_states.float(), dim=-1)[:, order]  # (B, P, n, D)
            if group.dst is None or site.step - group.dst_step >= config.dst_every:
                first_half = unit[: len(unit) // site.call.guidance_halves]
                dst = facility_location(first_half @ first_half.transpose(-1, -2), max(slots))
                group.dst, group.dst_step = dst.repeat(site.call.guidance_halves, 1, 1), site.step
            group.plan, group.plan_step = self._plan(unit, order, group.dst, slots), site.step
        return group.plan

    def _plan(self, unit: Tensor, order: Tensor, dst: Tensor, slots: list[int]) -> SoftMerge:
        """unit: (B, P, n, D) normalised tokens by tile; dst: (B, P, K) members of the tiles; slots: how many of K each uses."""
        num_tiles, num_slots = dst.shape[1:]
        used = [p * num_slots + d for p, count in enumerate(slots) for d in range(count)]
        used = torch.tensor(used, device=unit.device)
        unused = torch.ones(num_tiles * num_slots, device=unit.device).index_fill(0, used, 0.0)
        chosen = unit.gather(2, dst.unsqueeze(-1).expand(-1, -1, -1, unit.shape[-1]))
        logits = self.config.beta * (chosen @ unit.transpose(-1, -2))  # (B, P, K, n)
        logits = logits.masked_fill(unused.view(num_tiles, num_slots, 1) > 0, float("-inf"))
        share = logits.softmax(dim=2)  # of each token among the destinations of its tile
        mix = share / share.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        unmix = share.transpose(-1, -2) if self.config.unmerge == "transpose" else torch.linalg.pinv(mix)
        kept = order.expand(len(dst), -1, -1).gather(2, dst).flatten(1).index_select(1, used)
        return SoftMerge(order.flatten(), mix, unmix, used, kept)


TIE = 1e-5
"""Gains this close per place count as equal, and the first token wins: two tokens that are each other's best cover gain exactly
alike, and rounding, which depends on the size of the batch, must not choose between them."""


def facility_location(similarity: Tensor, num: int) -> Tensor:
    """(..., num) indices that greedily maximise sum_i max_{v chosen} similarity[i, v]; similarity (..., n, n) is symmetric."""
    picks, gain, covered = [], similarity.sum(dim=-1), None
    handicap = TIE * torch.arange(similarity.shape[-1], device=similarity.device).expand_as(gain)
    for _ in range(num):
        pick = (gain - handicap).argmax(dim=-1, keepdim=True)
        picks.append(pick)
        handicap = handicap.scatter(-1, pick, float("inf"))  # no token is chosen twice
        row = similarity.gather(-2, pick.unsqueeze(-1).expand(*pick.shape, similarity.shape[-1])).squeeze(-2)
        covered = row if covered is None else torch.maximum(covered, row)
        gain = (similarity - covered.unsqueeze(-2)).relu().sum(dim=-1)
    return torch.cat(picks, dim=-1)
