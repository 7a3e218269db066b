"""The forecast is exact for what a polynomial can say, and skipped steps cost no block."""

import pytest
import torch
from conftest import PROMPTS

from harness.api import METHODS
from harness.cost.flops import Meter
from harness.engine.sampler import Loop, SamplerConfig, sample


def forecast(order, computed, values, step):
    """What is forecast at `step` from values noted at the computed steps."""
    method = METHODS.build("taylor_forecast", {"keep_ratio": 0.5, "order": order})
    method.reset()
    method._entered = torch.zeros(1)
    for at in computed:
        method.note(at, torch.tensor([values(at)]))
    return float(method._forecast(step))


def test_order_zero_repeats_and_order_one_continues_a_line():
    def line(step):
        return 3.0 - 0.5 * step

    assert forecast(0, [0, 2, 4], line, 5) == line(4)
    assert forecast(1, [0, 2, 4], line, 7) == pytest.approx(line(7))
    assert forecast(1, [0], line, 1) == line(0)  # one point has no slope


def test_higher_orders_follow_the_papers_finite_differences():
    def cubic(step):
        return float(step**3)

    first, second = (64 - 8) / 2, ((64 - 8) / 2 - 8 / 2) / 2
    assert forecast(2, [0, 2, 4], cubic, 5) == pytest.approx(64 + first + second / 2)
    assert forecast(5, [0, 2, 4], cubic, 5) == pytest.approx(64 + first + second / 2)  # three points give two differences


def test_the_first_step_is_computed_and_the_others_are_spread(tiny_backbone):
    run = Loop(tiny_backbone, SamplerConfig(num_steps=12)).run
    for ratio, steps in ((0.5, {0, 2, 4, 6, 8, 10}), (0.25, {0, 4, 8}), (0.01, {0}), (0.75, {0, 1, 2, 4, 5, 6, 8, 9, 10})):
        method = METHODS.build("taylor_forecast", {"keep_ratio": ratio})
        method.begin(run)
        assert method._computed == steps


def test_a_skipped_step_costs_no_block(tiny_backbone):
    meter = Meter(tiny_backbone, SamplerConfig(num_steps=4))
    cost, kept = meter.counted(METHODS.build("taylor_forecast", {"keep_ratio": 0.5}))
    assert kept["ffn"] == [[1.0] * 4, [0.0] * 4] * 2
    assert 0.45 < cost.cut(meter.dense) < 0.5  # what is left of a skipped step is the embeddings and the last projection
    assert cost.method == 0


def test_order_zero_at_one_step_is_the_residual_of_that_step(tiny_backbone):
    config = SamplerConfig(num_steps=3, guidance_scale=2.0)
    method = METHODS.build("taylor_forecast", {"keep_ratio": 0.3, "order": 0})
    latents = [torch.cat([b.latents for b in sample(tiny_backbone, m, config, PROMPTS, [1, 2, 3, 4])])
               for m in (method, METHODS.build("dense", {}))]
    assert not torch.allclose(*latents, atol=1e-4)
    drift = (latents[0] - latents[1]).norm() / latents[1].norm()
    assert float(drift) < 1
