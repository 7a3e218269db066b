"""Keep the tokens with the largest norm: the simplest score without training, a control for learned ones.

At each block the tokens whose hidden states have the largest Euclidean norm are computed and the rest bypass it.

Source: none; a magnitude score of our own. Differs: nothing to differ from, it is in no table of the literature.
"""

from dataclasses import dataclass

from torch import Tensor

from harness.api import METHODS, Method, Site, require
from harness.engine.tokens import Keep, num_kept, top_indices


@METHODS.register("norm_topk")
class NormTopK(Method):
    """Compute the tokens whose hidden states are largest, at every block of every step."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens computed, in (0, 1]; 1 is the dense model.

        first_block: reduce block 0 too. The default leaves it dense, as random_drop and Shiva-DiT do.
        """

        keep_ratio: float = 0.6
        first_block: bool = False

        def __post_init__(self) -> None:
            require(0 < self.keep_ratio <= 1, f"norm_topk.keep_ratio must lie in (0, 1], got {self.keep_ratio}")

    def reduce(self, hidden_states: Tensor, site: Site) -> Keep | None:
        """hidden_states: (B, N, D). Keeps M = num_kept(keep_ratio, N) tokens, the same in both guided halves."""
        if site.block == 0 and not self.config.first_block:
            return None
        num_tokens = hidden_states.shape[1]
        scores = hidden_states.float().norm(dim=-1)
        site.memory["scores"] = scores
        kept = top_indices(scores, num_kept(self.config.keep_ratio, num_tokens), site.call.guidance_halves)
        return Keep(kept, num_tokens)
