"""Gradient estimators: how the loss reaches the inclusion probabilities while the forward pass stays hard top-k.

With z = pi - stopgrad(pi) (value 0, derivative 1), g_i = dL/dy_i at the block's output and f_i the block's residual:

=================  ===========================================  ==================  ==================
estimator          forward (its value is hard routing)          dL/dpi_i kept       dL/dpi_i rejected
=================  ===========================================  ==================  ==================
eq7                block input x(1+z); bypass x(1-z)            <dL/dx_in, x>       -<g, x>
eq7_prose          the same with the signs of appendix A.2      minus the above     minus the above
output_gate        y + z f                                      <g, f>              0
block_vs_skip      y(1+z); bypass x(1-z)                        <g, y>              -<g, x>
teacher_contrast   output_gate; bypass x + z f_teacher          <g, f>              <g, f_teacher>
=================  ===========================================  ==================  ==================

Source: Shiva-DiT, arXiv:2602.05605, Eq. 7, 22, 23 (`eq7`). In a pre-norm block, scaling a token before its normalisation
changes nothing after it, so `eq7` sees the block only through the residual copy; before a final norm its sign is the
opposite of the true effect (a test shows it). `teacher_contrast` uses the frozen teacher's residual, which distillation
computes anyway.
"""

from torch import Tensor

from harness.tokens import Keep

ESTIMATORS = ("eq7", "eq7_prose", "output_gate", "block_vs_skip", "teacher_contrast")


class GatedKeep(Keep):
    """Hard selection whose value is untouched by the gate `z` (B, N), which is zero everywhere."""

    def __init__(self, indices: Tensor, num_total: int, gate: Tensor, estimator: str, teacher_residual: Tensor | None) -> None:
        super().__init__(indices, num_total)
        self.estimator = estimator
        self.gate = gate.unsqueeze(-1)  # (B, N, 1)
        self.teacher_residual = teacher_residual  # (B, N, D)
        self._selected: Tensor | None = None

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        selected = super().reduce(hidden_states)
        self._selected = selected
        if self.estimator == "eq7":
            return selected * (1 + self._gate_kept())
        if self.estimator == "eq7_prose":
            return selected * (1 - self._gate_kept())
        return selected

    def restore(self, computed: Tensor, bypass: Tensor) -> Tensor:
        """(B, M, D) -> (B, N, D)."""
        gate = self.gate.to(computed.dtype)
        if self.estimator in ("output_gate", "teacher_contrast"):
            residual = (computed - self._selected).detach()
            computed = computed + self._gate_kept() * residual
        if self.estimator == "block_vs_skip":
            computed = computed * (1 + self._gate_kept())
        if self.estimator in ("eq7", "block_vs_skip"):
            bypass = bypass * (1 - gate)
        if self.estimator == "eq7_prose":
            bypass = bypass * (1 + gate)
        if self.estimator == "teacher_contrast":
            bypass = bypass + gate * self.teacher_residual
        return super().restore(computed, bypass)

    def _gate_kept(self) -> Tensor:
        return Keep.reduce(self, self.gate).to(self._selected.dtype)
