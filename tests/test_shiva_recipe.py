"""Shiva-DiT's recipe by hand: options, stages, temperatures, noise, ratios, budget, router and policy, a line each."""

import math

import pytest
import torch
from toy import Toy

from harness.api import METHODS, Call, Run, Site
from harness.engine.sampler import Loop, SamplerConfig
from methods.shiva import router as routers
from methods.shiva.budget import BudgetLoss, mean_cost
from methods.shiva.config import INPUTS, ShivaConfig, training_options
from methods.shiva.exploration import Exploration
from methods.shiva.policy import RatioPolicy, nearest_root, sinusoid
from methods.shiva.router import Router, RouterBank, group_of, num_routers
from methods.shiva.soft_topk import inclusion, standardise
from methods.shiva.surrogates import perturbation

DEFAULTS = {
    "keep_ratio": 0.6, "first_block": False, "k_multiple": 1, "budget_unit": "tokens", "budget_loss": "ema",
    "budget_weight": 20.0, "budget_beta": 0.2, "budget_integral": 0.0, "router_groups": "pairs", "router_width": 64,
    "router_inputs": ("time", "prompt", "layer"), "router_prenorm": True, "unify": "max", "selection": "router",
    "ratio_policy": "additive", "ratio_range": (0.3, 0.95), "ratio_strata": 4, "ratio_sampling": "stratified", "k_mode": "shared",
    "surrogate": "soft_rank", "estimator": "teacher_contrast", "tau_rank": (0.2, 0.05), "tau_sel": (0.1, 0.02),
    "score_noise": 0.1, "logit_noise": 1.0, "rejected": "identity", "router_lr": 3e-4, "policy_lr": 1e-4}
RUN = Run("toy", 4, (4, 4), 8, 2, (1.0, 0.5), 1)


def begun(**options):
    """Shiva on the toy: 4 blocks of width 4, 4 tokens, 4 steps."""
    torch.manual_seed(0)
    method = METHODS.build("shiva", {"router_width": 4, **options})
    method.begin(Loop(Toy(), SamplerConfig()).run)
    return method


def exploring(stage, rows=None, **options):
    """Its exploration and a generator in the same state."""
    return Exploration(ShivaConfig(**options), stage, 5, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(1)


# ------------------------------------------------------------------------------------------ options and stages


def test_the_defaults_are_the_papers_where_it_gives_them():
    assert ShivaConfig().__dict__ == DEFAULTS and INPUTS == ("time", "prompt", "layer")


@pytest.mark.parametrize("mode, together", [("shared", True), ("per_sample", False)])
def test_three_stages_take_a_half_and_two_quarters_and_adapters_train_in_the_last(mode, together):
    stages = METHODS.build("shiva", {"k_mode": mode}).stages
    found = [(stage.name, stage.share, stage.adapters, stage.one_timestep) for stage in stages]
    assert found == [("router", 0.5, False, False), ("policy", 0.25, False, together), ("joint", 0.25, True, together)]


def test_what_trains_in_a_stage_and_how_fast():
    method = begun(router_lr=0.3, policy_lr=0.1)
    for stage, names in {"router": ["router"], "policy": ["router", "policy"], "joint": ["router", "policy"]}.items():
        groups = method.start_stage(stage, torch.Generator())
        assert [group["name"] for group in groups] == names
        assert groups[0]["lr"] == 0.3 and "weight_decay" not in groups[0]
        assert len(groups[0]["params"]) == len(list(method.routers.parameters()))
        if stage != "router":
            assert (groups[1]["lr"], groups[1]["weight_decay"]) == (0.1, 0.0) and len(groups[1]["params"]) == 10
    assert [group["name"] for group in begun(ratio_policy="fixed").start_stage("joint", torch.Generator())] == ["router"]


def test_the_warm_up_knows_no_budget_and_no_stage_knows_what_only_sampling_reads():
    only_sampling = {"unify", "selection"}
    budget = {"keep_ratio", "ratio_policy", "budget_unit", "budget_loss", "budget_weight", "budget_beta", "budget_integral",
              "policy_lr", "logit_noise"}
    for stage, unused in (("router", only_sampling | budget), ("policy", only_sampling), ("joint", only_sampling)):
        assert set(training_options(ShivaConfig(), stage)) == set(DEFAULTS) - unused
        assert training_options(ShivaConfig(rejected="cache"), stage)["rejected"] == "identity"
        assert training_options(ShivaConfig(rejected="merge"), stage)["rejected"] == "merge"


# ------------------------------------------------------------------------------------------ exploration


def test_temperatures_fall_by_one_cosine_over_the_first_two_stages():
    taus = {"tau_rank": (0.2, 0.05), "tau_sel": (0.1, 0.02)}
    half = 0.5 ** 0.5
    falls = {("router", 0.0): 1.0, ("router", 0.5): (1 + half) / 2, ("router", 1.0): 0.5, ("policy", 0.0): 0.5,
             ("policy", 0.5): (1 - half) / 2, ("policy", 1.0): 0.0, ("joint", 0.0): 0.0, ("joint", 0.7): 0.0}
    for (stage, progress), fall in falls.items():
        found = exploring(stage, **taus)[0].temperatures(progress)
        assert found == pytest.approx((0.05 + 0.15 * fall, 0.02 + 0.08 * fall)), (stage, progress)


def test_noise_on_scores_ends_with_the_last_stage_and_noise_on_logits_is_of_the_second():
    for stage, score, logit in (("router", 0.3, 0.0), ("policy", 0.3, 2.0), ("joint", 0.0, 0.0)):
        exploration, generator = exploring(stage, score_noise=0.3, logit_noise=2.0)
        assert exploration.score_noise == score
        expected = logit * torch.randn(3, 5, generator=generator) if logit else torch.zeros(3, 5)
        exploration.config.__dict__["k_mode"] = "shared"
        assert torch.equal(exploration.logit_noise(torch.ones(3, 5)), expected)
    exploration, _ = exploring("policy", logit_noise=0.0)
    assert not exploration.logit_noise(torch.ones(1, 5)).any()


def test_score_noise_is_normal_or_gumbel_of_the_asked_spread():
    uniform = torch.tensor([[0.5, 0.8413447]])
    torch.testing.assert_close(perturbation("soft_rank", uniform, 0.1), torch.tensor([[0.0, 0.1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(perturbation("gumbel", uniform, 2.0), -2 * torch.log(-torch.log(uniform)))
    assert torch.isfinite(perturbation("gumbel", torch.tensor([[0.0, 1.0]]), 1.0)).all()


def test_ratios_of_the_warm_up_fill_their_range_uniformly_or_in_strata():
    exploration, generator = exploring("router", ratio_sampling="uniform", ratio_range=(0.2, 0.6))
    torch.testing.assert_close(exploration.warm_up_ratios(1), 0.2 + 0.4 * torch.rand(1, 5, generator=generator))
    exploration, _ = exploring("router", ratio_range=(0.2, 0.6))
    drawn = torch.cat([exploration.warm_up_ratios(1) for _ in range(400)])
    assert drawn.min() >= 0.2 and drawn.max() < 0.6 and exploration.draws == 400
    assert drawn.mean() == pytest.approx(0.4, abs=0.01) and drawn.std() == pytest.approx(0.4 / 12**0.5, abs=0.01)
    shared = (drawn == drawn[:, :1]).all(1)
    assert shared.float().mean() == pytest.approx(0.5, abs=0.08), "half of the draws share one ratio among the blocks"


def test_strata_of_the_warm_up_are_these_draws():
    for seed in range(6):
        exploration, generator = exploring("router", ratio_range=(0.5, 1.0), ratio_strata=3)
        exploration.generator.manual_seed(seed), generator.manual_seed(seed)
        exploration.draws = 7
        shared = bool(torch.rand((), generator=generator) < 0.5)
        count = 1 if shared else 5
        stratum = (torch.arange(count)[None] + 7 + 1) % 3
        if not shared:
            stratum = stratum[:, torch.randperm(5, generator=generator)]
        expected = 0.5 + 0.5 * ((stratum + torch.rand(1, count, generator=generator)) / 3).expand(1, 5)
        assert torch.equal(exploration.warm_up_ratios(1), expected) and exploration.draws == 8


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_with_a_ratio_of_their_own_take_strata_in_a_random_order(rows):
    orders = set()
    for seed in range(20):
        exploration = Exploration(ShivaConfig(ratio_range=(0.5, 1.0), ratio_strata=3, k_mode="per_sample"), "router", 5,
                                  torch.Generator().manual_seed(seed))
        drawn = exploration.warm_up_ratios(rows)
        assert exploration.draws == rows
        strata = ((drawn - 0.5) * 6 + 1e-4).long()
        assert all(len(set(column)) == rows for column in strata.T.tolist())
        orders.add(tuple(strata[:, 0].tolist()))
    assert len(orders) > 1


def test_processes_share_out_the_rows_of_a_draw_unless_all_have_one_k():
    whole = exploring("router", ratio_sampling="uniform", k_mode="per_sample")[0].warm_up_ratios(6)
    for rank in range(3):
        part, _ = exploring("router", ratio_sampling="uniform", k_mode="per_sample")
        part.rank, part.num_ranks = rank, 3
        assert torch.equal(part.warm_up_ratios(2), whole[2 * rank:2 * rank + 2])
        alike, _ = exploring("router", ratio_sampling="uniform", k_mode="shared")
        alike.rank, alike.num_ranks = rank, 3
        assert torch.equal(alike.warm_up_ratios(1), exploring("router", ratio_sampling="uniform")[0].warm_up_ratios(1))


# ------------------------------------------------------------------------------------------ a step


def test_a_step_of_the_warm_up_draws_ratios_and_validation_takes_the_middle():
    method = begun(ratio_range=(0.3, 0.9))
    method.start_stage("router", torch.Generator().manual_seed(4))
    method.start_step(0.5, torch.full((4,), 0.5), validating=True)
    assert method._ratios.tolist() == [[pytest.approx(0.6)] * 3] and method._score_noise == 0 and method.losses() == {}
    method.start_step(0.5, torch.full((4,), 0.5))
    assert method._ratios.shape == (1, 3) and 0.3 <= float(method._ratios.min()) and method._score_noise == 0.1
    assert method._taus == pytest.approx(method._exploration.temperatures(0.5)) and method.losses() == {}


@pytest.mark.parametrize("mode, rows", [("shared", 1), ("per_sample", 4)])
def test_a_step_of_the_policy_takes_the_budget_of_ratios_without_noise(mode, rows):
    method, level = begun(k_mode=mode, keep_ratio=0.7), torch.tensor([0.1, 0.4, 0.6, 0.9])
    method.start_stage("policy", torch.Generator().manual_seed(4))
    method.start_step(0.5, level)
    noise = torch.randn(rows, 3, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(method._ratios, torch.sigmoid(method.policy.logits(level[:rows]) + noise))
    assert float(method._mean_cost.detach()) == pytest.approx(0.7), "and not that of the noisy ones"
    assert float(method.losses()["budget"].detach()) == pytest.approx(0.0, abs=1e-6)
    method.start_step(0.5, level, validating=True)
    assert method._ratios.flatten().tolist() == pytest.approx([0.7] * 3 * rows) and method.losses() == {}
    method.start_stage("joint", torch.Generator())
    method.start_step(0.5, level)
    assert method._ratios.flatten().tolist() == pytest.approx([0.7] * 3 * rows) and set(method.losses()) == {"budget"}


def test_a_hand_made_policy_has_no_noise_and_no_budget_to_learn():
    method = begun(ratio_policy="structure_first")
    method.start_stage("policy", torch.Generator())
    method.start_step(0.0, torch.tensor([0.25]))
    assert torch.equal(method._ratios, method.policy(torch.tensor([0.25]))) and method.losses() == {}


def test_in_training_scores_are_standardised_and_noised_and_k_is_continuous():
    method = begun(estimator="output_gate", score_noise=0.3)
    method.start_stage("policy", torch.Generator().manual_seed(0))
    method.start_step(0.25, torch.full((2,), 0.5))
    call = Call(-1, torch.full((2,), 0.5), torch.tensor([5, 6]), training=True, time_embedding=torch.ones(2, 4),
                pooled_prompt=torch.ones(2, 2))
    x, site = torch.randn(2, 4, 4, requires_grad=True), Site(call, method.run, 2, "block", "")
    plan = method.reduce(x, site)
    scores = standardise(method.routers(x, call.time_embedding, call.pooled_prompt, 2))
    scores = scores + 0.3 * torch.special.ndtri(site.rand(4).clamp(1e-6, 1 - 1e-6))
    ratio = method._ratios[0, 1]
    pi = inclusion(scores, ratio * 4, *method._exploration.temperatures(0.25))
    assert plan.num_tokens == max(1, int(4 * float(ratio.detach()) + 1e-3))
    assert torch.equal(plan.positions(), scores.topk(plan.num_tokens).indices.sort(-1).values)
    weights = torch.arange(8.0).view(2, 4)
    gate, wanted = (torch.autograd.grad((made * weights).sum(), method.policy.anchor, retain_graph=True)[0]
                    for made in (plan._gate.squeeze(-1), pi))
    torch.testing.assert_close(gate, wanted)
    assert not plan._gate.any() and torch.autograd.grad(plan._gate.sum(), x, allow_unused=True)[0] is None
    assert method.reduce(x, Site(call, method.run, 0, "block", "")) is None, "block 0 is never reduced, as in Fig. 4b's axis 1-23"


# ------------------------------------------------------------------------------------------ budget


def test_cost_in_tokens_and_in_flops():
    ratios = torch.tensor([[0.5, 1.0], [0.25, 0.75]])
    assert mean_cost(ratios, "tokens", RUN).tolist() == [0.75, 0.5]
    # 24 D = 192 of linear layers and 4 N = 64 of attention for each token
    half, quarter, most = (192 * r + 64 * r * r for r in (0.5, 0.25, 0.75))
    assert mean_cost(ratios, "flops", RUN).tolist() == pytest.approx([(half / 256 + 1) / 2, (quarter + most) / 512])


def test_the_budget_loss_is_eq_12_and_13_or_the_square_with_an_integral():
    loss = BudgetLoss(target=0.6, weight=3.0, beta=0.2, integral=0.5)
    cost = torch.tensor(0.8, requires_grad=True)
    assert float(loss(cost)) == pytest.approx(0.8 * (2 * 3 * 0.2 + 0.5 * 0.2))
    second = loss(torch.tensor(0.7, requires_grad=True))
    assert loss.mean == pytest.approx(0.2 * 0.7 + 0.8 * 0.8) and loss.summed == pytest.approx(0.3)
    assert float(second) == pytest.approx(0.7 * (2 * 3 * (0.78 - 0.6) + 0.5 * 0.3))
    batch = BudgetLoss(0.6, 3.0, 0.2, kind="batch")
    batch(torch.tensor(0.8))
    assert float(batch(torch.tensor(0.7))) == pytest.approx(0.7 * 2 * 3 * 0.1)
    again = BudgetLoss(0.6, 3.0, 0.2, integral=0.5)
    again.load_state(loss.state())
    assert (again.mean, again.summed) == (loss.mean, loss.summed)


def test_the_budget_of_a_training_has_the_options_of_the_method():
    method = begun(keep_ratio=0.5, budget_weight=7.0, budget_beta=0.3, budget_loss="batch", budget_integral=0.2,
                   budget_unit="flops")
    method.start_stage("policy", torch.Generator())
    budget, linear, attention = method.budget, 24 * 4, 4 * 4
    assert (budget.weight, budget.beta, budget.kind, budget.integral) == (7.0, 0.3, "batch", 0.2)
    assert budget.target == pytest.approx((linear / 2 + attention / 4) / (linear + attention))


def test_a_table_has_the_asked_mean_and_k_is_a_floor():
    method = begun(keep_ratio=0.6, ratio_policy="fixed")
    assert method.table == [[2] * 3] * 4 and begun(keep_ratio=1.0).table == [[4] * 3] * 4
    assert begun(keep_ratio=0.6, first_block=True, ratio_policy="fixed").table == [[2] * 4] * 4
    assert begun(keep_ratio=0.6, k_multiple=3, ratio_policy="fixed").table == [[3] * 3] * 4
    method = begun(keep_ratio=0.55, ratio_policy="structure_first")
    assert float(method.ratios().mean()) == pytest.approx(0.55, abs=1e-6)


def test_a_fitted_budget_is_within_a_ten_thousandth_where_it_can_be_met():
    method, asked = begun(ratio_policy="additive"), []

    def cut():
        asked.append(1 - float(torch.sigmoid(method.policy.shift + method.policy.anchor)))
        return asked[-1]

    torch.manual_seed(0)
    method.tabulate = lambda: method.policy.shift.fill_(method.fitted["shift"])
    method.table = [[2] * 3] * 4
    with pytest.MonkeyPatch.context() as patch:  # the blocks' formula, continuous and near the truth
        patch.setattr("methods.shiva.mean_cost",
                      lambda ratios, unit, run: torch.sigmoid(method.policy.shift + method.policy.anchor) ** 1.1)
        fitted = method.fit_budget(cut, 0.37)
    assert abs(asked[-1] - 0.37) < 1e-4 and 2 <= len(asked) <= 5 and method.fitted == fitted
    assert abs(asked[-2] - 0.37) >= 1e-4, "it stops at the first that is near enough"
    assert float(method.policy.shift) == pytest.approx(fitted["shift"])


def test_a_root_is_bracketed_from_its_start():
    seen = []

    def excess(x):
        seen.append(x)
        return x - 3.3

    assert nearest_root(excess, 0.0, tolerance=1e-6) == pytest.approx(3.3, abs=1e-6) and seen[:5] == [0.0, 0.25, 0.75, 1.75, 3.75]
    seen.clear()
    assert nearest_root(lambda x: seen.append(x) or (0.0 if abs(x) < 1 else x), 0.0, 1e-9) == 0.0 and len(seen) == 1
    seen.clear()
    nearest_root(lambda x: seen.append(x) or (x > 0.1) - 0.4, 0.0, 1e-9, rounds=7)
    assert len(seen) == 7


# ------------------------------------------------------------------------------------------ router


@pytest.mark.parametrize("prenorm", [True, False])
def test_a_router_is_eq_8_and_9(prenorm):
    torch.manual_seed(0)
    router = Router((6, 5, 3), 2, ShivaConfig(router_width=4, router_prenorm=prenorm))
    x, time, prompt = 3 * torch.randn(2, 7, 6) + 1, torch.randn(2, 5), torch.randn(2, 3)
    found = router(x, time, prompt, 1)
    norm = torch.nn.functional.layer_norm
    tokens = router.token(norm(x, (6,)) if prenorm else x)
    context = router.time(time) + router.prompt(norm(prompt, (3,))) + router.layer_proj(router.layer.weight[1])
    hidden = torch.nn.functional.silu(tokens + context[:, None])
    torch.testing.assert_close(found, (norm(hidden, (4,)) @ router.score.weight[0]), atol=1e-6, rtol=1e-4)
    assert router.layer.weight.shape == (2, 64) and router.score.bias is None
    assert Router((6, 5, 3), 1, ShivaConfig(router_width=512)).score.weight.detach().std() == pytest.approx(0.02, abs=0.004)


def test_no_part_of_the_normalisation_is_lost_where_a_token_hardly_varies():
    router = Router((4, 5, 3), 1, ShivaConfig(router_width=4, router_inputs=()))
    x = torch.tensor([[[1.0, 1.001, 0.999, 1.0]]], dtype=torch.float32)
    expected = router.token(torch.nn.functional.layer_norm(x, (4,)))
    torch.testing.assert_close(router._project(x), expected, atol=5e-3, rtol=5e-2)


def test_groups_of_adjacent_blocks_share_a_router():
    assert [group_of(block, 7, 3) for block in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    counts = {("pairs", 7): 4, ("pairs", 8): 4, ("per_layer", 7): 7, (3, 7): 3, ("4_of_24", 24): 4, ("12_of_24", 8): 4,
              ("4_of_24", 2): 1, ("8_of_24", 10): 3}
    assert {key: num_routers(*key) for key in counts} == counts
    bank = RouterBank(5, 2, (4, 4, 2), ShivaConfig(router_width=4))
    assert bank.places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)] and [r.layer.num_embeddings for r in bank.routers] == [3, 2]
    assert routers.LAYER_WIDTH == 64


# ------------------------------------------------------------------------------------------ policy


def test_the_policy_embeds_noise_levels_on_the_scale_of_a_thousand():
    found = sinusoid(torch.tensor([0.0, 0.3]), 6)
    angles = [300 * 10000 ** (-i / 3) for i in range(3)]
    assert found[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert found[1].tolist() == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-4)
    assert sinusoid(torch.zeros(1)).shape == (1, 256)


def test_the_additive_policy_is_eq_10_and_11():
    torch.manual_seed(0)
    policy, level = RatioPolicy("additive", 3, 0.6), torch.tensor([0.2, 0.9])
    assert torch.allclose(policy(level), torch.tensor(0.6)) and float(policy.anchor) == pytest.approx(math.log(1.5), abs=1e-6)
    for head in (policy.time, policy.layer):
        torch.nn.init.normal_(head[2].weight), torch.nn.init.normal_(head[2].bias)
    policy.shift.fill_(0.25)
    expected = policy.time(sinusoid(level)) + policy.layer(policy.embedding.weight).T + policy.anchor + 0.25
    torch.testing.assert_close(policy(level), torch.sigmoid(expected))
    assert [type(part).__name__ for part in policy.time] == ["Linear", "SiLU", "Linear"]
    assert {tuple(p.shape) for p in policy.time.parameters()} == {(256, 256), (256,), (1, 256), (1,)}


def test_hand_made_schedules_by_hand():
    level = torch.tensor([1.0, 0.5, 0.0])
    ramp = RatioPolicy("structure_first", 2, 0.6).logits(level) - math.log(1.5)
    assert ramp[:, 0].tolist() == pytest.approx([-1.5, 0.0, 1.5], abs=1e-6) and torch.equal(ramp[:, 0], ramp[:, 1])
    torch.manual_seed(3)
    policy = RatioPolicy("random", 2, 0.6)
    assert policy.random_time.shape == (16,) and not policy.anchor.requires_grad
    knots = policy.random_time
    for place, value in ((0.0, knots[0]), (1.0, knots[15]), (2.25 / 15, 0.75 * knots[2] + 0.25 * knots[3])):
        found = policy.logits(torch.tensor([place])) - math.log(1.5) - policy.random_layer
        assert found[0].tolist() == pytest.approx([float(value)] * 2, abs=1e-5)


def test_film_scales_and_shifts_the_layers_features():
    torch.manual_seed(0)
    policy, level = RatioPolicy("film", 3, 0.6), torch.tensor([0.2])
    torch.nn.init.normal_(policy.modulation[2].weight), torch.nn.init.normal_(policy.output.weight)
    scale, offset = policy.modulation(sinusoid(level))[0].split(256)
    expected = policy.output((1 + scale) * policy.layer_hidden(policy.embedding.weight) + offset).squeeze(-1)
    torch.testing.assert_close(policy.logits(level)[0], expected + policy.anchor)


def test_a_ratio_of_one_is_a_finite_logit():
    assert float(RatioPolicy("fixed", 1, 1.0).anchor) == pytest.approx(math.log(999999), rel=1e-2)


def test_a_stage_that_goes_on_has_its_budget_and_its_draws():
    method = begun()
    method.start_stage("policy", torch.Generator())
    method.load_training_state({"budget_mean": 0.4, "budget_summed": -1.0, "draws": 9})
    assert method.training_state() == {"budget_mean": 0.4, "budget_summed": -1.0, "draws": 9}
