"""How far the method's image features are from the dense model's at the same latents: the measures of Shiva-DiT's Table 2.

The latents are those of the dense trajectory, as in `velocity`. Features are the image tokens after every `every`-th block, the
taps of the distillation (arXiv:2602.05605, Eq. 14, 31), in both guided halves.
Differs: the paper does not say over which samples and timesteps it took its numbers; here it is the whole sampling schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.api import METHODS, METRICS, Backbone, Measure, Method, Metric, Planned, Subject, require
from harness.engine.injection import attach
from harness.engine.sampler import Loop
from harness.metrics.dense.trajectory import batches, dense_trajectory, seed_rows, shares_steps
from harness.statistics.intervals import mean_interval
from harness.training import losses

HEADINGS = {"feature_mse": "feature MSE to dense", "feature_cosine": "feature cosine to dense",
            "prediction_mse": "prediction MSE to dense"}


@METRICS.register("features")
class Features(Metric):
    """Mean squared error and cosine similarity of the features, and the error of the guided prediction."""

    group = "dense"
    measures = ("dense/feature_mse", "dense/feature_cosine", "dense/prediction_mse")
    against_dense = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """num_images: the first images of the trial that are used. every: blocks from one tap to the next."""

        num_images: int = 16
        every: int = 4

        def __post_init__(self) -> None:
            for name in ("num_images", "every"):
                require(getattr(self, name) >= 1, f"features.{name} must be at least 1, got {getattr(self, name)}")

    def check(self, planned: Planned) -> None:
        """There is a tap."""
        require(planned.run is None or self.config.every <= planned.run.num_blocks, f"features.every: {self.config.every}, but "
                f"the model has {planned.run.num_blocks if planned.run else 0} blocks, so no feature would be compared; take a "
                "smaller number")

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Means over steps, taps and tokens, per image; series over steps."""
        if not shares_steps(subject, self.name):
            return
        num_blocks = len(subject.backbone.port.blocks(subject.backbone.transformer))
        taps = list(losses.taps(num_blocks, self.config.every))
        require(bool(taps), f"features.every: {self.config.every}, but backbone '{subject.backbone.name}' has {num_blocks} "
                            "blocks, so no feature would be compared; take a smaller number")
        parts = [_compared(subject, part, taps) for part in batches(subject, self.config.num_images, "features")]
        found = torch.cat(parts, dim=2).double()  # (measures, steps, images)
        notes = {"taps": "after blocks " + ", ".join(map(str, taps)), "latents": "the dense trajectory"}
        for name, better, values in zip(HEADINGS, ("lower", "higher", "lower"), found, strict=True):
            per_image = tuple(values.mean(0).tolist())
            yield Measure(f"dense/{name}", float(values.mean()), better, mean_interval(per_image), len(per_image), per_image,
                          tuple(enumerate(values.mean(1).tolist())), notes if name != "prediction_mse" else {},
                          heading=HEADINGS[name])


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    return losses.normalised_error(found, wanted, per_row=True)


def cosine(found: Tensor, wanted: Tensor) -> Tensor:
    """(B,) cosine similarity of the tokens of (B, N, D), mean over tokens."""
    return F.cosine_similarity(found.float(), wanted.float(), dim=-1).mean(1)


def _compared(subject: Subject, part: slice, taps: list[int]) -> Tensor:
    """(3, steps, images): feature error, feature cosine, squared error of the guided prediction, of one batch."""
    latents = dense_trajectory(subject, part)["latents"]
    method, dense = subject.method, METHODS.build("dense", {})
    loop, dense_loop = Loop(subject.student, subject.sampler), Loop(subject.backbone, subject.sampler)
    conditioning = loop.conditioning(subject.prompts[part])
    rows = seed_rows(subject, part, loop.guidance_halves)
    method.begin(loop.run)
    method.reset()
    steps = []
    for step in range(loop.num_steps):
        inputs = (step, latents[step].to(subject.student.transformer.device), conditioning, rows)
        # one after the other at each step: the features of a whole trajectory would not fit beside a large model
        wanted, target = _predict(dense_loop, dense, taps, inputs)
        found, prediction = _predict(loop, method, taps, inputs)
        pairs = list(zip(found, wanted, strict=True))
        of_rows = [torch.stack([measure(a, b) for a, b in pairs]).mean(0) for measure in (_error, cosine)]
        of_images = [values.reshape(loop.guidance_halves, -1).mean(0) for values in of_rows]
        steps.append(torch.stack([*of_images, losses.squared_error(prediction, target, per_row=True)]))
    return torch.stack(steps, dim=1).cpu()


def _predict(loop: Loop, method: Method, taps: list[int], inputs: tuple) -> tuple[list[Tensor], Tensor]:
    """Features (B, N, D) at the taps and the guided prediction (B, C, H, W)."""
    with torch.no_grad(), attach(loop.backbone, method, loop.run) as injected, tapped(loop.backbone, taps) as features:
        prediction = loop.predict(injected, *inputs)
    return features, prediction


@contextmanager
def tapped(backbone: Backbone, taps: list[int]) -> Iterator[list[Tensor]]:
    """Collect the image tokens (B, N, D) after the blocks `taps`, whatever kind of site a method acts at."""
    features: list[Tensor] = []
    views = backbone.port.blocks(backbone.transformer)

    def keep(output: int | None) -> Any:
        return lambda module, args, result: features.append(result if output is None else result[output])

    hooks = [views[tap].block.register_forward_hook(keep(views[tap].port.output)) for tap in taps]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()
