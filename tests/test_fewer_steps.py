"""fewer_steps is the dense model with another schedule, everywhere: in images, FLOPs, latency loops and comparisons."""

import pytest
import torch
from conftest import PROMPTS

from harness.api import METHODS
from harness.cost.budget import solve_budget
from harness.cost.flops import Meter
from harness.engine.sampler import Loop, SamplerConfig, sample

SEEDS = [3, 1, 4, 159]


def latents(backbone, method, num_steps):
    config = SamplerConfig(num_steps=num_steps, guidance_scale=4.0)
    return torch.cat([batch.latents for batch in sample(backbone, method, config, PROMPTS, SEEDS)])


def test_its_images_are_dense_images_of_that_many_steps(tiny_backbone):
    few = METHODS.build("fewer_steps", {"step_ratio": 0.5})
    assert torch.equal(latents(tiny_backbone, few, 6), latents(tiny_backbone, METHODS.build("dense", {}), 3))


def test_its_cost_is_its_share_of_the_steps(tiny_backbone):
    meter = Meter(tiny_backbone, SamplerConfig(num_steps=8))
    for ratio, steps in ((1.0, 8), (0.5, 4), (0.3, 2), (0.01, 1)):
        method = METHODS.build("fewer_steps", {"step_ratio": ratio})
        cost, kept = meter.counted(method)
        assert cost.total * 8 == meter.dense.total * steps
        assert len(kept["ffn"]) == steps


@pytest.mark.parametrize("asked, steps", [(0.24, 9), (0.41, 7), (0.5, 6)])
def test_a_budget_is_met_to_the_nearest_step(tiny_backbone, asked, steps):
    meter = Meter(tiny_backbone, SamplerConfig(num_steps=12))
    solution = solve_budget(meter, "fewer_steps", {}, asked)
    assert METHODS.build("fewer_steps", {"step_ratio": solution.value}).num_steps(12) == steps
    assert solution.executed == pytest.approx(1 - steps / 12)


def test_the_schedule_still_spans_all_noise(tiny_backbone):
    config = SamplerConfig(num_steps=10)
    few = Loop(tiny_backbone, config, METHODS.build("fewer_steps", {"step_ratio": 0.4}))
    full = Loop(tiny_backbone, config)
    assert few.run.num_steps == 4 and full.run.num_steps == 10
    assert few.run.timesteps[0] == full.run.timesteps[0]
