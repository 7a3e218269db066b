"""`inference`: does a step with Shiva cost what its tokens cost?

Random SD3 blocks, 1,024 and 4,096 image tokens, keep 0.6, a guided pair. Three arms run the sampler's own step: dense; routed
(our injection, router, gather, scatter; all blocks routed, k uniform); and direct, where the same blocks are simply handed k
tokens and their output is thrown away. Bars: routed is at most 5 % slower than direct, and the executed speed-up over dense is
at least 95 % of what the counted FLOPs imply, the router's included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.api import METHODS, Backbone, Method
from harness.bench.measurements import Bar, Measurement
from harness.bench.options import BenchOptions
from harness.bench.shapes import shape_only
from harness.bench.timing import interleave
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise

SIDES = (32, 64)
NUM_BLOCKS = 2
KEEP_RATIO = 0.6
OVERHEAD_BAR, EFFICIENCY_BAR = Bar("<=", 1.05), Bar(">=", 0.95)
SAMPLER = SamplerConfig(num_steps=2, guidance_scale=4.0, batch_size=1)


def run(options: BenchOptions) -> Iterator[Measurement]:
    """Per number of tokens: routed / direct, executed speed-up, implied speed-up and their quotient."""
    for side in SIDES:
        yield from _one_size(shape_only(side, NUM_BLOCKS, options), options)


def _one_size(backbone: Backbone, options: BenchOptions) -> Iterator[Measurement]:
    shiva = METHODS.build("shiva", {"keep_ratio": KEEP_RATIO, "ratio_policy": "fixed", "first_block": True})
    dense = METHODS.build("dense", {})
    loop = Loop(backbone, SAMPLER)
    shiva.begin(loop.run)
    kept = shiva.table[0][0]
    arms = {"dense": (dense, None), "routed": (shiva, None), "direct": (dense, kept)}
    steps = {name: _step(loop, method, direct) for name, (method, direct) in arms.items()}
    if options.device.startswith("cuda"):
        _refuse_host_syncs(steps["routed"])
    times = interleave(steps, options.rounds or 6, options.device)
    overhead, overhead_interval = times.ratio("routed", "direct")
    executed, executed_interval = times.ratio("dense", "routed")
    meter = Meter(backbone, SAMPLER)
    cost = meter.count(shiva)
    implied = meter.dense.total / cost.total
    pairs = (("routed", "direct"), ("dense", "routed"))
    cpu = {pair: times.cpu_ratio(*pair) if options.device == "cpu" else None for pair in pairs}
    size = f"N={loop.run.num_tokens} k={kept}"
    facts = {"ms": {name: times.median_ms(name) for name in arms}, **times.facts()}
    yield Measurement(f"{size}: time routed / direct", overhead, OVERHEAD_BAR, overhead_interval, cpu["routed", "direct"], facts)
    yield Measurement(f"{size}: executed speed-up over dense", executed, None, executed_interval, cpu["dense", "routed"])
    yield Measurement(f"{size}: speed-up implied by FLOPs", implied,
                      facts={"dense_flops": meter.dense.total, "routed_flops": cost.total, "method_flops": cost.method})
    yield Measurement(f"{size}: executed / implied", executed / implied, EFFICIENCY_BAR,
                      executed_interval and (executed_interval[0] / implied, executed_interval[1] / implied),
                      cpu["dense", "routed"] and cpu["dense", "routed"] / implied)


def _step(loop: Loop, method: Method, direct: int | None) -> Callable[[], Tensor]:
    """A function that takes one guided step. Attaching is part of it, for the arms share their blocks; it takes microseconds."""
    backbone = loop.backbone
    transformer = backbone.transformer
    latents = initial_noise([0], backbone.latent_shape, transformer.device, transformer.dtype)
    conditioning = loop.conditioning([""])
    seeds = torch.zeros(2, dtype=torch.int64, device=transformer.device)
    tokens = None if direct is None else torch.randn(2, direct, loop.run.width).to(latents)

    def step() -> Tensor:
        with attach(backbone, method, loop.run) as injection, _fed_directly(injection.views, tokens):
            return loop.predict(injection, 0, latents, conditioning, seeds)

    return step


@contextmanager
def _fed_directly(views: list, tokens: Tensor | None) -> Iterator[None]:
    """Within this context every block computes `tokens` (B, k, D) instead of the image tokens that it is given."""
    blocks = [] if tokens is None else [view.block for view in views]
    for block in blocks:
        block.forward = _Direct(block, tokens)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Direct:
    def __init__(self, block: nn.Module, tokens: Tensor) -> None:
        self.original, self.tokens = type(block).forward.__get__(block), tokens

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor | None, Tensor]:
        text, _ = self.original(hidden_states=self.tokens, **kwargs)
        return text, hidden_states


def _refuse_host_syncs(step: Callable[[], Tensor]) -> None:
    """Run `step` once; raises RuntimeError where anything in it makes the host wait for the device."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
