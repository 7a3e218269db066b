"""Compute some steps, forecast the others: the blocks' output is continued by a Taylor polynomial in the step.

On computed steps the transformer runs as it is, and what its blocks add to the image tokens is noted with its finite
differences over computed steps. On the steps between no block runs: the polynomial stands in for all of them.

Source: TaylorSeer, Liu et al. 2025, arXiv:2503.06923, Eq. 3 to 5. Differs: the authors forecast the output of each attention and
feed-forward, which the blocks' modulation then scales anew; here it is the sum of what all blocks add, one tensor per batch.
Computed steps are spread evenly over the schedule, the first always among them, where the authors compute every n-th.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from harness.api import METHODS, Method, Reduction, Run, Site, require
from harness.engine.tokens import Skip


@METHODS.register("taylor_forecast")
class TaylorForecast(Method):
    """A step cache: all blocks of a step, or none."""

    presets: ClassVar = {"official": {"keep_ratio": 0.2, "order": 4}}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: fraction of the steps that are computed, in (0, 1], rounded to whole steps. order: of the polynomial; 0
        repeats the last computed step.
        """

        keep_ratio: float = 0.6
        order: int = 1

        def __post_init__(self) -> None:
            require(0 < self.keep_ratio <= 1, f"taylor_forecast.keep_ratio must lie in (0, 1], got {self.keep_ratio}")
            require(self.order >= 0, f"taylor_forecast.order must not be negative, got {self.order}")

    def begin(self, run: Run) -> None:
        """Spread the computed steps."""
        count = max(1, round(self.config.keep_ratio * run.num_steps))
        self._computed = {index * run.num_steps // count for index in range(count)}
        self._last_block = run.num_blocks - 1
        self.reset()

    def reset(self) -> None:
        """No step was computed yet."""
        self._differences: list[Tensor] = []
        self._step = 0

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D), the input of a block."""
        if self.config.keep_ratio == 1:
            return None
        if site.step not in self._computed:
            return Skip(self._forecast(site.step) if site.block == self._last_block else None)
        if site.block == 0:
            self._entered = hidden_states
        return _Seen(self, site.step) if site.block == self._last_block else None

    def note(self, step: int, output: Tensor) -> None:
        """Take the last block's output (B, N, D) of a computed step into the differences."""
        new, distance = [output - self._entered], step - self._step
        for old in self._differences[: self.config.order]:
            new.append((new[-1] - old) / distance)
        self._differences, self._step = new, step

    def _forecast(self, step: int) -> Tensor:
        distance = step - self._step
        return sum(term * (distance**order / math.factorial(order)) for order, term in enumerate(self._differences))


class _Seen(Reduction):
    """All tokens; the output is noted."""

    kinds = frozenset({"block"})

    def __init__(self, method: TaylorForecast, step: int) -> None:
        self._method, self._step = method, step

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        self._method.note(self._step, computed)
        return computed
