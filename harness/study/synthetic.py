"""The synthetic task of Shiva-DiT: 20 of 100 tokens carry signal; do the router and k find them? And where does Eq. 7 fail?

Source: Shiva-DiT, arXiv:2602.05605, appendix A.3, Fig. 6: 100 tokens of width 16, signal of mean 10, k from 50, Adam 0.1 for
the router, SGD 2.0 for k, 100 steps with k fixed, then 700; weight 0.1 on sparsity.
Differs: the paper gives neither the loss nor the router; ours are in `Task`. Selection and gradients are the method's own code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.engine.tokens import Keep
from harness.study.synthetic_report import figures as figures
from harness.study.synthetic_report import report as report
from methods.shiva.estimators import Gated
from methods.shiva.soft_topk import inclusion, standardise

log = logging.getLogger(__name__)

NUM_TOKENS, WIDTH, NUM_SIGNAL, SIGNAL_MEAN = 100, 16, 20, 10.0
K_START, ROUTER_LR, K_LR = 50.0, 0.1, 2.0
TAIL = 100
"""Last steps over which the resting k, recall and precision are averaged."""
THIN = 5
OTHER_SEEDS = 2
"""Seeds of every variant but the paper's."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One variant. The defaults are the reading that reproduces the figure.

    block: 'dropped_energy', the loss is the energy of the rejected tokens; 'residual', a block that doubles its tokens, wanted
    for signal tokens only. length_normalised: the factor N of Eq. 30. penalty: what the sparsity weight multiplies.
    reduction: of the squared error over tokens and channels. standardised: scores of spread 1 inside the soft rank.
    """

    block: Literal["dropped_energy", "residual"] = "dropped_energy"
    estimator: str = "eq7"
    length_normalised: bool = True
    penalty: Literal["k", "k/N"] = "k"
    reduction: Literal["mean", "sum"] = "mean"
    sparsity_weight: float = 0.1
    tau_rank: float = 0.2
    tau_sel: float = 0.1
    standardised: bool = False


VARIANTS = {
    "paper": Task(),
    "without N in Eq. 6": Task(length_normalised=False),
    "penalty on k/N": Task(penalty="k/N"),
    "sum instead of mean": Task(reduction="sum"),
    "eq7 on a residual block": Task(block="residual"),
    "eq7_prose on a residual block": Task(block="residual", estimator="eq7_prose"),
    "teacher_contrast on a residual block": Task(block="residual", estimator="teacher_contrast"),
    "sparsity weight 0.05": Task(sparsity_weight=0.05),
    "sparsity weight 0.2": Task(sparsity_weight=0.2),
    "tau_sel 0.05": Task(tau_sel=0.05),
    "standardised scores": Task(standardised=True),
}


def draw_tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (1, N, D), N(0, 1) with mean 10 on 20 random ones, and which ones (1, N)."""
    tokens = torch.randn(1, NUM_TOKENS, WIDTH, generator=generator)
    signal = torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
    signal[0, torch.randperm(NUM_TOKENS, generator=generator)[:NUM_SIGNAL]] = True
    return tokens + SIGNAL_MEAN * signal[..., None], signal


def task_error(task: Task, plan: Gated, tokens: Tensor, signal: Tensor) -> Tensor:
    """Squared error (1, N, D) of the routed block of `task`."""
    selected = plan.reduce(tokens)
    if task.block == "dropped_energy":
        return plan.restore(selected * 0, tokens) ** 2  # what is rejected is lost
    wanted = torch.where(signal[..., None], 2 * tokens, tokens)
    return (plan.restore(2 * selected, tokens) - wanted) ** 2


def learn(task: Task, seed: int, warmup: int = 100, steps: int = 800) -> dict[str, list[float]]:
    """Train a linear router and k; fresh tokens at each step. k, recall and precision of the signal before each step."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    k = torch.tensor(K_START, requires_grad=True)
    router, budget = torch.optim.Adam([weight], lr=ROUTER_LR), torch.optim.SGD([k], lr=K_LR)
    tau_sel = task.tau_sel / (1 if task.length_normalised else NUM_TOKENS)
    curve: dict[str, list[float]] = {"k": [], "recall": [], "precision": []}
    for step in range(steps):
        tokens, signal = draw_tokens(generator)
        scores = tokens @ weight
        pi = inclusion(standardise(scores) if task.standardised else scores, k, task.tau_rank, tau_sel)
        kept = scores.topk(int(k.detach()), dim=-1).indices
        found = int(signal.gather(1, kept).sum())
        for name, value in {"k": float(k.detach()), "recall": found / NUM_SIGNAL, "precision": found / kept.shape[1]}.items():
            curve[name].append(round(value, 4))
        plan = Gated(Keep(kept, NUM_TOKENS), pi - pi.detach(), task.estimator,
                     tokens if task.estimator == "teacher_contrast" else None)  # a teacher that runs the block: residual x
        error = task_error(task, plan, tokens, signal)
        loss = error.mean() if task.reduction == "mean" else error.sum()
        penalty = task.sparsity_weight * (k if task.penalty == "k" else k / NUM_TOKENS)
        router.zero_grad()
        budget.zero_grad()
        (loss + penalty).backward()
        router.step()
        if step >= warmup:
            budget.step()
            with torch.no_grad():
                k.clamp_(1, NUM_TOKENS)
    return curve


# ------------------------------------------------------------------------------------------ gradient cosine


def cosines(trials: int, generator: torch.Generator) -> dict[str, list[float]]:
    """Cosine over the 100 tokens between an estimate and a true gradient, for each definition we could think of.

    'task/pi', 'task/scores': Eq. 7 with its hard forward against the exact gradient of the soft loss mean((1 - pi)^2 x^2),
    with respect to pi and to the scores, on the task's tokens; random linear router, k = 50. 'noise/...': on tokens without
    signal. 'residual/pi': as 'noise/pi', on a pre-norm residual block before a norm. 'independent': Eq. 7 sees one of two
    independent path gradients, Eq. 22 has both. 'bernoulli': one Bernoulli selection with uniform pi against the gradient of
    the expectation.
    """
    names = ("task/pi", "task/scores", "noise/pi", "noise/scores", "residual/pi", "independent", "bernoulli")
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(trials):
        matrix = torch.randn(WIDTH, generator=generator) / WIDTH**0.5
        noise = torch.randn(1, NUM_TOKENS, WIDTH, generator=generator)
        for kind, tokens in (("task", draw_tokens(generator)[0]), ("noise", noise)):
            for name, value in _hard_against_soft(tokens, tokens @ matrix).items():
                found[f"{kind}/{name}"].append(value)
        found["residual/pi"].append(_residual_cosine(noise, noise @ matrix, generator))
        selected, rejected = torch.randn(2, NUM_TOKENS, generator=generator)  # <g, x> on the two paths
        mask = (torch.randperm(NUM_TOKENS, generator=generator) < K_START).float()
        found["independent"].append(_cosine(mask * selected - (1 - mask) * rejected, selected - rejected))
        uniform = torch.rand(NUM_TOKENS, generator=generator)
        mask = (torch.rand(NUM_TOKENS, generator=generator) < uniform).float()
        found["bernoulli"].append(_cosine(mask * selected - (1 - mask) * rejected,
                                          uniform * selected - (1 - uniform) * rejected))
    return found


def _hard_against_soft(tokens: Tensor, scores: Tensor) -> dict[str, float]:
    scores = scores.requires_grad_()
    pi = inclusion(scores, K_START, 0.2, 0.1)
    kept = Keep(scores.topk(int(K_START), dim=-1).indices, NUM_TOKENS)
    hard = task_error(Task(), Gated(kept, pi - pi.detach(), "eq7"), tokens, tokens).mean()
    soft = ((1 - pi)[..., None] * tokens).pow(2).mean()
    pairs = {name: [torch.autograd.grad(loss, inputs, retain_graph=True)[0] for loss in (hard, soft)]
             for name, inputs in (("pi", pi), ("scores", scores))}
    return {name: _cosine(*pair) for name, pair in pairs.items()}


def _residual_cosine(tokens: Tensor, scores: Tensor, generator: torch.Generator) -> float:
    """Eq. 7 against the exact gradient of the soft gate x + pi f(LN(x)), both before a final norm and a squared error."""
    target = torch.randn(1, NUM_TOKENS, WIDTH, generator=generator)
    matrix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def residual(x: Tensor) -> Tensor:
        return torch.tanh(F.layer_norm(x, (WIDTH,)) @ matrix)

    def loss(output: Tensor) -> Tensor:
        return (F.layer_norm(output, (WIDTH,)) - target).pow(2).mean()

    pi = inclusion(scores, K_START, 0.2, 0.1).detach().requires_grad_()
    plan = Gated(Keep(scores.topk(int(K_START), dim=-1).indices, NUM_TOKENS), pi - pi.detach(), "eq7")
    selected = plan.reduce(tokens)
    estimate, = torch.autograd.grad(loss(plan.restore(selected + residual(selected), tokens)), pi)
    exact, = torch.autograd.grad(loss(tokens + pi[..., None] * residual(tokens)), pi)
    return _cosine(estimate, exact)


def _cosine(estimate: Tensor, exact: Tensor) -> float:
    return round(float(F.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0)), 6)


# ------------------------------------------------------------------------------------------ the study


def measure(seeds: Sequence[int], store: Path | None = None, trials: int = 1000) -> dict[str, Any]:
    """Curves (every `THIN`-th step) and resting values of every variant; cosines of `trials` draws."""
    curves: dict[str, list[dict[str, list[float]]]] = {}
    resting: dict[str, list[dict[str, float]]] = {}
    for name, task in VARIANTS.items():
        runs = [learn(task, seed) for seed in (seeds if task == Task() else seeds[:OTHER_SEEDS])]
        resting[name] = [rest(run) for run in runs]
        curves[name] = [{key: values[::THIN] for key, values in run.items()} for run in runs]
        log.info("%s: k rests at %s", name, [round(run["k"], 2) for run in resting[name]])
    return {"seeds": list(seeds), "steps_between_points": THIN, "curves": curves, "rest": resting,
            "cosines": cosines(trials, torch.Generator().manual_seed(seeds[0]))}


def rest(curve: dict[str, list[float]]) -> dict[str, float]:
    """Means over the last `TAIL` steps, and how far k moved in them."""
    tail = curve["k"][-TAIL:]
    means = {name: round(sum(values[-TAIL:]) / len(tail), 4) for name, values in curve.items()}
    return {**means, "k_swing": round(max(tail) - min(tail), 4)}
