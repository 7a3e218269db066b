"""Shiva-DiT: residual-based differentiable top-k token selection under a strict token budget.

A router scores the image tokens of each block; a ratio policy gives each (timestep, block) its keep ratio; exactly k tokens
run through the block and the rest pass by its residual. Trained in three stages on a frozen backbone, adapters in the last.

Source: Shiva-DiT, arXiv:2602.05605v1. The parts: `config` (every axis), `surrogates` and `soft_topk` (Eq. 5, 6, 30),
`estimators` (Eq. 7 and its alternatives), `router` (Eq. 8, 9, 32), `policy` (Eq. 10, 11), `budget` (Eq. 12, 13),
`exploration` (Eq. 29, temperatures, stage 1).
Differs: the default gradient estimator is `teacher_contrast`; the paper's literal one is `estimator: eq7`. At export the
policy's anchor is shifted so that the look-up table meets the budget exactly on the inference grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.api import METHODS, Reduction, Run, Site, Stage, TrainableMethod, require
from harness.engine.tokens import AbsorbKeep, CachedKeep, Keep, PerRow, num_kept, top_indices
from methods.shiva.budget import BudgetLoss, mean_cost
from methods.shiva.config import ShivaConfig, training_options
from methods.shiva.estimators import Gated
from methods.shiva.exploration import Exploration
from methods.shiva.policy import HAND_MADE, RatioPolicy, nearest_root
from methods.shiva.router import RouterBank, num_routers
from methods.shiva.soft_topk import standardise
from methods.shiva.surrogates import inclusion, perturbation


@METHODS.register("shiva")
class Shiva(TrainableMethod, nn.Module):
    """Router, ratio policy and budget around every block but the first."""

    Config = ShivaConfig

    def __init__(self, config: ShivaConfig) -> None:
        super().__init__(config)
        self.table: list[list[int]] = []
        self._cached: dict[int, CachedKeep] = {}

    # ------------------------------------------------------------------------------------------ a run

    def build(self, run: Run) -> None:
        """Routers and ratio policy."""
        config = self.config
        self.first = 0 if config.first_block else 1
        self.num_routed = run.num_blocks - self.first
        require(self.num_routed >= 1, f"shiva: the backbone has {run.num_blocks} blocks and block 0 is never reduced")
        self.routers = RouterBank(run.num_blocks, num_routers(config.router_groups, run.num_blocks),
                                  (run.width, run.width, run.pooled_width), config)
        self.policy = RatioPolicy(config.ratio_policy, self.num_routed, config.keep_ratio)

    def tabulate(self) -> None:
        """k[step][routed block]: after the shift that was fitted to a budget, or else with the mean cost equal to the target."""
        if self.config.keep_ratio == 1:
            self.table = [[self.run.num_tokens] * self.num_routed for _ in self.run.timesteps]
            return
        if self.fitted:
            self.policy.shift.fill_(self.fitted["shift"])
        elif self.config.ratio_policy != "fixed":
            target = self._target()

            def excess(shift: float) -> float:
                self.policy.shift.fill_(shift)
                return float(mean_cost(self.ratios().flatten(), self.config.budget_unit, self.run)) - target

            self.policy.shift.fill_(nearest_root(excess, 0.0, tolerance=1e-7))
        self.table = [[self._num_kept(ratio) for ratio in row] for row in self.ratios().tolist()]

    def reset(self) -> None:
        """Forget the residuals of the previous batch of images."""
        self._cached = {}

    def ratios(self) -> Tensor:
        """(steps, routed blocks) keep ratios on the inference grid, after the shift that meets the target."""
        levels = torch.tensor(self.run.timesteps, dtype=torch.float32, device=self.policy.anchor.device)
        with torch.no_grad():
            return self.policy(levels)

    def fit_budget(self, cut: Callable[[], float], flops_cut: float) -> dict[str, float]:
        """Shift the anchor until `cut()`, the executed fraction of FLOPs saved, is as near `flops_cut` as tokens allow."""
        def modelled(shift: float) -> float:
            self.load_fit({"shift": shift})
            return 1 - float(mean_cost(torch.tensor(self.table).flatten() / self.run.num_tokens, "flops", self.run))

        # counting takes seconds, the blocks' formula nothing; over schedules the one is nearly a straight line of the other
        shift, goal, points = float(self.policy.shift), flops_cut, []
        for _ in range(6):
            shift = nearest_root(lambda trial, goal=goal: goal - modelled(trial), shift, tolerance=1e-6)
            points.append((modelled(shift), cut(), shift))
            formula, counted, _ = points[-1]
            if abs(counted - flops_cut) < 1e-4 or (len(points) > 1 and formula == points[-2][0]):
                break
            slope = counted / formula if len(points) == 1 else (counted - points[-2][1]) / (formula - points[-2][0])
            goal = formula + (flops_cut - counted) / slope
        fitted = {"shift": min(points, key=lambda point: abs(point[1] - flops_cut))[2]}
        self.load_fit(fitted)
        return fitted

    def _target(self) -> float:
        """The mean cost that training and export aim at, in the budget's unit."""
        return float(mean_cost(torch.tensor([self.config.keep_ratio], dtype=torch.float64), self.config.budget_unit, self.run))

    def _num_kept(self, ratio: float) -> int:
        return num_kept(min(max(ratio, 1e-9), 1.0), self.run.num_tokens, self.config.k_multiple)

    # ------------------------------------------------------------------------------------------ at a site

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D), the block's input. Keeps exactly k tokens; None where k = N or the block is not routed."""
        if site.block < self.first:
            return None
        if site.call.training:
            return self._reduce_training(hidden_states, site)
        k = self.table[site.step][site.block - self.first]
        caching = self.config.rejected == "cache" and self.config.keep_ratio < 1
        if k == hidden_states.shape[1] and not caching:
            return None
        scores = site.memory["scores"] = self._scores(hidden_states, site)
        kept = top_indices(scores, k, site.call.guidance_halves, self.config.unify)
        one_set = kept.shape[0] == 1 or (kept.shape[0] == 2 and site.call.guidance_halves == 2 and self.config.unify != "off")
        # one index set for the batch goes through index_select and index_copy, about 3x cheaper
        return self._plan(kept[0] if one_set else kept, hidden_states, site.block)

    def _scores(self, hidden_states: Tensor, site: Site) -> Tensor:
        """(B, N): the router's, or a control's in its place."""
        scores = self.routers(hidden_states, site.call.time_embedding, site.call.pooled_prompt, site.block)
        if self.config.selection == "random":  # controls pay for the router too: the same FLOPs, hence the same schedule
            return site.rand(hidden_states.shape[1])
        if self.config.selection == "norm":
            return hidden_states.float().norm(dim=-1)
        return scores

    def _plan(self, kept: Tensor, hidden_states: Tensor, block: int) -> Keep:
        if self.config.rejected == "merge":
            return AbsorbKeep(kept, hidden_states.detach())
        if self.config.rejected == "cache":
            before = self._cached.get(block)
            plan = self._cached[block] = CachedKeep(kept, hidden_states.shape[1], None if before is None else before.updated)
            return plan
        return Keep(kept, hidden_states.shape[1])

    def _reduce_training(self, hidden_states: Tensor, site: Site) -> Reduction:
        num_tokens, config = hidden_states.shape[1], self.config
        # detached: the router learns through its scores, not by bending the features of earlier blocks
        scores = standardise(self.routers(hidden_states.detach(), site.call.time_embedding, site.call.pooled_prompt, site.block))
        if self._score_noise > 0:
            scores = scores + perturbation(config.surrogate, site.rand(num_tokens), self._score_noise)
        ratios = self._ratios[:, site.block - self.first]  # (1,), or (B,) with a k for each row
        pi = inclusion(config.surrogate, scores, ratios * num_tokens, *self._taus)
        residual = None
        if config.estimator == "teacher_contrast":
            before, after = self.teacher_features[site.block]
            residual = (after - before).detach()
        rows = [slice(None)] if len(ratios) == 1 else [slice(i, i + 1) for i in range(len(ratios))]
        plans = [self._gated(ratio, scores[row], (pi - pi.detach())[row], hidden_states[row],
                             None if residual is None else residual[row])
                 for row, ratio in zip(rows, ratios.tolist(), strict=True)]
        return plans[0] if len(plans) == 1 else PerRow(plans, num_tokens)

    def _gated(self, ratio: float, scores: Tensor, gate: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Gated:
        kept, num_tokens = scores.topk(self._num_kept(ratio), dim=-1).indices, hidden_states.shape[1]
        plan = AbsorbKeep(kept, hidden_states.detach()) if self.config.rejected == "merge" else Keep(kept, num_tokens)
        return Gated(plan, gate, self.config.estimator, residual)

    # ------------------------------------------------------------------------------------------ training

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Router warm-up, policy learning, joint tuning."""
        together = self.config.k_mode == "shared"
        return (Stage("router", share=0.5), Stage("policy", share=0.25, one_timestep=together),
                Stage("joint", share=0.25, adapters=True, one_timestep=together))

    @property
    def needs_teacher(self) -> bool:
        """Whether the estimator uses the teacher's residuals."""
        return self.config.estimator == "teacher_contrast"

    def stage_key(self, stage: str) -> dict[str, Any]:
        """The options that shape the result of `stage`; the router's warm-up does not depend on budget or policy."""
        return training_options(self.config, stage)

    def start_stage(self, stage: str, generator: torch.Generator) -> list[dict[str, Any]]:
        """Parameter groups that train in `stage`."""
        config = self.config
        self.train()
        self._exploration = Exploration(config, stage, self.num_routed, generator)
        self._exploration.rank, self._exploration.num_ranks = self.rank, self.num_ranks
        self.budget = BudgetLoss(self._target(), config.budget_weight, config.budget_beta, config.budget_loss,
                                 config.budget_integral)
        groups = [{"params": list(self.routers.parameters()), "lr": config.router_lr, "name": "router"}]
        policy = [p for p in self.policy.parameters() if p.requires_grad]
        if stage != "router" and policy:
            groups.append({"params": policy, "lr": config.policy_lr, "name": "policy", "weight_decay": 0.0})
        return groups

    def start_step(self, progress: float, level: Tensor, validating: bool = False) -> None:
        """Before a training step: `progress` of the stage in [0, 1], `level` (B,) noise levels of the batch."""
        self._taus = self._exploration.temperatures(progress)
        self._score_noise = 0.0 if validating else self._exploration.score_noise
        self._mean_cost = None
        rows = 1 if self.config.k_mode == "shared" else len(level)
        if self._exploration.stage == "router":
            # validation at the middle of the range: this stage knows no budget and is shared by all of them
            self._ratios = torch.full((rows, self.num_routed), sum(self.config.ratio_range) / 2) if validating else \
                self._exploration.warm_up_ratios(rows)
            self._ratios = self._ratios.to(level.device)
            return
        logits = self.policy.logits(level[:rows])
        self._ratios = torch.sigmoid(logits)
        if not validating:
            self._mean_cost = mean_cost(self._ratios, self.config.budget_unit, self.run).mean()
            if self.config.ratio_policy not in HAND_MADE:
                self._ratios = torch.sigmoid(logits + self._exploration.logit_noise(logits))  # Eq. 29

    def losses(self) -> dict[str, Tensor]:
        """Loss terms of the method after the forward pass."""
        if self._mean_cost is None or not self._mean_cost.requires_grad:
            return {}
        return {"budget": self.budget(self._mean_cost, self.synchronise)}

    def training_state(self) -> dict[str, Any]:
        """What a resumed stage needs beside parameters and generator."""
        return {**self.budget.state(), **self._exploration.state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state` gave."""
        self.budget.load_state(state)
        self._exploration.load_state(state)
