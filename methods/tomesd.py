"""ToMeSD: merge redundant tokens into similar ones before a module, copy the result back after it.

One random token of every `stride` x `stride` cell is a destination; the most similar other tokens are averaged into theirs.

Source: Bolya & Hoffman 2023, arXiv:2303.17604; the matching is the `tomesd` library's own (its patcher knows U-Nets only).
Differs: acts at the joint attention of MMDiT blocks on image tokens, metric = the module's modulated input. SD3.5's second
attention shares the plan of the first. The destination pattern comes from (step, block), not from call history, so a sample
does not depend on its batch.
"""

from dataclasses import dataclass
from typing import ClassVar

from tomesd.merge import bipartite_soft_matching_random2d
from torch import Tensor

from harness.api import METHODS, Method, Run, Site, require
from harness.engine.tokens import Merge, num_kept


@METHODS.register("tomesd")
class ToMeSD(Method):
    """Token merging around the attention (default) and feed-forward branches."""

    presets: ClassVar = {"official": {"keep_ratio": 0.5}, "table1": {"keep_ratio": 0.75}}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens a reduced module computes; the library's `ratio` is 1 - keep_ratio.

        stride: side of the destination cells, in tokens; at least 1 / stride**2 of the tokens stay. ffn: reduce the
        feed-forward too, with the attention's plan (the authors leave it off). rand: random destination in each cell.
        """

        keep_ratio: float = 0.5
        stride: int = 2
        ffn: bool = False
        rand: bool = True

        def __post_init__(self) -> None:
            require(self.stride >= 2, f"tomesd.stride must be at least 2, got {self.stride}")
            floor = 1 / self.stride**2
            require(floor <= self.keep_ratio <= 1, f"tomesd.keep_ratio must lie in [{floor:g}, 1] with stride {self.stride}, got "
                    f"{self.keep_ratio}: destinations are never merged away")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sites = frozenset({"attention", "ffn"} if config.ffn else {"attention"})

    def begin(self, run: Run) -> None:
        """Refuse grids that the cells do not cover."""
        require(min(run.grid) >= self.config.stride,
                f"tomesd.stride {self.config.stride} does not fit a grid of {run.grid} tokens")

    def reduce(self, hidden_states: Tensor, site: Site) -> Merge | None:
        """hidden_states: (B, N, D), the modulated input of the module."""
        num_tokens = hidden_states.shape[1]
        kept = num_kept(self.config.keep_ratio, num_tokens)
        if kept == num_tokens:
            return None
        if "tomesd" not in site.memory:
            height, width = site.grid
            merge, unmerge = bipartite_soft_matching_random2d(
                hidden_states.float(), width, height, self.config.stride, self.config.stride, num_tokens - kept,
                no_rand=not self.config.rand, generator=site.generator())  # scores in float32: half precision ties
            site.memory["tomesd"] = Merge(merge, unmerge, kept)
        return site.memory["tomesd"]
