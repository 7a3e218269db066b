"""The router's scores on the trial's own samples, saved for the report's score maps and histograms (Shiva-DiT, Fig. 5 and 7).

A method that scores tokens leaves `site.memory["scores"]` (B, N) at each block it routes; other methods have no scores, and
nothing is measured for them. The file is `scores.npz`: scores (images, steps, blocks, N) float32, NaN at blocks that are not
routed, of the conditional half; steps, noise_levels (steps,); grid (height, width in tokens); images uint8 and prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.api import METRICS, Measure, Metric, Subject, require
from harness.engine.injection import Injection, attach
from harness.engine.sampler import Loop, initial_noise
from harness.metrics.dense.trajectory import batches
from harness.storage import arrays

log = logging.getLogger(__name__)


@METRICS.register("scores")
class Scores(Metric):
    """Scores of the first images at steps spread over the schedule; their spread as a number."""

    group = "cost"
    measures = ("router/score_std",)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """num_images: the first images of the trial that are used. steps: how many sampling steps, evenly spread."""

        num_images: int = 4
        steps: int = 4

        def __post_init__(self) -> None:
            for name in ("num_images", "steps"):
                require(getattr(self, name) >= 1, f"scores.{name} must be at least 1, got {getattr(self, name)}")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Standard deviation over a block's tokens, mean over routed blocks, steps and images; nothing without scores."""
        if subject.is_dense:
            return
        loop = Loop(subject.student, subject.sampler)
        steps = np.unique(np.linspace(0, loop.num_steps - 1, self.config.steps).round().astype(int)).tolist()
        parts = [_scores(subject, part, loop, steps) for part in batches(subject, self.config.num_images, "scores")]
        if any(part is None for part in parts):
            log.info("method '%s' keeps no scores: metric 'scores' has nothing to measure", subject.method.name)
            return
        scores = np.concatenate(parts)
        path = subject.out_dir / "scores.npz"
        levels = [loop.run.timesteps[step] for step in steps]
        arrays.save(path, scores=scores, steps=np.array(steps), noise_levels=np.array(levels, np.float64),
                    grid=np.array(loop.run.grid), images=subject.images[: len(scores)],
                    prompts=np.array(subject.prompts[: len(scores)]))
        spread = np.nanmean(scores.std(-1), axis=(1, 2)).astype(float)
        yield Measure("router/score_std", float(spread.mean()), "none", n=len(spread), artifact=path,
                      notes={"half": "conditional", "steps": ", ".join(map(str, steps))}, heading="SD of router scores")


def _scores(subject: Subject, part: slice, loop: Loop, steps: list[int]) -> np.ndarray | None:
    """(images, steps, blocks, N) of one batch, sampled as the trial's images are; None where a method keeps no scores."""
    backbone, method, seeds = subject.student, subject.method, subject.seeds[part]
    found: dict[int, list[Tensor | None]] = {}
    method.begin(loop.run)
    with attach(backbone, method, loop.run) as injected:

        def watch(step: int, latents: Tensor, prediction: Tensor) -> None:
            if step in steps:
                found[step] = [_of_block(injected, block, len(seeds)) for block in range(loop.run.num_blocks)]

        start = initial_noise(seeds, backbone.latent_shape, backbone.transformer.device, backbone.transformer.dtype)
        loop(injected, start, loop.conditioning(subject.prompts[part]), seeds, watch)
    known = next((scores for blocks in found.values() for scores in blocks if scores is not None), None)
    if known is None:
        return None
    table = [torch.stack([torch.full_like(known, torch.nan) if scores is None else scores for scores in found[step]])
             for step in steps]
    return torch.stack(table).permute(2, 0, 1, 3).numpy()


def _of_block(injected: Injection, block: int, num_images: int) -> Tensor | None:
    scores = injected.memory(block).get("scores")
    return None if scores is None else scores[-num_images:].float().cpu()  # rows are [unconditional; conditional]
