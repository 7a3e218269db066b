"""Which gradient estimator tells the truth? Every estimator against the exact change of the loss, on the trained backbone.

For tokens: dL/dpi_i against the loss with token i in the block minus the loss without it. For k: sum_i dL/dpi_i dpi_i/dk (the
soft rank's pi) against the loss change per token when the next-best tokens join. Per routed block, for both training losses.

Source: Shiva-DiT, arXiv:2602.05605, Eq. 5 to 7, 22, 30; the estimators are `methods.shiva.estimators`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import harness.backbones as _backbones  # noqa: F401  (fills the registry)
from harness.api import BACKBONES, Backbone, Site
from harness.data import load
from harness.data.emoji import EmojiSet
from harness.engine.sampler import Loop, SamplerConfig
from harness.engine.tokens import num_kept
from harness.storage.store import Store
from harness.study.estimators_report import figures as figures
from harness.study.estimators_report import report as report
from harness.study.flips import LOSSES, Probe, Samples, Scorer, probing
from harness.training.train import TrainConfig, TrainingSet, train, training_set
from methods.shiva import Shiva
from methods.shiva.estimators import ESTIMATORS
from methods.shiva.soft_topk import inclusion, standardise

log = logging.getLogger(__name__)

KEEP_RATIO = 0.6
SAMPLES_PER_SEED = 2
TOKENS_PER_SIDE = 12
MORE_TOKENS = 8
"""Tokens that join when k goes up."""
TAU_RANK, TAU_SEL = 0.2, 0.1


def by_chance(hidden_states: Tensor, site: Site) -> Tensor:
    """(B, N) standard normal scores from the samples' seeds."""
    return torch.special.ndtri(site.rand(hidden_states.shape[1]).clamp(1e-6, 1 - 1e-6))


def by_norm(hidden_states: Tensor, site: Site) -> Tensor:
    """(B, N) norms of the tokens that enter the block."""
    return hidden_states.norm(dim=-1)


def trained_router(backbone: Backbone, store: Store) -> Scorer:
    """The router of Shiva's default training without adapters, from `store` or trained into it."""
    shiva = Shiva(Shiva.Config())
    config = TrainConfig(adapter="none")
    train(backbone, shiva, config, training_set(backbone, load("emoji", "train"), store), store,
          lambda stage, done, total: log.info("%s %d/%d", stage, done, total) if done % 20 == 0 else None)

    def score(hidden_states: Tensor, site: Site) -> Tensor:
        return shiva.routers(hidden_states, site.call.time_embedding, site.call.pooled_prompt, site.block)

    return score


def draw_samples(backbone: Backbone, data: TrainingSet, seed: int, size: int) -> Samples:
    """`size` training images with noise; timesteps stratified over the batch (Eq. 15)."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(data.captions), generator=generator)[:size]
    level = ((torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size).clamp(1e-3, 1 - 1e-3)
    clean = data.latents[picks]
    noisy, timestep, target = backbone.noised(clean, torch.randn(clean.shape, generator=generator), level)
    seeds = torch.randint(2**62, (size,), generator=generator)
    return Samples(noisy, target, timestep, level, seeds, backbone.encode([data.captions[i] for i in picks]))


def _few_images(backbone: Backbone, seeds: Sequence[int]) -> TrainingSet:
    """A training set of `SAMPLES_PER_SEED` images per seed, spread over the training split."""
    whole = load("emoji", "train")
    picks = np.random.default_rng(list(seeds)).permutation(len(whole))[:SAMPLES_PER_SEED * len(seeds) * 4]
    part = EmojiSet(whole.images[picks], [whole.captions[i] for i in picks], [whole.ids[i] for i in picks])
    with tempfile.TemporaryDirectory() as folder:
        return training_set(backbone, part, Store(Path(folder)))


# ------------------------------------------------------------------------------------------ one probe


def study_probe(probe: Probe, generator: torch.Generator, per_side: int, more: int) -> list[dict[str, Any]]:
    """Per block, sample and loss: the truth and every estimate, for `2 per_side` tokens and for k. The probe must be routed."""
    gradients = {estimator: probe.gradients(estimator) for estimator in ESTIMATORS}
    records = []
    for block in probe.routed:
        kept = probe.kept[block]
        picks = [_pick(row, probe.num_tokens, per_side, generator) for row in kept]
        truth = [_effects(probe, block, [pick[side] for pick in picks]) for side in (0, 1)]
        slope = _true_slope(probe, block, more)
        for row, level in enumerate(probe.samples.level.tolist()):
            tokens = torch.cat(picks[row])
            for loss in LOSSES:
                estimates = {name: found[loss][block][row] for name, found in gradients.items()}
                records.append({
                    "block": block, "loss": loss, "level": round(level, 4), "num_kept_tokens": len(picks[row][0]),
                    "truth": _numbers(torch.cat([side[loss][row] for side in truth])),
                    "estimates": {name: _numbers(value[tokens]) for name, value in estimates.items()},
                    "k_truth": _numbers(slope[loss][row]),
                    "k_estimates": {name: _numbers(estimated_slope(value, probe.scores[block][row], kept.shape[1]))
                                    for name, value in estimates.items()}})
    return records


def estimated_slope(gradient: Tensor, scores: Tensor, k: int) -> Tensor:
    """dL/dk = sum_i dL/dpi_i dpi_i/dk of one sample, from dL/dpi (N,) and scores (N,); pi as in training."""
    budget = torch.tensor(float(k), requires_grad=True)
    pi = inclusion(standardise(scores[None]), budget, TAU_RANK, TAU_SEL)
    slope, = torch.autograd.grad((pi[0] * gradient).sum(), budget)
    return slope


def _pick(kept: Tensor, num_tokens: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` kept and `count` rejected tokens of one sample, at random."""
    outside = torch.ones(num_tokens, dtype=torch.bool).index_fill(0, kept, False).nonzero().flatten()
    return tuple(side[torch.randperm(len(side), generator=generator)[:count]] for side in (kept, outside))


def _effects(probe: Probe, block: int, tokens: list[Tensor]) -> dict[str, list[Tensor]]:
    """Loss -> per sample the effects (n,) of its tokens, all of the same side."""
    sizes = [len(row) for row in tokens]
    rows = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(sizes))
    return {loss: list(values.split(sizes)) for loss, values in probe.effects(block, rows, torch.cat(tokens)).items()}


def _true_slope(probe: Probe, block: int, more: int) -> dict[str, Tensor]:
    """Loss -> (B,) loss change per token when the `more` next-best tokens join."""
    kept = probe.kept[block]
    wider = probe.scores[block].topk(kept.shape[1] + more, dim=-1).indices
    losses = probe.losses_with(block, torch.arange(len(kept)), wider)
    return {loss: (losses[loss] - probe.losses[loss]) / more for loss in LOSSES}


def _numbers(values: Tensor) -> Any:
    """Plain floats of five significant digits."""
    return [float(f"{v:.5g}") for v in values.tolist()] if values.ndim else float(f"{float(values):.5g}")


# ------------------------------------------------------------------------------------------ the study


def measure(seeds: Sequence[int], store: Path | None = None, per_side: int = TOKENS_PER_SIDE) -> dict[str, Any]:
    """Records of `study_probe` for every seed and scorer on the embedded backbone; a trained router when `store` is given."""
    backbone = BACKBONES.build("sd3", {"weights": "embedded"})
    data, run = _few_images(backbone, seeds), Loop(backbone, SamplerConfig(guidance_scale=1.0)).run
    scorers: dict[str, Scorer] = {"random": by_chance, "norm": by_norm}
    if store is not None:
        scorers["router"] = trained_router(backbone, Store(store))
    records: list[dict[str, Any]] = []
    for seed in seeds:
        samples = draw_samples(backbone, data, seed, SAMPLES_PER_SEED)
        generator = torch.Generator().manual_seed(seed)
        with probing(backbone, run, samples) as probe:
            for name, scorer in scorers.items():
                probe.route(scorer, num_kept(KEEP_RATIO, run.num_tokens))
                found = study_probe(probe, generator, per_side, MORE_TOKENS)
                records += [{"seed": seed, "scorer": name, **record} for record in found]
        log.info("seed %d: done", seed)
    return {"seeds": list(seeds), "arguments": "" if store is None else " --store results/.cache",
            "keep_ratio": KEEP_RATIO, "num_tokens": run.num_tokens, "num_blocks": run.num_blocks, "tokens_per_side": per_side,
            "samples_per_seed": SAMPLES_PER_SEED, "more_tokens": MORE_TOKENS, "scorers": list(scorers), "records": records}
