"""SparseDiT: pooling blocks, then modules that work on few pooled tokens and recover the full sequence.

A module's generation block lets pooled tokens attend to all, sparse blocks work on them alone, its recovery block lets all tokens
attend to them. Every block runs with its own pretrained weights; the recovery's two matrices are new. More tokens later in
sampling.

Source: Chang et al. 2025 (NeurIPS), arXiv:2412.06028, from descriptions (the release has no licence and no schedule). On joint
blocks (SD3): text is dense in every block and part of every attention.
Differs: adapters and the two new matrices train, not the whole model. The schedule's range is set by `swing` around the mean that
is asked for; a training step pools as the sampling step nearest to its noise level. Pooled grids need not be square, nor divide
the grid (adaptive pooling). Positions are not added again, as in the released code. keep_ratio 1 leaves the model alone, although
a module of full size would not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.api import METHODS, Reduction, Run, Site, Stage, TrainableMethod, require
from methods.sparsedit.attention import CrossAttention, MeanAttention
from methods.sparsedit.layout import check_letters, layout_of, pool_sizes
from methods.sparsedit.resized import Generation, MergeBack, Recovery


@METHODS.register("sparsedit")
class SparseDiT(TrainableMethod, nn.Module):
    """A static re-arrangement of the blocks; nothing is routed."""

    sites = frozenset({"block", "attention"})
    stages = (Stage("joint", share=1.0, adapters=True, one_timestep=True),)
    needs_teacher = False
    distils = False
    of_depth = ("layout",)
    presets: ClassVar = {"official": {"keep_ratio": 0.25},
                         "table1": {"keep_ratio": 0.25, "swing": 0.0, "layout": "P" + 3 * "GSRDDD" + "DDDDD"}}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: pooled tokens over all, mean over the steps. layout: a letter per block, see `layout`; None for one that
        fits the depth. swing: how much more than the mean the last steps have, over how much less the first; 0 is the same number
        at every step, 1 is about the authors' 6 x 6 to 10 x 10 of 16 x 16. merge_lr: of the recovery's matrices.
        """

        keep_ratio: float = 0.25
        layout: str | None = None
        swing: float = 1.0
        merge_lr: float = 1e-4

        def __post_init__(self) -> None:
            require(0 < self.keep_ratio <= 1, f"sparsedit.keep_ratio must lie in (0, 1], got {self.keep_ratio}")
            require(0 <= self.swing <= 2, f"sparsedit.swing must lie in [0, 2], got {self.swing}")
            if self.layout is not None:
                check_letters(self.layout)

    _dense: Tensor | None = None
    """What came into the generation block, until the recovery of its module takes it."""

    def begin(self, run: Run) -> None:
        """Refuse backbones whose blocks it cannot re-arrange."""
        require(run.attention != "rotary", "sparsedit: pooled tokens have no positions of their own, so it cannot run on a "
                f"backbone with rotary positions such as '{run.backbone}'")
        require(run.attention == "joint", f"sparsedit: it needs blocks of joint attention, and '{run.backbone}' has none")
        super().begin(run)

    def build(self, run: Run) -> None:
        """The recovery's matrices."""
        self.layout = layout_of(self.config.layout, run.num_blocks)
        self.merge = nn.ModuleList(MergeBack(run.width) for _ in range(self.layout.count("R")))

    def tabulate(self) -> None:
        """The pooled grids of this schedule."""
        self.sizes = pool_sizes(self.run, self.config.keep_ratio, self.config.swing)

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D), or (B, M, D) between generation and recovery."""
        if self.config.keep_ratio == 1:
            return None
        letter = self.layout[site.block]
        if site.kind == "attention":
            if letter == "P":
                return MeanAttention()
            keys = site.memory.get("keys", {}).get(site.module)
            return None if keys is None else CrossAttention(keys)
        if letter == "G":
            self._dense = hidden_states  # until the recovery of this module, in the same call, and no longer: it holds a graph
            return Generation(self._size(site), site)
        if letter == "R":
            dense, self._dense = self._dense, None
            return Recovery(self.merge[self.layout[: site.block].count("R")], dense, self._size(site), site)
        return None

    def _size(self, site: Site) -> tuple[int, int]:
        if not site.call.training:
            return self.sizes[site.step]
        level = float(site.call.timestep[0])  # the batch has one; a shifted schedule spaces its steps' levels unevenly
        return min(zip(self.run.timesteps, self.sizes, strict=True), key=lambda step: abs(step[0] - level))[1]

    def start_stage(self, stage: str, generator: torch.Generator) -> list[dict[str, Any]]:
        """The recovery's matrices, in full."""
        return [{"params": list(self.merge.parameters()), "lr": self.config.merge_lr, "name": "merge", "weight_decay": 0.0}]
