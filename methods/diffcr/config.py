"""The options of DiffCR."""

from dataclasses import dataclass
from typing import Literal

from harness.api import require


@dataclass(frozen=True, kw_only=True)
class DiffCRConfig:
    """keep_ratio: target of the mean ratio, from the lowest bin to 1. regions: of timesteps with ratios of their own; 4 is
    the authors' LT, 1 their L. bin_step: distance of the bins, the lowest of which it is too; a whole number of them makes 1.
    gate_scope: what the gate scales, the feed-forward (their code) or all that the block adds (their text). gate_norm: divide
    the gate by its own value, so that it only carries gradients. ratio_weight: of the penalty on the mean ratio. router_lr,
    ratio_lr: learning rates. distill: add the protocol's distillation.
    """

    keep_ratio: float = 0.8
    regions: int = 4
    bin_step: float = 0.1
    gate_scope: Literal["ffn", "residual"] = "ffn"
    gate_norm: bool = False
    ratio_weight: float = 0.3
    router_lr: float = 1e-4
    ratio_lr: float = 1e-4
    distill: bool = False

    def __post_init__(self) -> None:
        require(0 < self.bin_step <= 0.5 and abs(self.num_bins * self.bin_step - 1) < 1e-3,
                f"diffcr.bin_step must divide 1 into at least two equal bins, as 0.1 or 0.25 do, got {self.bin_step}")
        require(self.bin_step <= self.keep_ratio <= 1,
                f"diffcr.keep_ratio must lie in [{self.bin_step}, 1], the bins' range, got {self.keep_ratio}")
        require(self.regions >= 1, f"diffcr.regions must be at least 1, got {self.regions}")
        require(self.ratio_weight >= 0, f"diffcr.ratio_weight must not be negative, got {self.ratio_weight}")

    @property
    def num_bins(self) -> int:
        """Bins from `bin_step` to 1."""
        return round(1 / self.bin_step)
