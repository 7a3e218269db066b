"""Every axis of Shiva-DiT does what it says: trained for a few steps through the shared protocol, and each by an invariant."""

import pytest
import torch
from torch import nn

from harness.api import METHODS, Call, Method
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise
from harness.engine.tokens import AbsorbKeep, CachedKeep, Keep, PerRow
from harness.storage.store import Store
from harness.training.train import TrainConfig, TrainingSet, train
from methods.shiva.budget import BudgetLoss, mean_cost
from methods.shiva.config import ShivaConfig, training_options
from methods.shiva.exploration import Exploration
from methods.shiva.policy import LEARNED, RatioPolicy, nearest_root
from methods.shiva.router import Router, num_routers

AXES = {
    "estimator": ["teacher_contrast", "dense_contrast", "eq7", "eq7_prose", "output_gate", "block_vs_skip"],
    "surrogate": ["soft_rank", "soft_rank_binned", "sum_to_k", "softsort", "neuralsort", "gumbel", "sigmoid"],
    "ratio_policy": ["fixed", "per_layer", "per_timestep", "film", "structure_first", "random"],
    "router_groups": [1, "per_layer", "12_of_24"], "router_inputs": [[], ["prompt"]], "router_prenorm": [False],
    "budget_loss": ["batch"], "budget_integral": [1.0], "budget_unit": ["flops"], "first_block": [True],
    "rejected": ["cache", "merge"], "k_mode": ["per_sample"], "ratio_sampling": ["uniform"], "k_multiple": [8],
    "logit_noise": [0.0], "score_noise": [0.0],
}
POINTS = [(axis, value) for axis, values in AXES.items() for value in values]


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(5)
    latents = nn.functional.interpolate(torch.randn(12, 4, 2, 2), scale_factor=4, mode="bilinear")
    return TrainingSet(latents, [f"thing {i}" for i in range(12)], "test data")


def trained(backbone, data, folder, **options):
    """A method after 8 steps, and what training returned."""
    method = METHODS.build("shiva", {"router_lr": 3e-3, "policy_lr": 3e-2, **options})
    config = TrainConfig(steps=8, batch_size=4, warmup_steps=1, adapter_rank=2, distill_every=2)
    return method, train(backbone, method, config, data, Store(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "value"), POINTS)
def test_every_axis_trains_and_moves_the_router(tiny_backbone, data, tmp_path, axis, value):
    method, result = trained(tiny_backbone, data, tmp_path, **{axis: value})
    torch.manual_seed(0)
    untrained = METHODS.build("shiva", {axis: value})
    untrained.begin(Loop(tiny_backbone, SamplerConfig()).run)
    routed = method.routers.routers[-1]
    assert not torch.equal(routed.score.weight, untrained.routers.routers[-1].score.weight)
    assert all(torch.isfinite(p).all() for p in method.parameters())
    assert all(torch.isfinite(torch.tensor(points)).all() for points in result.series.values())
    learns = method.config.ratio_policy in LEARNED
    assert ("train/budget" in result.series) == learns


@pytest.mark.parametrize("selection", ["random", "norm"])
@pytest.mark.parametrize("unify", ["max", "cond"])
def test_controls_of_inference_share_the_whole_training(selection, unify):
    for stage in ("router", "policy", "joint"):
        assert training_options(ShivaConfig(selection=selection, unify=unify), stage) == training_options(ShivaConfig(), stage)
        assert training_options(ShivaConfig(rejected="cache"), stage) == training_options(ShivaConfig(), stage)
        assert training_options(ShivaConfig(rejected="merge"), stage) != training_options(ShivaConfig(), stage)


# ------------------------------------------------------------------------------------------ k of its own for each row


class Rows(Method):
    """Keeps a given number of tokens per row at every block."""

    name, sites = "rows", frozenset({"block"})

    def __init__(self, counts, together: bool) -> None:
        self.counts, self.together = counts, together

    def reduce(self, hidden_states, site):
        plans = [None if count == 64 else Keep(torch.arange(64).roll(site.block)[None, :count], 64) for count in self.counts]
        return PerRow(plans, 64) if self.together else plans[0]


def test_rows_with_their_own_k_equal_each_row_alone_in_value_and_gradient(tiny_backbone):
    backbone, counts = tiny_backbone, [20, 64, 41]
    run = Loop(backbone, SamplerConfig(guidance_scale=1.0)).run
    noise = initial_noise([1, 2, 3], backbone.latent_shape, torch.device("cpu"), torch.float32)
    levels, conditioning = torch.tensor([0.9, 0.5, 0.1]), backbone.encode(["a", "b", "c"])

    def denoised(rows: slice, together: bool):
        start = noise[rows].clone().requires_grad_()
        with attach(backbone, Rows(counts[rows], together), run) as injection:
            injection.begin_call(Call(step=0, timestep=levels[rows], seeds=torch.tensor([1, 2, 3])[rows], training=True))
            out = backbone.denoise(start, levels[rows] * 1000, {key: value[rows] for key, value in conditioning.items()})
            return out, torch.autograd.grad(out.square().sum(), start)[0]

    out, grad = denoised(slice(0, 3), together=True)
    for row in range(3):
        one_out, one_grad = denoised(slice(row, row + 1), together=False)
        torch.testing.assert_close(out[row:row + 1], one_out, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(grad[row:row + 1], one_grad, atol=1e-5, rtol=1e-3)


# ------------------------------------------------------------------------------------------ rejected tokens


def test_a_token_that_is_not_computed_repeats_its_last_residual():
    x = torch.randn(2, 6, 3)
    first = CachedKeep(torch.tensor([0, 1, 2]), 6, None)
    out = first.restore(first.reduce(x) + 1.0, x)
    assert torch.equal(out[:, 3:], x[:, 3:]), "nothing is known of a token that was never computed"
    second = CachedKeep(torch.tensor([2, 3]), 6, first.updated)
    out = second.restore(second.reduce(x) + 5.0, x)
    gained = (out - x)[0, :, 0]
    torch.testing.assert_close(gained, torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0, 0.0]))
    third = CachedKeep(torch.tensor([5]), 6, second.updated)
    torch.testing.assert_close((third.restore(third.reduce(x), x) - x)[0, :, 0], torch.tensor([1.0, 1.0, 5.0, 5.0, 0.0, 0.0]))


def test_a_rejected_token_joins_the_kept_token_it_resembles_and_shares_its_residual():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.1], [0.2, 5.0]]])
    plan = AbsorbKeep(torch.tensor([0, 1]), x)  # token 2 points like token 0, token 3 like token 1
    reduced = plan.reduce(x)
    torch.testing.assert_close(reduced, torch.tensor([[[2.0, 0.05], [0.1, 3.0]]]))
    out = plan.restore(reduced + torch.tensor([[[10.0, 0.0], [0.0, 20.0]]]), x)
    torch.testing.assert_close(out - x, torch.tensor([[[10.0, 0.0], [0.0, 20.0], [10.0, 0.0], [0.0, 20.0]]]))


# ------------------------------------------------------------------------------------------ policies and budgets


def randomised(kind: str) -> RatioPolicy:
    """A policy whose output layers are random instead of zero."""
    torch.manual_seed(1)
    policy = RatioPolicy(kind, 6, 0.6)
    for parameter in policy.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    return policy


def interaction(policy: RatioPolicy) -> float:
    """Largest part of the logits that is not a sum of a timestep's and a layer's."""
    logits = policy.logits(torch.linspace(0, 1, 7))
    return (logits - logits.mean(0) - logits.mean(1, keepdim=True) + logits.mean()).abs().max().item()


def test_film_couples_timestep_and_layer_and_the_additive_policy_does_not():
    assert interaction(randomised("additive")) < 1e-4
    assert interaction(randomised("film")) > 1e-2


def test_structure_first_spends_little_while_noise_is_high_and_is_alike_in_all_layers():
    ratios = RatioPolicy("structure_first", 6, 0.6)(torch.tensor([1.0, 0.5, 0.0]))
    assert (ratios[0] < ratios[1]).all() and (ratios[1] < ratios[2]).all()
    assert torch.equal(ratios[:, :1].expand(-1, 6), ratios)


def test_a_random_schedule_follows_the_seed_and_has_nothing_to_learn():
    def drawn(seed):
        torch.manual_seed(seed)
        return RatioPolicy("random", 6, 0.6)(torch.linspace(0, 1, 9)).detach()

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    assert drawn(3).std(0).min() > 0.02 and drawn(3).std(1).min() > 0.02
    assert not any(p.requires_grad for p in RatioPolicy("random", 6, 0.6).parameters())


@pytest.mark.parametrize("root", [-9.3, -0.4, 0.0, 0.07, 5.5])
def test_a_budget_is_found_in_few_evaluations_also_where_tokens_make_it_a_staircase(root):
    asked = []

    def smooth(x):
        asked.append(x)
        return float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)) - torch.sigmoid(torch.tensor(root, dtype=torch.float64)))

    assert abs(smooth(nearest_root(smooth, 0.0, 1e-6))) <= 1e-6 and len(asked) <= 16
    stairs = nearest_root(lambda x: round(smooth(x) * 50) / 50 + 0.003, 0.0, 1e-6)
    assert abs(smooth(stairs)) <= 0.011  # half a stair


@pytest.mark.parametrize("kind", ["film", "per_timestep", "structure_first", "random"])
@pytest.mark.parametrize("unit", ["tokens", "flops"])
def test_the_table_meets_the_target_in_its_unit_for_every_policy(tiny_backbone, kind, unit):
    torch.manual_seed(0)
    method = METHODS.build("shiva", {"keep_ratio": 0.55, "ratio_policy": kind, "budget_unit": unit})
    run = Loop(tiny_backbone, SamplerConfig(num_steps=6)).run
    method.begin(run)
    for parameter in method.policy.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    method.begin(run)
    assert method.ratios().std() > 0.01
    target = mean_cost(torch.tensor([0.55]), unit, run)
    torch.testing.assert_close(mean_cost(method.ratios().flatten(), unit, run), target, atol=1e-4, rtol=0)


def test_a_flops_budget_counts_attention_quadratically(tiny_backbone):
    run = Loop(tiny_backbone, SamplerConfig()).run
    dense = 24 * 64 * 32**2 + 4 * 64**2 * 32
    half = 24 * 32 * 32**2 + 4 * 32**2 * 32
    assert mean_cost(torch.tensor([0.5]), "flops", run).item() == pytest.approx(half / dense)
    assert mean_cost(torch.tensor([0.2, 0.8]), "flops", run) > mean_cost(torch.tensor([0.5, 0.5]), "flops", run)


def settled(**options) -> float:
    """Where a ratio ends that the task pulls upwards with a constant force."""
    loss, logit = BudgetLoss(0.6, 5.0, 0.2, **options), torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=0.2)
    for _ in range(1500):
        ratio = torch.sigmoid(logit)
        optimizer.zero_grad()
        (loss(ratio) - 1.0 * ratio).backward()
        optimizer.step()
    return torch.sigmoid(logit).item()


@pytest.mark.parametrize("kind", ["ema", "batch"])
def test_the_budget_settles_above_its_target_by_the_pull_over_twice_the_weight_and_an_integral_removes_it(kind):
    assert settled(kind=kind) == pytest.approx(0.6 + 1.0 / (2 * 5.0), abs=1e-3)
    assert settled(kind=kind, integral=0.05) == pytest.approx(0.6, abs=2e-3)


def test_the_batch_penalty_has_diffcrs_gradient():
    ratio = torch.tensor(0.8, requires_grad=True)
    loss = BudgetLoss(0.6, 5.0, 0.2, "batch")
    loss(torch.tensor(0.3))  # an earlier batch leaves no trace
    found, = torch.autograd.grad(loss(ratio), ratio)
    wanted, = torch.autograd.grad(5.0 * (ratio - 0.6)**2, ratio)
    torch.testing.assert_close(found, wanted)


def test_the_budget_sees_the_mean_over_all_ranks_and_differentiates_its_own():
    ratio = torch.tensor(0.8, requires_grad=True)
    loss = BudgetLoss(0.6, 5.0, 0.2)
    loss(ratio, lambda own: (own + 0.4) / 2).backward()
    assert loss.mean == pytest.approx(0.6) and ratio.grad.item() == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------------------------------ what only training does


def exploration(stage: str, **options) -> Exploration:
    return Exploration(ShivaConfig(**options), stage, 7, torch.Generator().manual_seed(0))


def strata(ratios: torch.Tensor) -> torch.Tensor:
    return ((ratios - 0.3) / (0.95 - 0.3) * 4).floor().long()


@pytest.mark.parametrize("rows", [4, 8])
def test_rows_with_a_ratio_of_their_own_fall_into_disjoint_strata_at_every_block(rows):
    draws, uniform = exploration("router"), exploration("router", ratio_sampling="uniform")
    for _ in range(10):
        counts = [torch.bincount(column, minlength=4) for column in strata(draws.warm_up_ratios(rows)).T]
        assert all(count.tolist() == [rows // 4] * 4 for count in counts)
    loose = torch.stack([torch.bincount(column, minlength=4) for column in strata(uniform.warm_up_ratios(rows)).T])
    assert (loose != rows // 4).any() and loose.sum() == 7 * rows


def test_with_one_ratio_for_a_batch_blocks_or_successive_batches_share_out_the_strata():
    draws, successive = exploration("router"), []
    for _ in range(40):
        row = strata(draws.warm_up_ratios(1))[0]
        if row.unique().numel() == 1:
            successive.append(int(row[0]))
        else:
            assert sorted(torch.bincount(row, minlength=4).tolist()) == [1, 2, 2, 2]
    assert 10 < len(successive) < 30 and set(successive) == {0, 1, 2, 3}


def test_noise_belongs_to_its_stage_and_temperatures_fall_and_hold():
    assert [exploration(stage).score_noise for stage in ("router", "policy", "joint")] == [0.1, 0.1, 0.0]
    logits = torch.zeros(2, 7)
    assert exploration("policy").logit_noise(logits).std() > 0.5
    assert not exploration("joint").logit_noise(logits).any()
    assert not exploration("policy", logit_noise=0.0).logit_noise(logits).any()
    path = [exploration(stage).temperatures(p) for stage in ("router", "policy", "joint") for p in (0.0, 0.5, 1.0)]
    for earlier, later in zip(path, path[1:], strict=False):
        assert later[0] <= earlier[0] and later[1] <= earlier[1]
    assert path[0] == (0.2, 0.1) and path[-1] == pytest.approx((0.05, 0.02)) and path[-3] == path[-1]


def test_the_papers_router_groups_scale_with_the_depth():
    assert [num_routers(g, 24) for g in ("4_of_24", "8_of_24", "12_of_24", "pairs", "per_layer", 1)] == [4, 8, 12, 12, 24, 1]
    assert [num_routers(g, 8) for g in ("4_of_24", "8_of_24", "12_of_24", "pairs", "per_layer", 1)] == [1, 3, 4, 4, 8, 1]


def test_a_normalising_router_does_not_see_the_mean_and_scale_of_a_token():
    torch.manual_seed(0)
    router = Router((32, 8, 8), 1, METHODS.config("shiva", {}))
    tokens, context = torch.randn(2, 20, 32), (torch.randn(2, 8), torch.randn(2, 8))
    scores = router(tokens, *context, 0)
    torch.testing.assert_close(router(3 * tokens + 7, *context, 0), scores, atol=1e-4, rtol=0)
    normal = torch.nn.functional.layer_norm(tokens, (32,))
    torch.testing.assert_close(router._project(tokens), router.token(normal), atol=1e-5, rtol=0)
