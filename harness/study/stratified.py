"""Stratified timesteps: does the batch mean of the keep ratio vary less, and by exactly the variance between the strata?

With one draw from each of B equal slices of (0, 1) the batch mean of r(t) has the variance within the slices, over B; independent
draws have the whole variance over B. The difference is the variance between the slices' means, over B.

Source: Shiva-DiT, arXiv:2602.05605, Eq. 15, appendix A.4. The timesteps are drawn by the training's own code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from harness.api import Stage
from harness.reporting.plots import PALETTE, STYLE
from harness.statistics.intervals import combined_interval
from harness.study.writing import picture, table
from harness.training.batches import Batches, TrainingSet
from harness.training.config import TrainConfig
from methods.shiva.policy import RatioPolicy

log = logging.getLogger(__name__)

BATCH_SIZES = (4, 8, 16)
NUM_BATCHES = 10_000
TARGET, ROUGHNESS, FIT_STEPS = 0.6, 0.6, 300
Curve = Callable[[Tensor], Tensor]


@cache
def ratio_curves(seed: int) -> dict[str, Curve]:
    """Keep ratios (n,) as functions of the noise level (n,).

    'linear', 'sigmoid': hand-made schedules. 'policy': the method's additive policy network, its time branch fitted to the
    sigmoid, so with the ripples that such a network leaves. 'rough': the same network with random output weights, the worst
    case: it varies mostly inside the strata.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rough, fitted = RatioPolicy("additive", 7, TARGET), RatioPolicy("additive", 7, TARGET)
        nn.init.normal_(rough.time[-1].weight, std=ROUGHNESS)
        optimizer = torch.optim.Adam(fitted.parameters(), lr=1e-3)
        for _ in range(FIT_STEPS):
            level = torch.rand(64)
            loss = (fitted(level).mean(-1) - _sigmoid(level)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def frozen(policy: RatioPolicy) -> Curve:
        return lambda level: policy(level).mean(-1).detach()

    return {"linear": lambda t: 0.8 - 0.4 * t, "sigmoid": _sigmoid, "policy": frozen(fitted), "rough": frozen(rough)}


def _sigmoid(level: Tensor) -> Tensor:
    return 0.4 + 0.4 * torch.sigmoid((level - 0.5) / 0.08)


def drawn_levels(kind: str, batch_size: int, num_batches: int, seed: int) -> Tensor:
    """(num_batches, batch_size) noise levels as training draws them; kind: 'stratified' or 'uniform'."""
    nothing = TrainingSet(torch.zeros(1, 1, 1, 1), [""], "levels alone")
    batches = Batches(None, nothing, TrainConfig(batch_size=batch_size, timesteps=kind), Stage("policy", share=1.0), seed)
    return torch.stack([batches._levels(step, batch_size) for step in range(num_batches)])


def theory(curve: Curve, batch_size: int, points: int = 2**13) -> dict[str, float]:
    """Variances of the batch mean by a midpoint rule: 'uniform', 'stratified', and 'between', their difference."""
    ratios = curve((torch.arange(points) + 0.5) / points).double().view(batch_size, -1)
    whole, within = float(ratios.var(correction=0)), float(ratios.var(1, correction=0).mean())
    between = float(ratios.mean(1).var(correction=0))
    return {"uniform": whole / batch_size, "stratified": within / batch_size, "between": between / batch_size}


def measured(curve: Curve, levels: Tensor) -> dict[str, float]:
    """Variance of the batch mean over the rows of `levels` and its standard error."""
    means = curve(levels.flatten()).view(levels.shape).double().mean(1)
    squares = (means - means.mean()).square()
    return {"variance": float(squares.sum() / (len(means) - 1)), "standard_error": float(squares.std() / len(means) ** 0.5),
            "mean": float(means.mean())}


def measure(seeds: Sequence[int], store: Path | None = None, num_batches: int = NUM_BATCHES) -> dict[str, Any]:
    """Theory and measurement for every curve and batch size; the first seed's policy, `num_batches` batches over the seeds."""
    curves, rows = ratio_curves(seeds[0]), []
    for batch_size in BATCH_SIZES:
        levels = {kind: torch.cat([drawn_levels(kind, batch_size, num_batches // len(seeds), seed) for seed in seeds])
                  for kind in ("uniform", "stratified")}
        for name, curve in curves.items():
            rows.append({"curve": name, "batch_size": batch_size, "theory": theory(curve, batch_size),
                         **{kind: measured(curve, drawn) for kind, drawn in levels.items()}})
        log.info("batch size %d: done", batch_size)
    grid = torch.linspace(0, 1, 201)
    return {"seeds": list(seeds), "num_batches": num_batches // len(seeds) * len(seeds), "rows": rows, "levels": grid.tolist(),
            "curves": {name: [round(float(r), 5) for r in curve(grid)] for name, curve in curves.items()}}


# ------------------------------------------------------------------------------------------ report


def saved(row: dict[str, Any]) -> tuple[float, float]:
    """Measured difference of the two variances and its standard error."""
    return (row["uniform"]["variance"] - row["stratified"]["variance"],
            float(np.hypot(row["uniform"]["standard_error"], row["stratified"]["standard_error"])))


def half_width(error: float) -> float:
    """Of the 95 % interval of a number with a known standard error."""
    return combined_interval(0.0, [(error**2, math.inf)])[1]


def report(data: dict[str, Any]) -> str:
    """The findings in words, a table and a figure."""
    rows, lines = data["rows"], []
    scores = [abs(saved(row)[0] - row["theory"]["between"]) / saved(row)[1] for row in rows]
    factors = {name: [row["uniform"]["variance"] / row["stratified"]["variance"] for row in rows if row["curve"] == name]
               for name in data["curves"]}
    for row in rows:
        gain, error = saved(row)
        lines.append([row["curve"], str(row["batch_size"]), *(
            f"{1e6 * row[kind]['variance']:.3g} ({1e6 * row['theory'][kind]:.3g})" for kind in ("uniform", "stratified")),
            f"{1e6 * gain:.3g} +- {1e6 * half_width(error):.2g}", f"{1e6 * row['theory']['between']:.3g}",
            f"{row['uniform']['variance'] / row['stratified']['variance']:.1f}"])
    verdict = "**Held**" if max(scores) < 3 else "**Did not hold**"
    head = ["r(t)", "batch", "independent (theory)", "stratified (theory)", "saved, measured", "between strata / B, theory",
            "times less"]
    return "\n\n".join([
        "**Do stratified timesteps lower the variance of the batch mean keep ratio by the variance between the strata "
        "(Shiva-DiT, appendix A.4)?**",
        f"{verdict}: over {len(rows)} pairs of curve and batch size the measured saving is within {max(scores):.1f} standard "
        "errors of theory. How much that helps depends on the curve: the variance falls "
        + "; ".join(f"{min(f):.1f} to {max(f):.1f} times on `{name}`" for name, f in factors.items())
        + f" (batch {BATCH_SIZES[0]} to {BATCH_SIZES[-1]}).",
        f"Variances in units of 1e-6 (squared keep ratio), {data['num_batches']} batches each, drawn by the training's own code; "
        "'+-' is half of the 95 % interval of so many draws.",
        table(head, lines),
        picture("stratified.png", "Keep-ratio curves and the variance of their batch mean",
                "Left: the keep-ratio curves over the noise level (1 is pure noise); `policy` lies on the sigmoid. Right: "
                "variance of the batch mean against the batch size, independent (hollow) and stratified (filled) draws; lines "
                "are theory, markers are measured, bars, 95 % intervals, are smaller than the markers."),
        "Independent draws fall as 1/B; stratified ones as about 1/B^3 where the curve is smooth over a stratum. `policy` is the "
        "method's own network fitted to the sigmoid, not trained on images; `rough` is the same network with random output "
        "weights: its ripples are narrower than a stratum, so there is little between the strata to save. What this does not "
        "say: that stages whose batches share one timestep gain within a batch; there the strata are taken in turn over "
        "successive batches."])


def figures(data: dict[str, Any]) -> dict[str, Figure]:
    """stratified.png."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for colour, (name, ratios) in zip(PALETTE, data["curves"].items(), strict=False):
            rows = [row for row in data["rows"] if row["curve"] == name]
            sizes = [row["batch_size"] for row in rows]
            left.plot(data["levels"], ratios, color=colour, label=name)
            for kind, line, fill in (("uniform", "--", "white"), ("stratified", "-", colour)):
                right.plot(sizes, [row["theory"][kind] for row in rows], line, color=colour, linewidth=1)
                right.errorbar(sizes, [row[kind]["variance"] for row in rows], fmt="o", color=colour, markerfacecolor=fill,
                               yerr=[half_width(row[kind]["standard_error"]) for row in rows], label=f"{name}, {kind}")
        left.set(xlabel="noise level t (1: pure noise)", ylabel="keep ratio r(t)", ylim=(0, 1), title="curves")
        right.set(xlabel="batch size B", ylabel="variance of the batch mean of r", xscale="log", yscale="log",
                  title="variance of the batch mean")
        right.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES], minor=False)
        right.minorticks_off()
        left.legend()
        right.legend(fontsize=7.5, loc="lower left")
        return {"stratified.png": figure}
