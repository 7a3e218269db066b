"""DiffCR's gate: on the feed-forward of the tokens that a block computes, or on all that the block adds to them."""

from typing import Any

import torch
from torch import Tensor

from harness.api import Reduction
from harness.tokens import Keep


class GatedKeep(Keep):
    """Keep that hands the gate (B, N, 1) of its tokens to the feed-forward through `memory`, or scales the residual itself."""

    def __init__(self, indices: Tensor, num_total: int, gate: Tensor, memory: dict[str, Any] | None) -> None:
        super().__init__(indices, num_total)
        self._gate, self._memory = gate, memory

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        self._kept_gate, self._selected = super().reduce(self._gate), super().reduce(hidden_states)
        if self._memory is not None:
            self._memory["gate"] = self._kept_gate
        return self._selected

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D)."""
        if self._memory is None:
            computed = self._selected + (computed - self._selected) * self._kept_gate.to(computed.dtype)
        return super().restore(computed, bypass)


class Gate(Reduction):
    """Every token is computed, and its output scaled by gate (B, M, 1)."""

    def __init__(self, gate: Tensor) -> None:
        self._gate, self.num_tokens = gate, gate.shape[1]

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """All of them."""
        return hidden_states

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D), scaled."""
        return computed * self._gate.to(computed.dtype)

    def positions(self) -> Tensor:
        """(M,)."""
        return torch.arange(self.num_tokens, device=self._gate.device)
