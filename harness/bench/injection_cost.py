"""`injection`: what does routing cost when it saves nothing?

The embedded model, one image, 12 guided steps. Bare is diffusers' own pipeline from embeddings to latents. Injected is our
sampler with a plan at every block that keeps all tokens: everything that routes them, and no choice among them. What a method
does to choose is its own; for scale, a third arm has random_drop's at keep ratio 1: random scores, top-k and sort of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness.api import METHODS, Backbone, Method, Run, Site
from harness.bench.measurements import Bar, Measurement
from harness.bench.options import BenchOptions
from harness.bench.shapes import embedded
from harness.bench.timing import interleave
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise
from harness.engine.tokens import Keep

COST_BAR = Bar("<=", 1.02)
SAMPLER = SamplerConfig(num_steps=12, guidance_scale=2.0, batch_size=1)
ROUNDS = 60
"""One loop varies by a tenth and more on a shared machine; the bar is a fiftieth."""
PROMPTS = ["a red apple"]


def run(options: BenchOptions) -> Iterator[Measurement]:
    """Injected / bare, and the loop alone, with nothing attached, / bare."""
    backbone = embedded(options)
    chosen = METHODS.build("random_drop", {"keep_ratio": 1.0, "first_block": True})
    arms = {"bare": bare(backbone), "injected": injected(backbone, KeepAll()), "chosen": injected(backbone, chosen),
            "loop": injected(backbone, METHODS.build("dense", {}))}
    times = interleave(arms, options.rounds or ROUNDS, options.device)
    on_cpu = options.device == "cpu"
    for name, label, bar in (("injected", "injection at keep ratio 1 / bare pipeline", COST_BAR),
                             ("chosen", "the same with random scores and top-k / bare pipeline", None),
                             ("loop", "our loop, nothing attached / bare pipeline", None)):
        ratio, interval = times.ratio(name, "bare")
        yield Measurement(label, ratio, bar, interval, times.cpu_ratio(name, "bare") if on_cpu else None,
                          {"ms": {arm: times.median_ms(arm) for arm in arms}, **times.facts()} if bar else {})


class KeepAll(Method):
    """Every block is routed, and computes every token."""

    name = "keep_all"

    def __init__(self) -> None:
        super().__init__(None)

    def begin(self, run: Run) -> None:
        """All tokens of the run."""
        self._all = torch.arange(run.num_tokens)

    def reduce(self, hidden_states: Tensor, site: Site) -> Keep:
        """hidden_states: (B, N, D)."""
        return Keep(self._all, hidden_states.shape[1])


def bare(backbone: Backbone) -> Callable[[], object]:
    """A call of the diffusers pipeline that returns latents (1, C, H, W)."""
    given, empty = backbone.encode(PROMPTS), backbone.encode([""])
    noise = initial_noise([0], backbone.latent_shape, backbone.transformer.device, backbone.transformer.dtype)
    side = backbone.latent_shape[1] * backbone.pipe.vae_scale_factor

    def run() -> object:
        return backbone.pipe(
            prompt_embeds=given["encoder_hidden_states"], pooled_prompt_embeds=given["pooled_projections"],
            negative_prompt_embeds=empty["encoder_hidden_states"], negative_pooled_prompt_embeds=empty["pooled_projections"],
            guidance_scale=SAMPLER.guidance_scale, num_inference_steps=SAMPLER.num_steps, latents=noise.clone(),
            height=side, width=side, output_type="latent").images

    return run


def injected(backbone: Backbone, method: Method) -> Callable[[], object]:
    """The same latents by our loop with `method` attached."""
    loop = Loop(backbone, SAMPLER, method)
    conditioning = loop.conditioning(PROMPTS)
    noise = initial_noise([0], backbone.latent_shape, backbone.transformer.device, backbone.transformer.dtype)
    method.begin(loop.run)

    def run() -> object:
        with attach(backbone, method, loop.run) as injection:
            return loop(injection, noise, conditioning, [0])

    return run
