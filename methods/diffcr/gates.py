"""DiffCR's gate: on the feed-forward of the tokens that a block computes, or on all that the block adds to them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.api import Reduction
from harness.engine.tokens import Keep


def gate_of(scores: Tensor, normalised: bool) -> Tensor:
    """(B, N, 1) sigmoid of scores (B, N). normalised: g / stopgrad(g), which is 1 and has the gradient of log g."""
    if not normalised:
        return torch.sigmoid(scores).unsqueeze(-1)
    log_gate = F.logsigmoid(scores).unsqueeze(-1)  # g itself is 0 in float32 below a score of -104, and 0 / 0 no gate
    return 1 + (log_gate - log_gate.detach())


class GatedKeep(Keep):
    """Keep that leaves the gate (B, M, 1) of its tokens in `memory` as 'gate', for the feed-forward site of its block to take.

    Where no such site takes it, it scales all that the block adds to its tokens.
    """

    kinds = frozenset({"block"})

    def __init__(self, indices: Tensor, num_total: int, gate: Tensor, memory: dict[str, Any]) -> None:
        super().__init__(indices, num_total)
        self._gate, self._memory = gate, memory

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        self._kept_gate, self._selected = super().reduce(self._gate), super().reduce(hidden_states)
        self._memory["gate"] = self._kept_gate
        return self._selected

    def execute(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block itself. A block that is run again in the backward pass comes through here too and finds its own gate."""
        self._memory["gate"] = self._kept_gate
        return forward(*args, **kwargs)

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D)."""
        gate = self._memory.pop("gate", None)
        if gate is not None:
            computed = self._selected + (computed - self._selected) * gate.to(computed.dtype)
        return super().restore(computed, bypass)


class Gate(Reduction):
    """Every token is computed, and its output scaled by gate (B, M, 1)."""

    def __init__(self, gate: Tensor) -> None:
        self._gate = gate

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D), scaled."""
        return computed * self._gate.to(computed.dtype)
