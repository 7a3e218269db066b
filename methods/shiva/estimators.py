"""Gradient estimators: how the loss reaches the inclusion probabilities while the forward pass stays hard top-k.

With z = pi - stopgrad(pi) (value 0, derivative 1), g_i = dL/dy_i at the block's output and f_i the block's residual:

=================  ===========================================  ==================  ==================
estimator          forward (its value is hard routing)          dL/dpi_i kept       dL/dpi_i rejected
=================  ===========================================  ==================  ==================
eq7                block input x(1+z); bypass x(1-z)            <dL/dx_in, x>       -<g, x>
eq7_prose          the same with the signs of appendix A.2      minus the above     minus the above
output_gate        y + z f                                      <g, f>              0
block_vs_skip      y(1+z); bypass x(1-z)                        <g, y>              -<g, x>
dense_contrast     output_gate; bypass x + z f_dense            <g, f>              <g, f_dense>
teacher_contrast   output_gate; bypass x + z f_teacher          <g, f>              <g, f_teacher>
=================  ===========================================  ==================  ==================

Source: Shiva-DiT, arXiv:2602.05605, Eq. 7, 22, 23 (`eq7`). In a pre-norm block, scaling a token before its normalisation
changes nothing after it, so `eq7` sees the block only through the residual copy; before a final norm its sign is the
opposite of the true effect (a test shows it). `dense_contrast` runs the block a second time, on every token and without
gradients; `teacher_contrast` uses the frozen teacher's residual, which distillation computes anyway. Where a rejected token
does more than bypass (see `rejected` in the method's options), f_dense and f_teacher count from what it got instead.
"""

from torch import Tensor

from harness.api import Reduction
from harness.engine.tokens import Keep

ESTIMATORS = ("eq7", "eq7_prose", "output_gate", "block_vs_skip", "dense_contrast", "teacher_contrast")


class Gated(Reduction):
    """A plan whose value is untouched by the gate z (B, N), which is zero everywhere, and whose gradient reaches it.

    teacher_residual: (B, N, D), for `teacher_contrast` alone.
    """

    kinds = frozenset({"block"})

    def __init__(self, plan: Keep, gate: Tensor, estimator: str, teacher_residual: Tensor | None = None) -> None:
        self.plan, self.estimator = plan, estimator
        self.num_tokens = plan.num_tokens
        self.wants_dense = estimator == "dense_contrast"
        self._whole = Keep(plan.indices, plan.num_total)
        self._gate = gate.unsqueeze(-1)  # (B, N, 1)
        self._residual = teacher_residual
        self._dense: Tensor | None = None
        self._selected: Tensor | None = None

    def take_dense(self, output: Tensor) -> None:
        """output (B, N, D): the block's, had it computed every token."""
        self._dense = output

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        selected = self._selected = self.plan.reduce(hidden_states)
        if self.estimator == "eq7":
            return selected * (1 + self._gate_kept())
        if self.estimator == "eq7_prose":
            return selected * (1 - self._gate_kept())
        return selected

    def restore(self, computed: Tensor, bypass: Tensor) -> Tensor:
        """(B, M, D) -> (B, N, D)."""
        gate, before = self._gate.to(computed.dtype), bypass
        if self.estimator in ("output_gate", "dense_contrast", "teacher_contrast"):
            computed = computed + self._gate_kept() * (computed - self._selected).detach()
        if self.estimator == "block_vs_skip":
            computed = computed * (1 + self._gate_kept())
        if self.estimator in ("eq7", "block_vs_skip"):
            bypass = bypass * (1 - gate)
        if self.estimator == "eq7_prose":
            bypass = bypass * (1 + gate)
        restored = self.plan.restore(computed, bypass)
        would_be = self._dense if self.wants_dense else None if self._residual is None else before + self._residual
        if would_be is None:
            return restored
        rejected = self._whole.restore(gate.new_zeros(gate.shape[0], self.num_tokens, 1), gate)
        return restored + rejected * (would_be - restored).detach()

    def positions(self) -> Tensor:
        """(M,) or (B, M)."""
        return self.plan.positions()

    def _gate_kept(self) -> Tensor:
        return self._whole.reduce(self._gate).to(self._selected.dtype)
