"""The options of Shiva-DiT: every mechanism of the paper, and what it is compared with, as an axis of a sweep."""

from dataclasses import dataclass
from typing import Literal

from harness.api import require

INPUTS = ("time", "prompt", "layer")


@dataclass(frozen=True, kw_only=True)
class ShivaConfig:
    """The ablation axes. Defaults are the paper's where it gives them.

    Budget. keep_ratio: target mean keep ratio over the routed blocks and the inference grid. first_block: route block 0 too.
    k_multiple: round k up to a multiple. budget_unit: hold the mean of tokens, or of FLOPs (the target is then what a uniform
    keep_ratio costs). budget_loss: 'ema' (Eq. 12, 13) or DiffCR's 'batch'. budget_integral: weight of an integral term, 0 is
    off. budget_weight, budget_beta: Eq. 12, 13; the paper gives no weight, and at 5 the learned mean settled 0.1 above its
    target on the embedded model, for the task pulls at every ratio.

    Router. router_groups: routers over depth; 'pairs' (adjacent blocks share one, the paper's best), 'per_layer', a number, or
    the paper's number for 24 layers scaled to the depth at hand ('4_of_24', '8_of_24', '12_of_24'). router_width: d'.
    router_inputs: context beside the token. router_prenorm: normalise tokens before the projection. unify: how guided halves
    agree on tokens. selection: what picks the tokens at inference; 'random' and 'norm' are controls that share the training and
    the schedule of 'router', run the router, and ignore it.

    Ratios. ratio_policy: see `policy`. ratio_range, ratio_strata, ratio_sampling: stage 1 draws ratios from this range, in
    strata or uniformly. k_mode: 'shared' gives a training batch one k per block (its rows then share their timestep),
    'per_sample' each row its own, which runs routed blocks row by row.

    Gradient. surrogate: see `surrogates`. estimator: see `estimators`. tau_*: start and end of a cosine decay over the first
    two stages. score_noise: spread of the noise on standardised scores, zero in the last stage. logit_noise: spread of the
    noise on the policy's logits in stage 2 (Eq. 29).

    rejected: what a token that is not computed gets: 'identity' (the paper), 'cache' (the residual of the step that last
    computed it; inference only), 'merge' (the residual of the most similar kept token, into which it is averaged).
    """

    keep_ratio: float = 0.6
    first_block: bool = False
    k_multiple: int = 1
    budget_unit: Literal["tokens", "flops"] = "tokens"
    budget_loss: Literal["ema", "batch"] = "ema"
    budget_weight: float = 20.0
    budget_beta: float = 0.2
    budget_integral: float = 0.0
    router_groups: int | Literal["pairs", "per_layer", "4_of_24", "8_of_24", "12_of_24"] = "pairs"
    router_width: int = 64
    router_inputs: tuple[str, ...] = INPUTS
    router_prenorm: bool = True
    unify: Literal["max", "mean", "cond", "off"] = "max"
    selection: Literal["router", "random", "norm"] = "router"
    ratio_policy: Literal["additive", "fixed", "per_layer", "per_timestep", "film", "structure_first", "random"] = "additive"
    ratio_range: tuple[float, ...] = (0.3, 0.95)
    ratio_strata: int = 4
    ratio_sampling: Literal["stratified", "uniform"] = "stratified"
    k_mode: Literal["shared", "per_sample"] = "shared"
    surrogate: Literal["soft_rank", "soft_rank_binned", "sum_to_k", "softsort", "neuralsort", "gumbel", "sigmoid"] = "soft_rank"
    estimator: Literal["teacher_contrast", "dense_contrast", "eq7", "eq7_prose", "output_gate", "block_vs_skip"] = \
        "teacher_contrast"
    tau_rank: tuple[float, ...] = (0.2, 0.05)
    tau_sel: tuple[float, ...] = (0.1, 0.02)
    score_noise: float = 0.1
    logit_noise: float = 1.0
    rejected: Literal["identity", "cache", "merge"] = "identity"
    router_lr: float = 3e-4
    policy_lr: float = 1e-4

    def __post_init__(self) -> None:
        require(0 < self.keep_ratio <= 1, f"shiva.keep_ratio must lie in (0, 1], got {self.keep_ratio}")
        unknown = sorted(set(self.router_inputs) - set(INPUTS))
        require(not unknown, f"shiva.router_inputs must be among {list(INPUTS)}, got {list(self.router_inputs)}")
        low, high = self.ratio_range if len(self.ratio_range) == 2 else (1, 0)
        require(0 < low < high <= 1, f"shiva.ratio_range must be [low, high] in (0, 1], got {list(self.ratio_range)}")
        for name in ("tau_rank", "tau_sel"):
            taus = getattr(self, name)
            require(len(taus) == 2 and min(taus) > 0, f"shiva.{name} must be [start, end], both positive, got {list(taus)}")
        for name in ("k_multiple", "router_width", "ratio_strata", "router_groups"):
            value = getattr(self, name)
            require(isinstance(value, str) or value >= 1, f"shiva.{name} must be at least 1, got {value}")
        for name in ("score_noise", "logit_noise", "budget_weight", "budget_integral"):
            require(getattr(self, name) >= 0, f"shiva.{name} must not be negative, got {getattr(self, name)}")
        require(0 < self.budget_beta <= 1, f"shiva.budget_beta must lie in (0, 1], got {self.budget_beta}")


INFERENCE_ONLY = frozenset({"unify", "selection"})
"""Options that no training sees."""
BUDGET_ONLY = frozenset({"keep_ratio", "ratio_policy", "budget_unit", "budget_loss", "budget_weight", "budget_beta",
                         "budget_integral", "policy_lr", "logit_noise"})
"""Options that the router's warm-up does not see."""


def training_options(config: ShivaConfig, stage: str) -> dict:
    """The options that shape the result of `stage`; variants that agree in them are trained once."""
    unused = INFERENCE_ONLY | (BUDGET_ONLY if stage == "router" else frozenset())
    options = {key: value for key, value in config.__dict__.items() if key not in unused}
    if options["rejected"] == "cache":  # needs the steps of a sampling run, so it trains as identity
        options["rejected"] = "identity"
    return options
