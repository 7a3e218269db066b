"""Scores from the true residual norm: which tokens a block would change most, asked of the block itself.

Each block first runs on every token; the tokens whose hidden states it would move farthest are then computed, and the rest
bypass it. That costs more than it saves: a control, not a method. It bounds what a score of a token's own change can reach, so
that a learned router has something to be measured against from above as random_drop is from below.

Source: the heuristic `|f|` of the estimator literature; a control of ours. Differs: nothing to differ from.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.api import METHODS, Method, Reduction, Site, require
from harness.engine.tokens import Keep, num_kept, top_indices


@METHODS.register("oracle")
class Oracle(Method):
    """Compute the tokens that the block would change most, at every block of every step."""

    uncounted = "the dense pass of each block that scores"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of tokens computed, in (0, 1]; 1 is the dense model. first_block: reduce block 0 too."""

        keep_ratio: float = 0.6
        first_block: bool = False

        def __post_init__(self) -> None:
            require(0 < self.keep_ratio <= 1, f"oracle.keep_ratio must lie in (0, 1], got {self.keep_ratio}")

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D). Keeps M = num_kept(keep_ratio, N) tokens, the same in both guided halves."""
        if self.config.keep_ratio == 1 or (site.block == 0 and not self.config.first_block):
            return None
        num_tokens = hidden_states.shape[1]
        return _MostChanged(hidden_states, num_kept(self.config.keep_ratio, num_tokens), site.call.guidance_halves, site.memory)


class _MostChanged(Reduction):
    """Keeps the `num_tokens` rows of hidden_states (B, N, D) that the dense output is farthest from."""

    kinds = frozenset({"block"})
    wants_dense = True

    def __init__(self, hidden_states: Tensor, num_tokens: int, halves: int, memory: dict[str, Any]) -> None:
        self.num_tokens, self._hidden_states, self._halves, self._memory = num_tokens, hidden_states, halves, memory

    def take_dense(self, output: Tensor) -> None:
        """output: (B, N, D)."""
        scores = self._memory["scores"] = (output - self._hidden_states).float().norm(dim=-1)
        self._keep = Keep(top_indices(scores, self.num_tokens, self._halves), output.shape[1])

    def reduce(self, hidden_states: Tensor) -> Tensor:
        return self._keep.reduce(hidden_states)

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        return self._keep.restore(computed, bypass)

    def positions(self) -> Tensor:
        return self._keep.positions()
