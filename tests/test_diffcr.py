"""DiffCR: gates, bins, the blend between them, and a table that meets a budget."""

import pytest
import torch
from conftest import PROMPTS
from test_train import CONFIG as TRAIN
from test_train import data  # noqa: F401  (a fixture)

from harness.api import METHODS
from harness.budget import solve_budget
from harness.flops import Meter
from harness.injection import attach
from harness.sampler import Loop, SamplerConfig, initial_noise
from harness.store import Store
from harness.train import train
from methods.diffcr.bins import bins_after

CONFIG = SamplerConfig(num_steps=4, guidance_scale=1.0)


def build(backbone, **options):
    torch.manual_seed(0)
    method = METHODS.build("diffcr", options)
    method.begin(Loop(backbone, CONFIG).run)
    return method


def trained_pass(backbone, method, level=0.6):
    """The prediction (1, C, H, W) of a training pass at one noise level, with gradients."""
    from harness.api import Call

    method.start_step(0.0, torch.tensor([level]))
    loop = Loop(backbone, CONFIG)
    noise = initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32)
    with attach(backbone, method, loop.run) as injection:
        injection.begin_call(Call(-1, torch.tensor([level]), torch.tensor([1]), 1, training=True))
        return backbone.denoise(noise, torch.tensor([level * 1000]), backbone.encode(PROMPTS[:1]))


def set_ratio(method, value):
    with torch.no_grad():
        method.ratio.fill_(value)


@pytest.mark.parametrize("scope", ["ffn", "residual"])
def test_a_gate_of_one_at_full_ratio_is_the_dense_model(tiny_backbone, scope):
    method = build(tiny_backbone, gate_norm=True, gate_scope=scope, keep_ratio=0.8)
    with torch.no_grad():
        torch.testing.assert_close(trained_pass(tiny_backbone, method), dense_pass(tiny_backbone), atol=1e-5, rtol=0)


def dense_pass(backbone, level=0.6):
    noise = initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32)
    return backbone.denoise(noise, torch.tensor([level * 1000]), backbone.encode(PROMPTS[:1]))


def test_a_fresh_gate_halves_the_feed_forward_and_is_no_identity(tiny_backbone):
    method = build(tiny_backbone, keep_ratio=0.8)
    with torch.no_grad():
        method.router_weights.zero_()
        fresh = trained_pass(tiny_backbone, method)
        for block in tiny_backbone.transformer.transformer_blocks:
            block.ff.net[2].weight.div_(2), block.ff.net[2].bias.div_(2)
        halved = dense_pass(tiny_backbone)
        for block in tiny_backbone.transformer.transformer_blocks:
            block.ff.net[2].weight.mul_(2), block.ff.net[2].bias.mul_(2)
    torch.testing.assert_close(fresh, halved, atol=1e-5, rtol=0)


def test_at_a_bin_training_computes_what_sampling_computes(tiny_backbone):
    method = build(tiny_backbone, keep_ratio=0.5)
    set_ratio(method, 0.5)
    method._export()
    assert {k for row in method.table for k in row} == {32}
    loop = Loop(tiny_backbone, CONFIG)
    level = loop.run.timesteps[1]
    with torch.no_grad(), attach(tiny_backbone, method, loop.run) as injection:
        noise = initial_noise([1], tiny_backbone.latent_shape, torch.device("cpu"), torch.float32)
        sampled = loop.predict(injection, 1, noise, loop.conditioning(PROMPTS[:1]), torch.tensor([1]))
    with torch.no_grad():
        torch.testing.assert_close(trained_pass(tiny_backbone, method, level), sampled, atol=1e-5, rtol=0)


def test_the_ratios_gradient_is_the_slope_between_its_bins(tiny_backbone):
    method = build(tiny_backbone, keep_ratio=0.5, regions=1)
    with torch.no_grad():
        method.ratio.copy_(torch.tensor([[0.44], [0.61], [0.73], [0.52]]))
    loss = trained_pass(tiny_backbone, method).square().sum()
    loss.backward()
    found, change = method.ratio.grad.clone(), 1e-3
    for block in (0, 2, 3):
        with torch.no_grad():
            method.ratio[block] += change
            up = trained_pass(tiny_backbone, method).square().sum()
            method.ratio[block] -= 2 * change
            down = trained_pass(tiny_backbone, method).square().sum()
            method.ratio[block] += change
        assert float(found[block]) == pytest.approx(float((up - down) / (2 * change)), rel=0.05, abs=0.05)


def test_only_kept_tokens_teach_the_router_and_through_the_gate(tiny_backbone):
    method = build(tiny_backbone, keep_ratio=0.5)
    set_ratio(method, 0.5)
    trained_pass(tiny_backbone, method).square().sum().backward()
    assert (method.router_weights.grad.norm(dim=1) > 0).all()


def test_there_is_one_ratio_for_each_block_and_region(tiny_backbone):
    assert build(tiny_backbone, regions=1).ratio.numel() == 4
    assert build(tiny_backbone, regions=4).ratio.numel() == 16
    method = build(tiny_backbone, regions=4)
    assert [method.region(level) for level in (0.0, 0.24, 0.25, 0.74, 0.99, 1.0)] == [0, 0, 1, 2, 3, 3]


def test_moves_go_up_one_bin_at_a_time_where_a_shift_would_go_first(tiny_backbone):
    method = build(tiny_backbone, regions=1, keep_ratio=0.5)
    with torch.no_grad():
        method.ratio.copy_(torch.tensor([[0.9], [0.3], [0.55], [0.8]]))
    tables = [bins_after(moves, method.ratio.detach(), method.num_bins).flatten() for moves in range(method._num_moves() + 1)]
    assert tables[0].tolist() == [1, 1, 1, 1] and tables[-1].tolist() == [10, 10, 10, 10]
    for before, after in zip(tables, tables[1:], strict=False):
        assert (after - before).sum() == 1 and (after >= before).all()
    assert [9, 3, 6, 8] in [table.tolist() for table in tables] or [9, 3, 5, 8] in [table.tolist() for table in tables]


@pytest.mark.parametrize("cut", [0.1, 0.3])
def test_a_trained_table_is_fitted_to_the_budget(tiny_backbone, cut):
    meter = Meter(tiny_backbone, SamplerConfig(num_steps=4))
    solution = solve_budget(meter, "diffcr", {}, cut)
    torch.manual_seed(0)
    method = METHODS.build("diffcr", {solution.knob: solution.value})
    method.begin(meter.run)
    with torch.no_grad():
        method.ratio.copy_(torch.rand_like(method.ratio))
    fitted = method.fit_budget(lambda: meter.cut(method), cut)
    assert meter.cut(method) == pytest.approx(cut, abs=0.01)  # one move is six tokens of one block in one step here
    table = method.table
    method._moves = None
    method._export()
    method.load_fit(fitted)
    assert method.table == table


def test_training_pulls_the_mean_ratio_to_its_target(tiny_backbone, data, tmp_path):  # noqa: F811
    method = METHODS.build("diffcr", {"keep_ratio": 0.6, "regions": 1, "ratio_lr": 0.05, "ratio_weight": 3.0})
    config = TRAIN.__class__(**{**TRAIN.__dict__, "adapter": "lora", "steps": 16, "validate_every": 0})
    trained = train(tiny_backbone, method, config, data, Store(tmp_path))
    assert set(trained.series) == {"train/diffusion", "train/ratio", "train/grad_norm"}
    first, last = trained.series["train/ratio"][0][1], trained.series["train/ratio"][-1][1]
    assert last < 0.5 * first
    assert float(method.ratio.detach().mean()) < 0.9
