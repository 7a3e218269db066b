"""First-block cache: where the first block changes little from step to step, the other blocks are not run.

The first block always runs. If what it adds to the image tokens has changed by less than a threshold since the last step that was
computed in full, the sum of what all other blocks added then stands in for them.

Source: ParaAttention's first block cache (2024), after TeaCache, Liu et al. 2024, arXiv:2411.19108; diffusers has it for other
transformers. Differs: each image decides for itself (both guided halves together), so that it does not depend on its batch; the
originals decide once for all rows. Which steps are computed depends on values, so FLOPs are counted afterwards from what was
decided, and a budget is calibrated on a few images of the training split.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.api import METHODS, Method, Reduction, Run, Site, require
from harness.engine.tokens import PerRow, Skip


@METHODS.register("first_block_cache")
class FirstBlockCache(Method):
    """All blocks of a step or the first alone, as each image needs."""

    knob = "sensitivity"
    dynamic = True
    presets: ClassVar = {"official": {"sensitivity": 0.95}}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """sensitivity: in (0, 1]. The threshold on the relative change (L1) is 1 / sensitivity - 1: 1 computes every step, 0.95
        is about the usual threshold of 0.05, 0.5 lets the first block change by as much as it adds.
        """

        sensitivity: float = 0.95

        def __post_init__(self) -> None:
            require(0 < self.sensitivity <= 1, f"first_block_cache.sensitivity must lie in (0, 1], got {self.sensitivity}")

    def begin(self, run: Run) -> None:
        """A run starts: nothing was decided yet."""
        self._last_block, self.patterns = run.num_blocks - 1, {}
        require(run.num_blocks >= 2, "first_block_cache: there is no block beside the first")
        self.reset()

    def reset(self) -> None:
        """Nothing is cached."""
        self._first: Tensor | None = None
        self._others: Tensor | None = None

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D), the input of a block; rows are [unconditional; conditional] images."""
        if self.config.sensitivity == 1:
            return None
        if site.block == 0:
            self._entered = hidden_states
            return None
        if site.block == 1:
            self._computed = self._decide(hidden_states - self._entered, site)
            self._entered = hidden_states
        last = site.block == self._last_block
        skipped, run = ([row for row, computed in enumerate(self._computed) if computed is wanted] for wanted in (False, True))
        skip = Skip(self._others[skipped] if last else None) if skipped else None
        seen = _Seen(self, run) if last else None
        if not skipped or not run:
            return skip if skipped else seen
        return PerRow([seen if computed else skip for computed in self._computed], hidden_states.shape[1])

    def _decide(self, added: Tensor, site: Site) -> list[bool]:
        """Whether each row is computed; `added` (B, N, D) is what the first block added. Computed rows become the reference."""
        halves, threshold = site.call.guidance_halves, 1 / self.config.sensitivity - 1
        num_images = added.shape[0] // halves
        if self.pattern is not None:
            computed = [self.pattern[site.step]] * num_images
        elif self._first is None:
            computed = [True] * num_images
        else:
            def size(rows: Tensor) -> Tensor:
                return rows.float().abs().mean((1, 2)).view(halves, num_images).sum(0)

            computed = (size(added - self._first) >= threshold * size(self._first)).tolist()
        if self.pattern is None:
            for seed, one in zip(site.call.seeds[:num_images].tolist(), computed, strict=True):
                self.patterns[seed] = (*(self.patterns[seed] if site.step else ()), one)
        every = computed * halves
        if self._first is None:
            self._first, self._others = added, torch.zeros_like(added)
        else:
            keep = torch.tensor(every, device=added.device)[:, None, None]
            self._first = torch.where(keep, added, self._first)
        return every

    def note(self, rows: list[int], output: Tensor) -> None:
        """Take the last block's output of computed rows (R, N, D): what all blocks but the first added."""
        index = torch.tensor(rows, device=output.device)
        self._others = self._others.index_copy(0, index, (output - self._entered.index_select(0, index)).to(self._others.dtype))


class _Seen(Reduction):
    """All tokens; the output of these rows is noted."""

    kinds = frozenset({"block"})

    def __init__(self, method: FirstBlockCache, rows: list[int]) -> None:
        self._method, self._rows = method, rows

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        self._method.note(self._rows, computed)
        return computed
