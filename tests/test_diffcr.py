"""DiffCR: gates, bins, the blend between them, and a table that meets a budget."""

from dataclasses import replace

import pytest
import torch
from conftest import PROMPTS
from sites import make_run, make_site, started
from test_train import CONFIG as TRAIN
from test_train import data  # noqa: F401  (a fixture)

from harness.api import METHODS, Call, ConfigError
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample
from harness.storage.store import Store
from harness.training.train import train
from methods.diffcr.bins import bins_after, nearest_moves
from methods.diffcr.gates import gate_of

CONFIG = SamplerConfig(num_steps=4, guidance_scale=1.0)


def build(backbone, **options):
    torch.manual_seed(0)
    method = METHODS.build("diffcr", options)
    method.begin(Loop(backbone, CONFIG).run)
    return method


def trained_pass(backbone, method, level=0.6, features=None):
    """The prediction (1, C, H, W) of a training pass at one noise level, with gradients; `features` takes those of all blocks."""
    method.start_step(0.0, torch.tensor([level]))
    loop = Loop(backbone, CONFIG)
    noise = initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32)
    with attach(backbone, method, loop.run) as injection:
        injection.begin_call(Call(-1, torch.tensor([level]), torch.tensor([1]), 1, training=True))
        with injection.recording() as recorded:
            prediction = backbone.denoise(noise, torch.tensor([level * 1000]), backbone.encode(PROMPTS[:1]))
        if features is not None:
            features.extend(recorded)
        return prediction


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
    method.tabulate()
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


def test_a_blocks_output_is_affine_in_its_ratio_within_a_bin_and_bends_at_a_bin(tiny_backbone):
    method = build(tiny_backbone, keep_ratio=0.5)

    def output(ratio):
        set_ratio(method, ratio)
        features = []
        with torch.no_grad():
            trained_pass(tiny_backbone, method, features=features)
        return features[0][1]

    torch.testing.assert_close(output(0.45), (output(0.42) + output(0.48)) / 2, atol=1e-5, rtol=0)
    assert not torch.allclose(output(0.5), (output(0.45) + output(0.55)) / 2, atol=1e-4)


def test_tokens_that_are_not_kept_pass_bit_for_bit(tiny_backbone):
    method = build(tiny_backbone, keep_ratio=0.5)
    loop = Loop(tiny_backbone, CONFIG)
    noise = initial_noise([1], tiny_backbone.latent_shape, torch.device("cpu"), torch.float32)
    with torch.no_grad(), attach(tiny_backbone, method, loop.run) as injection, injection.recording() as features:
        loop.predict(injection, 1, noise, loop.conditioning(PROMPTS[:1]), torch.tensor([1]))
    assert [int((before != after).any(-1).sum()) for before, after in features] == method.table[1] == [32] * 4


@pytest.mark.parametrize("scope", ["ffn", "residual"])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_gate_teaches_every_router(tiny_backbone, scope, normalised):
    method = build(tiny_backbone, keep_ratio=0.5, gate_scope=scope, gate_norm=normalised)
    set_ratio(method, 0.5)
    trained_pass(tiny_backbone, method).square().sum().backward()
    assert (method.router_weights.grad.norm(dim=1) > 0).all()


def test_only_kept_tokens_teach_the_router():
    run = make_run(halves=1)
    method, hidden_states = started("diffcr", run, keep_ratio=0.5), torch.zeros(1, 64, 16)
    hidden_states[:, 32:, 0], hidden_states[:, :32, 1] = 1.0, 1.0
    with torch.no_grad():
        method.router_weights.zero_()[:, 0] = 1.0  # keeps the second half
    plan = method.reduce(hidden_states, make_site(run, kind="block", seeds=(5,)))
    block(plan, hidden_states).sum().backward()
    assert method.router_weights.grad[0, 0] > 0 and method.router_weights.grad[0, 1] == 0


def block(plan, hidden_states):
    """What comes out of a block that adds 1 to its tokens and has no feed-forward site."""
    return plan.restore(plan.execute(None, lambda x: x + 1, (plan.reduce(hidden_states),), {}), hidden_states)


def test_a_block_without_a_feed_forward_of_its_own_is_gated_on_its_residual():
    run, hidden_states = make_run(halves=1), torch.randn(2, 64, 16)
    method, memory = started("diffcr", run, keep_ratio=0.5), {}
    plan = method.reduce(hidden_states, make_site(run, kind="block", memory=memory))
    added = (block(plan, hidden_states) - hidden_states)[..., 0]
    wanted = torch.zeros(2, 64).scatter(1, plan.indices, torch.sigmoid(memory["scores"]).gather(1, plan.indices))
    torch.testing.assert_close(added, wanted, atol=1e-6, rtol=0)


def test_a_normalised_gate_is_one_with_the_gradient_of_the_gate_over_its_value():
    scores = torch.tensor([[-300.0, -2.0, 0.0, 3.0, 300.0]], requires_grad=True)
    gate = gate_of(scores, normalised=True)
    gate.sum().backward()
    assert torch.equal(gate, torch.ones(1, 5, 1))
    torch.testing.assert_close(scores.grad, 1 - torch.sigmoid(scores.detach()))  # g' / g


@pytest.mark.parametrize("step", [0.3, 0.15, 0.6, 0.0])
def test_bins_that_do_not_reach_one_are_refused(step):
    with pytest.raises(ConfigError, match=rf"diffcr.bin_step must divide 1.*{step}"):
        METHODS.build("diffcr", {"bin_step": step})


def test_another_backbone_than_it_was_trained_for_is_refused(tiny_backbone):
    with pytest.raises(ConfigError, match="diffcr was trained for 4 blocks of width 32, not for 4 of 16"):
        build(tiny_backbone).begin(make_run())


@pytest.mark.parametrize("scope", ["ffn", "residual"])
def test_what_is_counted_is_what_runs_and_the_routers_are_part_of_it(tiny_backbone, scope):
    config, counts = SamplerConfig(num_steps=3, guidance_scale=4.0, batch_size=2), []
    method = METHODS.build("diffcr", {"keep_ratio": 0.7, "gate_scope": scope})
    cost, counted = Meter(tiny_backbone, config).counted(method)
    list(sample(tiny_backbone, method, config, PROMPTS[:2], [1, 2], lambda injection: counts.append(injection.token_count)))
    assert {kind: counts[0].kept(kind, 3) for kind in counted} == counted
    assert counted["ffn"] == [[k / 64 for k in row] for row in method.table]
    assert cost.method == 3 * 2 * 4 * 2 * 64 * 32  # steps, guided halves, blocks, and a product of (N, D) with (D, 1)


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


@pytest.mark.parametrize(("goal", "moves"), [(-1, 0), (0.3, 0), (0.6, 2), (3.4, 4), (9, 5)])
def test_the_nearest_moves_are_found_on_plateaus_and_beyond_the_ends(goal, moves):
    assert [0, 1, 1, 2, 3, 5][nearest_moves([0, 1, 1, 2, 3, 5].__getitem__, 5, goal)] == [0, 1, 1, 2, 3, 5][moves]


@pytest.mark.parametrize("cut", [0.1, 0.28])
def test_a_trained_table_is_fitted_to_the_budget(tiny_backbone, cut):
    """By moves down and up from a table whose cut lies between."""
    meter = Meter(tiny_backbone, SamplerConfig(num_steps=2))
    torch.manual_seed(0)
    method = METHODS.build("diffcr", {"keep_ratio": 0.5})
    method.begin(meter.run)
    with torch.no_grad():
        method.ratio.copy_(torch.rand_like(method.ratio))
    fitted = method.fit_budget(lambda: meter.cut(method), cut)
    assert meter.cut(method) == pytest.approx(cut, abs=0.01)  # one move is six tokens of one block in one step here
    table = method.table
    method.fitted = None
    method.tabulate()
    method.load_fit(fitted)
    assert method.table == table


def test_training_pulls_the_mean_ratio_to_its_target(tiny_backbone, data, tmp_path):  # noqa: F811
    method = METHODS.build("diffcr", {"keep_ratio": 0.6, "regions": 1, "ratio_lr": 0.05, "ratio_weight": 3.0})
    config = replace(TRAIN, adapter="lora")
    trained = train(tiny_backbone, method, config, data, Store(tmp_path))
    assert set(trained.series) == {"train/diffusion", "train/ratio", "train/grad_norm"}
    first, last = trained.series["train/ratio"][0][1], trained.series["train/ratio"][-1][1]
    assert last < 0.5 * first
    assert float(method.ratio.detach().mean()) < 0.9


@pytest.mark.parametrize("scope", ["ffn", "residual"])
def test_gradient_checkpointing_learns_the_same(tiny_backbone, data, tmp_path, scope):  # noqa: F811
    options = {"keep_ratio": 0.6, "regions": 2, "ratio_lr": 0.05, "gate_scope": scope}
    series = []
    for frugal in (False, True):  # the block runs again in the backward pass, and each pass must find its own gate
        method, config = METHODS.build("diffcr", options), replace(TRAIN, adapter="lora", steps=4, gradient_checkpointing=frugal)
        series.append(train(tiny_backbone, method, config, data, Store(tmp_path)).series)
    assert series[0] == series[1]
