"""Random token drop: the control that every scored or learned method must beat.

At each block a fresh random subset of the image tokens is computed and the rest bypass it.

Source: PatchDropout, Liu et al. 2022, arXiv:2208.07220.
Differs: dropped tokens return after the block, for a denoiser must predict every token.
"""

from dataclasses import dataclass

from torch import Tensor

from harness.api import METHODS, Method, Site, require
from harness.engine.tokens import Keep, num_kept


@METHODS.register("random_drop")
class RandomDrop(Method):
    """Compute a random subset of tokens at every block of every step."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens computed, in (0, 1]; 1 is the dense model.

        first_block: reduce block 0 too. The default leaves it dense, as Shiva-DiT does, so that both spend a budget alike.
        """

        keep_ratio: float = 0.6
        first_block: bool = False

        def __post_init__(self) -> None:
            require(0 < self.keep_ratio <= 1, f"random_drop.keep_ratio must lie in (0, 1], got {self.keep_ratio}")

    def reduce(self, hidden_states: Tensor, site: Site) -> Keep | None:
        """hidden_states: (B, N, D). Keeps M = num_kept(keep_ratio, N) tokens, the same in both guided halves."""
        if site.block == 0 and not self.config.first_block:
            return None
        num_tokens = hidden_states.shape[1]
        scores = site.rand(num_tokens)  # (B, N)
        kept = scores.topk(num_kept(self.config.keep_ratio, num_tokens), dim=1).indices  # (B, M)
        return Keep(kept, num_tokens)
