"""What training does beyond inference: drawn ratios, noise on ratios and scores, and temperatures that fall.

Source: Shiva-DiT, arXiv:2602.05605, sections 3.4 and 3.5, appendix A.2 (Eq. 29) and A.4.
Differs: end temperatures, the spread of the score noise and the range of stage 1 are not in the paper. With one k per block and
batch, the strata of stage 1 are visited by successive steps; half of its draws share one ratio among all blocks, as no policy
does later, the other half draw one each.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from methods.shiva.config import ShivaConfig


class Exploration:
    """The random and scheduled quantities of one stage; all randomness comes from `generator`."""

    def __init__(self, config: ShivaConfig, stage: str, num_routed: int, generator: torch.Generator) -> None:
        self.config, self.stage, self.num_routed, self.generator = config, stage, num_routed, generator
        self.rank, self.num_ranks = 0, 1
        self.draws = 0

    def temperatures(self, progress: float) -> tuple[float, float]:
        """(tau_rank, tau_sel): a cosine over the first two stages, then held."""
        done = {"router": progress / 2, "policy": 0.5 + progress / 2}.get(self.stage, 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return tuple(end + (start - end) * fall for start, end in (self.config.tau_rank, self.config.tau_sel))

    @property
    def score_noise(self) -> float:
        """Spread of the noise on standardised scores."""
        return 0.0 if self.stage == "joint" else self.config.score_noise

    def warm_up_ratios(self, rows: int) -> Tensor:
        """(rows, routed blocks) keep ratios of stage 1."""
        low, high = self.config.ratio_range

        def draw(count: int) -> Tensor:
            uniform = self._strata(count) if self.config.ratio_sampling == "stratified" else \
                torch.rand(count, self.num_routed, generator=self.generator)
            return low + (high - low) * uniform

        return self._own(draw, rows)

    def logit_noise(self, logits: Tensor) -> Tensor:
        """Noise like `logits` (rows, routed blocks), independent per row and block; stage 2 only (Eq. 29)."""
        if self.stage != "policy" or self.config.logit_noise == 0:
            return torch.zeros_like(logits)
        noise = self._own(lambda count: torch.randn(count, self.num_routed, generator=self.generator), logits.shape[0])
        return self.config.logit_noise * noise.to(logits.device)

    def _own(self, draw: Callable[[int], Tensor], rows: int) -> Tensor:
        """This process's rows of a draw for the global batch; with one k for all rows, every process takes the same."""
        if self.config.k_mode == "shared":
            return draw(rows)
        return draw(rows * self.num_ranks)[self.rank * rows:(self.rank + 1) * rows]

    def _strata(self, rows: int) -> Tensor:
        """(rows, routed blocks) in [0, 1): rows and steps go through disjoint intervals."""
        strata = self.config.ratio_strata
        shared = bool(torch.rand((), generator=self.generator) < 0.5)
        count = 1 if shared else self.num_routed
        first = self.draws
        self.draws += rows
        order = torch.randperm(rows, generator=self.generator) if rows > 1 else torch.zeros(1, dtype=torch.int64)
        stratum = (torch.arange(count)[None] + first + order[:, None] + 1) % strata
        if not shared:
            stratum = stratum[:, torch.randperm(count, generator=self.generator)]
        return ((stratum + torch.rand(rows, count, generator=self.generator)) / strata).expand(rows, self.num_routed)

    def state(self) -> dict[str, Any]:
        """What a resumed training needs beside the generator."""
        return {"draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.draws = state["draws"]
