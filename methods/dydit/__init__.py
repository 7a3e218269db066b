"""DyDiT: attention heads and feed-forward channels that the timestep switches, tokens that skip the feed-forward.

Source: Zhao et al. 2025, arXiv:2410.03456 (ICLR 2025), and the behaviour of its released code, which has no licence. On joint
blocks (SD3): image heads only, text stays whole; SD3.5's second attention shares the heads of the first.
Differs: at sampling the number of tokens of each (step, block) is fixed to what training saw on average at that noise level, and
the highest logits are taken, shared by guided halves; the authors threshold each image at 0, so that neither FLOPs nor shapes
are known before. Heads and groups are read at the noise level's embedding of the training. The token router sees the
feed-forward's own input, which is normalised. One guarded optimiser step, as everywhere here. To meet a FLOPs budget exactly, one
number is added to every logit at export. Text and modulation are outside the FLOPs loss. keep_ratio 1 leaves the model alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.api import METHODS, Reduction, Run, Site, Stage, TrainableMethod, require
from harness.engine.tokens import num_kept, top_indices
from methods.dydit.gates import FlopsLoss, Gates, Schedule, hard_gate
from methods.dydit.narrow import MaskedFeedForward, NarrowAttention, NarrowFeedForward


@METHODS.register("dydit")
class DyDiT(TrainableMethod, nn.Module):
    """Timestep-wise width and spatial-wise tokens, held at a mean cost."""

    sites = frozenset({"attention", "ffn"})
    stages = (Stage("joint", share=1.0, adapters=True),)
    needs_teacher = False
    presets: ClassVar = {"official": {"keep_ratio": 0.7}, "table1": {"keep_ratio": 0.8}}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """keep_ratio: the target lambda, of the FLOPs of attention and feed-forward of image tokens. Before training all tokens
        and heads are thinned to it alike. flops_weight: of the loss on it. hold, ramp: shares of the training during which the
        target stays at 1, and goes down to lambda. complete: a second pass with open gates in each step, as the authors do at
        first. width_bias, token_bias: where logits start; the authors' 15 and 35 need their tens of thousands of steps. tau: of
        the relaxed gates. router_lr: learning rate. distill: add the protocol's distillation, which the released code has not.
        """

        keep_ratio: float = 0.7
        flops_weight: float = 2.0
        hold: float = 0.01
        ramp: float = 0.05
        complete: bool = True
        width_bias: float = 15.0
        token_bias: float = 35.0
        tau: float = 5.0
        router_lr: float = 1e-4
        distill: bool = False

        def __post_init__(self) -> None:
            require(0 < self.keep_ratio <= 1, f"dydit.keep_ratio must lie in (0, 1], got {self.keep_ratio}")
            require(self.tau > 0, f"dydit.tau must be positive, got {self.tau}")
            for name in ("hold", "ramp"):
                require(0 <= getattr(self, name) <= 1, f"dydit.{name} must lie in [0, 1], got {getattr(self, name)}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.distils, self.num_passes = config.distill, 2 if config.complete else 1
        self._complete = self._validating = False

    def begin(self, run: Run) -> None:
        """Refuse backbones without heads to switch."""
        require(run.num_heads >= 2, f"dydit: backbone '{run.backbone}' has no blocks whose attention heads could be switched")
        super().begin(run)

    def build(self, run: Run) -> None:
        """Routers, and what they will have seen."""
        config = self.config
        self.gates = nn.ModuleList(Gates(run, config.width_bias, config.token_bias) for _ in range(run.num_blocks))
        self.schedule = Schedule(run.num_blocks, run.width)

    def tabulate(self) -> None:
        """[step][block]: active heads, active groups, number of tokens."""
        shift = self.fitted["shift"] if self.fitted else 0.0
        self.plan = self.schedule.plan(self.gates, self.run, self.config.keep_ratio, shift)

    def fit_budget(self, cut: Callable[[], float], flops_cut: float) -> dict[str, float]:
        """Bisect the number added to every logit until the executed cut is as near `flops_cut` as whole parts allow."""
        def executed(shift: float) -> float:
            self.load_fit({"shift": shift})
            return cut()

        low, high, found = -60.0, 60.0, {}
        for _ in range(14):
            middle = (low + high) / 2
            found[middle] = executed(middle)
            low, high = (middle, high) if found[middle] >= flops_cut else (low, middle)
        fitted = {"shift": min(found, key=lambda shift: abs(found[shift] - flops_cut))}
        self.load_fit(fitted)
        return fitted

    # ------------------------------------------------------------------------------------------ at a site

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D), the input of an attention or a feed-forward."""
        if self.config.keep_ratio == 1 or self._complete:
            return None
        if site.call.training:
            return self._masked(hidden_states, site)
        heads, groups, ratio = self.plan[site.step][site.block]
        num_tokens = hidden_states.shape[1]
        if site.kind == "attention":
            return None if len(heads) == self.run.num_heads else NarrowAttention(heads)
        count = num_kept(ratio, num_tokens)
        if count == num_tokens and len(groups) == self.run.num_heads:
            return None
        logits = site.memory["scores"] = self.gates[site.block].tokens(hidden_states.float()).squeeze(-1)
        kept = top_indices(logits, count, site.call.guidance_halves)
        return NarrowFeedForward(kept, num_tokens, groups, self.run.num_heads)

    def _masked(self, hidden_states: Tensor, site: Site) -> Reduction:
        gates, num_heads, num_tokens = self.gates[site.block], self.run.num_heads, hidden_states.shape[1]
        if "heads" not in site.memory:  # drawn once for the block, whose second attention shares them
            embedding = site.call.time_embedding.detach().float()
            noise = None if self._validating else site.rand(2 * (num_heads - 1) + num_tokens).split(
                [num_heads - 1, num_heads - 1, num_tokens], dim=1)
            site.memory["noise"] = noise
            for index, name in enumerate(("heads", "groups")):
                gate = hard_gate(getattr(gates, name)(embedding), None if noise is None else noise[index], self.config.tau)
                site.memory[name] = torch.cat([torch.ones_like(gate[:, :1]), gate], dim=1)
            if not self._validating:
                self.schedule.note_embedding(site.call.timestep, embedding)
        if site.kind == "attention":
            return NarrowAttention(mask=site.memory["heads"])
        noise = site.memory["noise"]
        tokens = hard_gate(gates.tokens(hidden_states.detach().float()).squeeze(-1), None if noise is None else noise[2],
                           self.config.tau)
        if not self._validating:
            self.schedule.note_tokens(site.block, site.call.timestep, tokens.detach().mean(1))
        self._loss.add(site.memory["heads"], site.memory["groups"], tokens)
        return MaskedFeedForward(site.memory["groups"], tokens)

    # ------------------------------------------------------------------------------------------ training

    def stage_buffers(self) -> dict[str, Tensor]:
        """What the schedule saw."""
        return {f"schedule.{name}": value for name, value in self.schedule.named_buffers()}

    def start_stage(self, stage: str, generator: torch.Generator) -> list[dict[str, Any]]:
        """The routers."""
        self._complete = False
        return [{"params": list(self.gates.parameters()), "lr": self.config.router_lr, "name": "router", "weight_decay": 0.0}]

    def start_step(self, progress: float, level: Tensor, validating: bool = False) -> None:
        """The target goes from 1 to lambda."""
        config = self.config
        down = min(max((progress - config.hold) / max(config.ramp, 1e-9), 0.0), 1.0)
        self._loss = FlopsLoss(self.run, 1 + down * (config.keep_ratio - 1), config.flops_weight)
        self._validating = validating

    def start_pass(self, index: int) -> None:
        """Pass 0 is gated, pass 1 complete."""
        self._complete = index == 1

    def losses(self) -> dict[str, Tensor]:
        """The FLOPs loss of the gated pass."""
        self._complete, loss = False, self._loss
        del self._loss  # it holds the graph of this step
        return {"flops": loss.value()}
