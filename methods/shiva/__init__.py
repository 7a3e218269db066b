"""Shiva-DiT: residual-based differentiable top-k token selection under a strict token budget.

A router scores the image tokens of each block; a ratio policy gives each (timestep, block) its keep ratio; exactly k tokens
run through the block and the rest pass by its residual. Trained in three stages on a frozen backbone, adapters in the last.

Source: Shiva-DiT, arXiv:2602.05605v1. The parts: `soft_topk` (Eq. 5, 6, 30), `estimators` (Eq. 7 and its alternatives),
`router` (Eq. 8, 9, 32), `policy` (Eq. 10 to 13, 29).
Differs: the default gradient estimator is `teacher_contrast`; the paper's literal one is `estimator: eq7`. At export the
policy's anchor is shifted so that the look-up table meets the budget exactly on the inference grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from harness.api import METHODS, Run, Site, Stage, TrainableMethod, require
from harness.tokens import Keep, num_kept, top_indices
from methods.shiva.estimators import GatedKeep
from methods.shiva.policy import BudgetLoss, RatioPolicy
from methods.shiva.router import RouterBank
from methods.shiva.soft_topk import inclusion, standardise

INPUTS = ("time", "prompt", "layer")


@METHODS.register("shiva")
class Shiva(TrainableMethod, nn.Module):
    """Router, ratio policy and budget around every block but the first."""

    stages = (Stage("router", share=0.5), Stage("policy", share=0.25, one_timestep=True),
              Stage("joint", share=0.25, adapters=True, one_timestep=True))

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The ablation axes. Defaults are the paper's where it gives them.

        keep_ratio: target mean keep ratio over the routed blocks and the inference grid. first_block: route block 0 too.
        router_groups: routers over depth; 'pairs' (adjacent blocks share one, the paper's best), 'per_layer', or a number.
        router_width: d'. router_inputs: context beside the token. unify: how guided halves agree on tokens.
        k_multiple: round k up to a multiple. budget_weight, budget_beta: Eq. 12, 13; the paper gives no weight, and at 5 the
        learned mean settled 0.1 above its target on the embedded model, for the task pulls at every ratio. tau_*: start and
        end of a cosine decay over the first two stages. score_noise: spread of the Gaussian on standardised scores, zero in
        the last stage. ratio_range, ratio_strata: stage 1 draws ratios stratified in this range.
        """

        keep_ratio: float = 0.6
        router_groups: int | Literal["pairs", "per_layer"] = "pairs"
        router_width: int = 64
        router_inputs: tuple[str, ...] = INPUTS
        ratio_policy: Literal["additive", "fixed", "per_layer", "per_timestep"] = "additive"
        estimator: Literal["teacher_contrast", "eq7", "eq7_prose", "output_gate", "block_vs_skip"] = "teacher_contrast"
        unify: Literal["max", "mean", "cond", "off"] = "max"
        first_block: bool = False
        k_multiple: int = 1
        budget_weight: float = 20.0
        budget_beta: float = 0.2
        tau_rank: tuple[float, ...] = (0.2, 0.05)
        tau_sel: tuple[float, ...] = (0.1, 0.02)
        score_noise: float = 0.1
        ratio_range: tuple[float, ...] = (0.3, 0.95)
        ratio_strata: int = 4
        router_lr: float = 3e-4
        policy_lr: float = 1e-4

        def __post_init__(self) -> None:
            require(0 < self.keep_ratio <= 1, f"shiva.keep_ratio must lie in (0, 1], got {self.keep_ratio}")
            require(isinstance(self.router_groups, str) or self.router_groups >= 1,
                    f"shiva.router_groups must be at least 1, got {self.router_groups}")
            require(set(self.router_inputs) <= set(INPUTS),
                    f"shiva.router_inputs must be among {INPUTS}, got {self.router_inputs}")
            low, high = self.ratio_range if len(self.ratio_range) == 2 else (1, 0)
            require(0 < low < high <= 1, f"shiva.ratio_range must be [low, high] in (0, 1], got {list(self.ratio_range)}")
            for name in ("tau_rank", "tau_sel"):
                taus = getattr(self, name)
                require(len(taus) == 2 and min(taus) > 0, f"shiva.{name} must be [start, end], both positive, got {list(taus)}")
            require(self.k_multiple >= 1, f"shiva.k_multiple must be at least 1, got {self.k_multiple}")

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        TrainableMethod.__init__(self, config)
        self.run: Run | None = None
        self._fitted = False
        self.table: list[list[int]] = []
        self._stage = ""

    # ------------------------------------------------------------------------------------------ a run

    def begin(self, run: Run) -> None:
        """Build the routers for this backbone at the first call; compile the look-up table of k for its schedule."""
        if self.run is None:
            self._build(run)
        require(self.run.num_blocks == run.num_blocks and self.run.width == run.width,
                f"shiva was trained for {self.run.num_blocks} blocks of width {self.run.width}, not for {run.num_blocks} of "
                f"{run.width}")
        self.run = run
        self._stage = ""
        self.eval()
        if self.policy.anchor.device.type != "meta":  # a counting twin keeps the table it was copied with
            self._export()

    def ratios(self) -> Tensor:
        """(steps, routed blocks) keep ratios on the inference grid, after the shift that meets the target."""
        levels = torch.tensor(self.run.timesteps, dtype=torch.float32, device=self.policy.anchor.device)
        with torch.no_grad():
            return self.policy(levels)

    def fit_budget(self, cut: Callable[[], float], flops_cut: float) -> dict[str, float]:
        """Shift the anchor until `cut()`, the executed fraction of FLOPs saved, is as near `flops_cut` as tokens allow."""
        self._fitted = True
        self._bisect(lambda: flops_cut - cut(), rounds=16)
        return {"shift": float(self.policy.shift)}

    def load_fit(self, fitted: dict[str, float]) -> None:
        """Take over what `fit_budget` returned for an equal method."""
        self._fitted = True
        self.policy.shift.fill_(fitted["shift"])
        self._tabulate()

    def _build(self, run: Run) -> None:
        self.run = run
        self.first = 0 if self.config.first_block else 1
        self.num_routed = run.num_blocks - self.first
        require(self.num_routed >= 1, f"shiva: the backbone has {run.num_blocks} blocks and block 0 is never reduced")
        groups = {"pairs": math.ceil(run.num_blocks / 2), "per_layer": run.num_blocks}.get(self.config.router_groups,
                                                                                         self.config.router_groups)
        require(groups <= run.num_blocks, f"shiva.router_groups: {groups} routers for {run.num_blocks} blocks")
        self.routers = RouterBank(run.num_blocks, groups, (run.width, run.width, run.pooled_width), self.config.router_width,
                                  frozenset(self.config.router_inputs))
        self.policy = RatioPolicy(self.config.ratio_policy, self.num_routed, self.config.keep_ratio)
        self.to(run.device if run.device != "meta" else "cpu")

    def _export(self) -> None:
        """k[step][routed block], with the mean ratio of the table equal to the target."""
        if self.config.keep_ratio == 1:
            self.table = [[self.run.num_tokens] * self.num_routed for _ in self.run.timesteps]
        elif self._fitted or self.config.ratio_policy == "fixed":
            self._tabulate()
        else:
            self._bisect(lambda: float(self.ratios().mean()) - self.config.keep_ratio)

    def _bisect(self, excess: Callable[[], float], rounds: int = 40) -> None:
        """Find the anchor shift at which `excess()`, which grows with the ratios, changes sign."""
        low, high = -8.0, 8.0
        for _ in range(rounds):
            self.policy.shift.fill_((low + high) / 2)
            self._tabulate()
            low, high = ((low + high) / 2, high) if excess() < 0 else (low, (low + high) / 2)

    def _tabulate(self) -> None:
        num_tokens, multiple = self.run.num_tokens, self.config.k_multiple
        self.table = [[num_kept(max(r, 1e-9), num_tokens, multiple) for r in row] for row in self.ratios().tolist()]

    # ------------------------------------------------------------------------------------------ at a site

    def reduce(self, hidden_states: Tensor, site: Site) -> Keep | None:
        """hidden_states: (B, N, D), the block's input. Keeps exactly k tokens; None where k = N or the block is not routed."""
        if site.block < self.first:
            return None
        call = site.call
        if call.training:
            return self._reduce_training(hidden_states, site)
        num_tokens, k = hidden_states.shape[1], self.table[site.step][site.block - self.first]
        if k == num_tokens:
            return None
        scores = self.routers(hidden_states, call.time_embedding, call.pooled_prompt, site.block)
        kept = top_indices(scores, k, call.guidance_halves, self.config.unify)
        one_set = kept.shape[0] == 1 or (kept.shape[0] == 2 and call.guidance_halves == 2 and self.config.unify != "off")
        return Keep(kept[0] if one_set else kept, num_tokens)  # one index set for the batch: index_select, about 3x cheaper

    def _reduce_training(self, hidden_states: Tensor, site: Site) -> GatedKeep:
        num_tokens = hidden_states.shape[1]
        # detached: the router learns through its scores, not by bending the features of earlier blocks
        scores = standardise(self.routers(hidden_states.detach(), site.call.time_embedding, site.call.pooled_prompt, site.block))
        if self._noise > 0:
            scores = scores + self._noise * torch.special.ndtri(site.rand(num_tokens).clamp(1e-6, 1 - 1e-6))
        ratio = self._ratios[site.block - self.first]
        k = num_kept(min(max(float(ratio.detach()), 1e-9), 1.0), num_tokens, self.config.k_multiple)
        pi = inclusion(scores, ratio * num_tokens, *self._taus)
        teacher = None
        if self.config.estimator == "teacher_contrast":
            before, after = self.teacher_features[site.block]
            teacher = (after - before).detach()
        return GatedKeep(scores.topk(k, dim=-1).indices, num_tokens, pi - pi.detach(), self.config.estimator, teacher)

    # ------------------------------------------------------------------------------------------ training

    def stage_key(self, stage: str) -> dict:
        """The options that shape the result of `stage`; the router's warm-up does not depend on budget or policy."""
        unused = {"unify"}  # inference only
        if stage == "router":
            unused |= {"keep_ratio", "ratio_policy", "budget_weight", "budget_beta", "policy_lr"}
        return {key: value for key, value in self.config.__dict__.items() if key not in unused}

    def start_stage(self, stage: str, generator: torch.Generator) -> list[dict]:
        """Parameter groups that train in `stage`."""
        self._stage, self._generator, self._draws = stage, generator, 0
        self.train()
        self.budget = BudgetLoss(self.config.keep_ratio, self.config.budget_weight, self.config.budget_beta)
        groups = [{"params": list(self.routers.parameters()), "lr": self.config.router_lr, "name": "router"}]
        policy = [p for p in self.policy.parameters() if p.requires_grad]
        if stage != "router" and policy:
            groups.append({"params": policy, "lr": self.config.policy_lr, "name": "policy", "weight_decay": 0.0})
        return groups

    def start_step(self, progress: float, level: Tensor) -> None:
        """Before a training step: `progress` of the stage in [0, 1], `level` (B,) noise levels of the batch.

        One k per block serves the whole batch: in stage 1 the ratio is drawn apart from t, later the batch shares its t.
        """
        done = {"router": progress / 2, "policy": 0.5 + progress / 2}.get(self._stage, 1.0)
        self._taus = tuple(_cosine(*getattr(self.config, name), done) for name in ("tau_rank", "tau_sel"))
        self._noise = 0.0 if self._stage == "joint" else self.config.score_noise
        if self._stage == "router":
            self._ratios = self._stratified_ratios().to(level.device)
            self._mean_ratio = None
            return
        logits = self.policy.logits(level[:1])[0]
        self._mean_ratio = torch.sigmoid(logits).mean()
        noise = torch.randn(logits.shape, generator=self._generator).to(logits.device) if self._stage == "policy" else 0.0
        self._ratios = torch.sigmoid(logits + (noise if self.config.ratio_policy != "fixed" else 0.0))  # Eq. 29

    def losses(self) -> dict[str, Tensor]:
        """Loss terms of the method after the forward pass."""
        if self._mean_ratio is None or not self._mean_ratio.requires_grad:
            return {}
        return {"budget": self.budget(self._mean_ratio)}

    def _stratified_ratios(self) -> Tensor:
        """(routed blocks,): half the time one ratio for all blocks, otherwise one each, drawn from successive strata."""
        self._draws += 1
        low, high = self.config.ratio_range
        width = (high - low) / self.config.ratio_strata
        shared = bool(torch.rand((), generator=self._generator) < 0.5)
        count = 1 if shared else self.num_routed
        stratum = (torch.arange(count) + self._draws) % self.config.ratio_strata
        if not shared:
            stratum = stratum[torch.randperm(count, generator=self._generator)]
        return (low + width * (stratum + torch.rand(count, generator=self._generator))).expand(self.num_routed)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
