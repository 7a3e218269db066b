"""ToFu: prune similar tokens in early blocks, where the network is far from linear, and merge them in late ones.

Tokens are matched as in ToMeSD. Early blocks compute a destination alone, late blocks its group's mean stretched to the largest
norm in the group (MLERP); in both every member gets a copy of the result.

Source: Kim et al. 2024 (Token Fusion), arXiv:2312.01026, sections 3.2 and 3.3; matching of Bolya & Hoffman, arXiv:2303.17604.
Differs: no official code exists. The switch from pruning to merging is a block index, by default half of the depth, and not
calibrated by the paper's linearity measure. Acts at the joint attention on image tokens, metric = the module's modulated input;
SD3.5's second attention shares the plan of the first. The destination pattern comes from (step, block), not from call history.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.api import METHODS, Method, Run, Site, require
from harness.engine.tokens import Fold, cells, cosine, fold_best, fold_into, num_kept, others


@METHODS.register("tofu")
class ToFu(Method):
    """Token fusion around the attention (default) and feed-forward branches."""

    of_depth = ("prune_blocks",)
    presets: ClassVar = {"official": {"keep_ratio": 0.5}, "table1": {"keep_ratio": 0.75}}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens a reduced module computes.

        stride: side of the destination cells, in tokens; at least 1 / stride**2 of the tokens stay. prune_blocks: blocks before
        this index prune, the others merge; None: half of the blocks. ffn: reduce the feed-forward too, with the attention's plan.
        """

        keep_ratio: float = 0.5
        stride: int = 2
        prune_blocks: int | None = None
        ffn: bool = False

        def __post_init__(self) -> None:
            require(self.stride >= 2, f"tofu.stride must be at least 2, got {self.stride}")
            floor = 1 / self.stride**2
            require(floor <= self.keep_ratio <= 1, f"tofu.keep_ratio must lie in [{floor:g}, 1] with stride {self.stride}, got "
                    f"{self.keep_ratio}: destinations are never merged away")
            require(self.prune_blocks is None or self.prune_blocks >= 0,
                    f"tofu.prune_blocks must not be negative, got {self.prune_blocks}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sites = frozenset({"attention", "ffn"} if config.ffn else {"attention"})

    def begin(self, run: Run) -> None:
        """Refuse grids that the cells do not fit; find the depth at which pruning ends."""
        require(min(run.grid) >= self.config.stride, f"tofu.stride {self.config.stride} does not fit a grid of {run.grid} tokens")
        depth = self.config.prune_blocks
        require(depth is None or depth <= run.num_blocks,
                f"tofu.prune_blocks: {depth} is more than the {run.num_blocks} blocks of backbone '{run.backbone}'")
        self._depth = run.num_blocks // 2 if depth is None else depth

    def reduce(self, hidden_states: Tensor, site: Site) -> Fold | None:
        """hidden_states: (B, N, D), the modulated input of the module."""
        batch, num_tokens, _ = hidden_states.shape
        kept = num_kept(self.config.keep_ratio, num_tokens)
        if kept == num_tokens:
            return None
        if "tofu" not in site.memory:
            members = cells(site.grid, self.config.stride, torch.device("cpu"))
            pick = torch.randint(members.shape[1], (len(members), 1), generator=site.generator())
            dst = members.gather(1, pick).T.to(hidden_states.device).expand(batch, -1)
            src = others(dst, num_tokens)
            pairs = fold_best(cosine(hidden_states, src, dst), dst, src, num_tokens - kept)
            site.memory["tofu"] = fold_into(num_tokens, *pairs, mode="prune" if site.block < self._depth else "mlerp")
        return site.memory["tofu"]
