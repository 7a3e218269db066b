"""The token budget: what a schedule costs, and the losses that hold its mean at the target in training.

Source: Shiva-DiT, arXiv:2602.05605, Eq. 12 and 13 (`ema`); DiffCR, You et al. 2025, arXiv:2412.16822 (`batch`).
Differs: taken on noise-free ratios, because N(0, 1) noise before the sigmoid shifts the mean (a noisy mean of 0.8 is a
noise-free 0.839). The paper's loss is a proportional controller, which settles where the task's pull on the ratios balances
it; `integral` is the term that removes that offset.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from harness.api import Run


def mean_cost(ratios: Tensor, unit: str, run: Run) -> Tensor:
    """Mean over the last dimension of what keep ratios in (0, 1] cost, as a fraction of computing everything.

    unit: 'tokens', or 'flops': of a block with four projections, a feed-forward of four times the width and self-attention
    among the kept image tokens, 24 M D^2 + 4 M^2 D. (Text tokens, which are never dropped, are left out; a FLOPs cut asked of
    the harness is met by counting, whatever the unit here.)
    """
    if unit == "flops":
        linear, attention = 24 * run.width, 4 * run.num_tokens
        ratios = (linear * ratios + attention * ratios**2) / (linear + attention)
    return ratios.mean(-1)


class BudgetLoss:
    """Pushes the mean cost of a batch towards `target`. beta weighs the new sample of the average mu, which starts at the first.

    kind: 'ema', weight * mean * stopgrad(2 (mu - target)); 'batch', weight * (mean - target)^2. integral: weight of the summed
    error, added to either. synchronise: the mean of a detached value over all ranks.
    """

    def __init__(self, target: float, weight: float, beta: float, kind: str = "ema", integral: float = 0.0) -> None:
        self.target, self.weight, self.beta, self.kind, self.integral = target, weight, beta, kind, integral
        self.mean: float | None = None
        self.summed = 0.0

    def __call__(self, mean_cost: Tensor, synchronise: Callable[[Tensor], Tensor] = lambda value: value) -> Tensor:
        """The loss of one batch from its mean cost; updates mu and the sum first."""
        value = float(synchronise(mean_cost.detach()))
        self.mean = value if self.mean is None else self.beta * value + (1 - self.beta) * self.mean
        self.summed += value - self.target
        error = self.mean if self.kind == "ema" else value
        return mean_cost * (2 * self.weight * (error - self.target) + self.integral * self.summed)

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"budget_mean": self.mean, "budget_summed": self.summed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.mean, self.summed = state["budget_mean"], state["budget_summed"]
