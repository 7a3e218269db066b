"""First-block cache: what is decided, what stands in, and that it is counted as it was decided."""

import copy

import pytest
import torch
from conftest import PROMPTS

from harness.api import METHODS
from harness.cost.budget import solve_budget
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample

CONFIG = SamplerConfig(num_steps=6, guidance_scale=3.0, batch_size=4)
SEEDS = [3, 1, 4, 159]


def build(sensitivity):
    return METHODS.build("first_block_cache", {"sensitivity": sensitivity})


def sampled(backbone, method, seeds=SEEDS, prompts=PROMPTS, config=CONFIG):
    return torch.cat([batch.latents for batch in sample(backbone, method, config, prompts, seeds)])


def test_a_skipped_step_ends_with_what_the_others_added_before(tiny_backbone):
    loop, method, states = Loop(tiny_backbone, SamplerConfig(num_steps=3, guidance_scale=1.0)), build(0.5), []
    method.begin(loop.run)
    method.pattern = (True, False, True)
    blocks = tiny_backbone.transformer.transformer_blocks

    def hook(module, args, kwargs, result):
        states.append(result[1])

    handles = [blocks[index].register_forward_hook(hook, with_kwargs=True) for index in (0, 3)]
    noise = initial_noise([1], tiny_backbone.latent_shape, torch.device("cpu"), torch.float32)
    with torch.no_grad(), attach(tiny_backbone, method, loop.run) as injection:
        for step in range(2):
            loop.predict(injection, step, noise, loop.conditioning(PROMPTS[:1]), torch.tensor([1]))
    for handle in handles:
        handle.remove()
    first, last, first_again, last_again = states
    torch.testing.assert_close(last_again - first_again, last - first, atol=1e-5, rtol=0)
    assert not torch.equal(first_again, first)


def test_a_step_is_computed_where_the_first_block_changed_by_the_threshold(tiny_backbone):
    method = build(0.8)  # a quarter
    method.begin(Loop(tiny_backbone, CONFIG).run)

    class Here:
        step, memory = 1, {}

        class call:  # noqa: N801
            guidance_halves, seeds = 2, torch.tensor([7, 8, 7, 8])

    method._first, method._others = torch.ones(4, 2, 3), torch.zeros(4, 2, 3)
    method.patterns = {7: (True,), 8: (True,)}
    change = torch.tensor([0.0, 0.2, 0.4, 0.4])[:, None, None]  # of image 7: 0.0 and 0.4, of image 8: 0.2 and 0.4
    assert method._decide(torch.ones(4, 2, 3) + change, Here) == [False, True, False, True]
    assert method.patterns == {7: (True, False), 8: (True, True)}
    assert method._first[:, 0, 0].tolist() == pytest.approx([1.0, 1.2, 1.0, 1.4])  # computed rows alone move the reference


def test_images_of_a_batch_decide_for_themselves(tiny_backbone):
    for sensitivity in torch.linspace(0.5, 0.98, 13).tolist():
        method = build(sensitivity)
        together = sampled(tiny_backbone, method)
        if len(set(method.patterns.values())) > 1:
            break
    else:
        pytest.fail("no sensitivity tells these images apart; the test needs other seeds")
    patterns = dict(method.patterns)
    alone = sampled(tiny_backbone, method, SEEDS[1:2], PROMPTS[1:2])
    assert method.patterns[SEEDS[1]] == patterns[SEEDS[1]]
    torch.testing.assert_close(alone[0], together[1], atol=2e-5, rtol=0)


def test_the_count_is_the_mean_over_what_images_decided(tiny_backbone):
    meter, method = Meter(tiny_backbone, CONFIG), build(0.9)
    method.begin(meter.run)
    half, most = (True, False) * 3, (True, True, True, True, True, False)
    method.patterns = {1: half, 2: half, 3: most}
    cost, kept = meter.counted(method)
    single = []
    for pattern in (half, most):
        follower = copy.copy(method)
        follower.pattern = pattern
        single.append(meter.counted(follower))
    assert cost.total == pytest.approx((2 * single[0][0].total + single[1][0].total) / 3, rel=1e-6)
    assert [row[1] for row in kept["ffn"]] == pytest.approx([1, 1 / 3, 1, 1 / 3, 1, 0])
    assert [row[0] for row in kept["ffn"]] == pytest.approx([1] * 6)  # the first block always runs


def test_a_budget_is_calibrated_on_other_images(tiny_backbone):
    meter = Meter(tiny_backbone, CONFIG)
    meter.calibration = [f"thing {i}" for i in range(8)], meter.calibration[1]
    solution = solve_budget(meter, "first_block_cache", {}, 0.2)
    assert solution.knob == "sensitivity" and solution.executed == pytest.approx(0.2, abs=0.05)
    method = build(solution.value)
    sampled(tiny_backbone, method)
    assert set(method.patterns) == set(SEEDS) and not set(SEEDS) & set(meter.calibration[1])
    assert 0 < meter.cut(method) < 0.6


def test_full_sensitivity_computes_every_step_bit_for_bit(tiny_backbone):
    assert torch.equal(sampled(tiny_backbone, build(1.0)), sampled(tiny_backbone, METHODS.build("dense", {})))
