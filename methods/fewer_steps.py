"""The dense model with fewer sampling steps: what the compute that a token method costs buys without one.

The scheduler spreads the smaller number of steps over the same range of noise. At an equal budget this is the control that
every speed-up must beat first, for it needs neither code in the model nor training.

Source: none; a control of ours. Differs: nothing to differ from. Errors at the dense model's own steps are not defined for it.
"""

from dataclasses import dataclass

from harness.api import METHODS, Method, require


@METHODS.register("fewer_steps")
class FewerSteps(Method):
    """Every token of every block, in fewer steps."""

    sites = frozenset()
    knob = "step_ratio"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """step_ratio: fraction of the sampler's steps that are taken, in (0, 1], rounded to whole steps; 1 is the dense model."""

        step_ratio: float = 0.6

        def __post_init__(self) -> None:
            require(0 < self.step_ratio <= 1, f"fewer_steps.step_ratio must lie in (0, 1], got {self.step_ratio}")

    def num_steps(self, asked: int) -> int:
        """At least one step."""
        return max(1, round(self.config.step_ratio * asked))
