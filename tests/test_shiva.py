"""Shiva-DiT: its equations on cases small enough to do by hand, and the claims that its estimators make."""

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from torch import nn
from torch.nn import functional as F

from harness.api import METHODS, Call, Site
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig
from harness.engine.tokens import Keep
from methods.shiva.budget import BudgetLoss
from methods.shiva.estimators import ESTIMATORS, Gated
from methods.shiva.policy import LEARNED, RatioPolicy
from methods.shiva.router import group_of
from methods.shiva.soft_topk import inclusion, soft_rank, standardise


def naive_rank(s: torch.Tensor, tau: float) -> torch.Tensor:
    """Eq. 5, transcribed."""
    return torch.stack([torch.stack([1 + sum(torch.sigmoid((row[j] - row[i]) / tau) for j in range(len(row)) if j != i)
                                     for i in range(len(row))]) for row in s])


# ------------------------------------------------------------------------------------------ soft top-k


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_soft_rank_equals_eq_5_in_value_and_gradient(chunk):
    s = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 9, dtype=torch.float64)
    mine, naive = soft_rank(s, 0.3, chunk), naive_rank(s, 0.3)
    torch.testing.assert_close(mine, naive)
    mine_grad, = torch.autograd.grad((mine * weight).sum(), s)
    naive_grad, = torch.autograd.grad((naive * weight).sum(), s)
    torch.testing.assert_close(mine_grad, naive_grad)


def test_soft_ranks_sum_to_the_triangle_number_and_ignore_a_shift():
    s = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    for tau in (0.01, 0.2, 5.0):
        torch.testing.assert_close(soft_rank(s, tau).sum(-1), torch.full((3,), 50 * 51 / 2, dtype=torch.float64))
    torch.testing.assert_close(soft_rank(s + 7, 0.2), soft_rank(s, 0.2))
    grad, = torch.autograd.grad((soft_rank(s, 0.2) * torch.randn(3, 50)).sum(), s)
    assert grad.sum(-1).abs().max() < 1e-9


def test_a_cold_soft_rank_is_the_hard_rank():
    s = torch.randperm(40).double()[None]
    hard = s.argsort(descending=True).argsort() + 1
    torch.testing.assert_close(soft_rank(s, 1e-3), hard.double())


def test_equal_scores_share_the_middle_rank_without_nan():
    scores = torch.zeros(1, 8, requires_grad=True)
    pi = inclusion(standardise(scores), 4.0, 0.2, 0.1)
    pi.sum().backward()
    torch.testing.assert_close(soft_rank(torch.zeros(1, 8), 0.2), torch.full((1, 8), 4.5))
    assert torch.isfinite(scores.grad).all()


def test_more_budget_raises_every_inclusion_probability_as_in_a_1():
    s, k = torch.randn(1, 20, dtype=torch.float64), torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    pi = inclusion(s, k, 0.2, 0.1)
    grad, = torch.autograd.grad(pi.sum(), k)
    expected = (pi * (1 - pi) / (0.1 * 20)).sum()
    torch.testing.assert_close(grad, expected.detach())
    assert grad > 0


# ------------------------------------------------------------------------------------------ estimators


def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A pre-norm residual block."""
    return x + torch.tanh(F.layer_norm(x, x.shape[-1:]) @ weight)


@pytest.fixture
def routed():
    """x (2, 10, 6), weight of the block, kept indices (2, 4), the teacher's residual."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 10, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    kept = torch.stack([torch.randperm(10)[:4] for _ in range(2)])
    return x, weight, kept.sort().values, torch.randn(2, 10, 6, dtype=torch.float64)


def through(estimator, x, weight, kept, teacher, pi):
    """Output of the routed block with the estimator's gate."""
    plan = Gated(Keep(kept, x.shape[1]), pi - pi.detach(), estimator, teacher if estimator == "teacher_contrast" else None)
    if plan.wants_dense:
        plan.take_dense(block(x, weight).detach())
    return plan.restore(block(plan.reduce(x), weight), x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gate_leaves_the_forward_value_untouched(routed, estimator):
    x, weight, kept, teacher = routed
    plain = Keep(kept, 10)
    expected = plain.restore(block(plain.reduce(x), weight), x)
    pi = torch.rand(2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.equal(through(estimator, x, weight, kept, teacher, pi), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_is_the_inner_product_it_claims(routed, estimator):
    x, weight, kept, teacher = routed
    pi = torch.rand(2, 10, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 10, 6, dtype=torch.float64)
    y = through(estimator, x, weight, kept, teacher, pi)
    loss = ((F.layer_norm(y, (6,)) - target) ** 2).sum()
    found, = torch.autograd.grad(loss, pi)

    rows = x.gather(1, kept[..., None].expand(-1, -1, 6)).requires_grad_()
    inside = block(rows, weight)
    out = x.scatter(1, kept[..., None].expand(-1, -1, 6), inside)
    out.retain_grad()
    ((F.layer_norm(out, (6,)) - target) ** 2).sum().backward()
    g = out.grad
    g_kept = g.gather(1, kept[..., None].expand(-1, -1, 6))
    at_input = (rows.grad * rows).sum(-1).detach()
    residual = (g_kept * (inside - rows)).sum(-1).detach()
    skip = (g * x).sum(-1)
    kept_part, rejected = {"eq7": (at_input, -skip), "eq7_prose": (-at_input, skip), "output_gate": (residual, 0 * skip),
                           "block_vs_skip": ((g_kept * inside).sum(-1).detach(), -skip),
                           "dense_contrast": (residual, (g * (block(x, weight) - x)).sum(-1)),
                           "teacher_contrast": (residual, (g * teacher).sum(-1))}[estimator]
    torch.testing.assert_close(found, rejected.scatter(1, kept, kept_part))


def test_eq_7_points_the_wrong_way_before_a_final_norm():
    """A regression test of a negative finding: on the last block Eq. 7 is minus the effect of running the block."""
    backbone = TinySD3.from_pipeline(tiny_pipeline(num_layers=2, dual_attention_layers=()))
    loop = Loop(backbone, SamplerConfig(num_steps=2, guidance_scale=1.0))
    gradients = {}
    target = torch.randn(2, 4, 8, 8)
    for estimator in ("eq7", "output_gate"):
        torch.manual_seed(3)
        method = METHODS.build("random_drop", {"keep_ratio": 0.5})
        pi = torch.full((2, 64), 0.5, requires_grad=True)
        inner = method.reduce

        def gated(hidden_states, site, estimator=estimator, pi=pi, inner=inner):
            plan = inner(hidden_states, site)
            return plan if plan is None else Gated(plan, pi - pi.detach(), estimator)

        method.reduce = gated
        with attach(backbone, method, loop.run) as injection:
            injection.begin_call(Call(step=0, timestep=torch.ones(2), seeds=torch.tensor([1, 2])))
            noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            prediction = backbone.denoise(noisy, torch.tensor([700.0, 300.0]), backbone.encode(["a", "b"]))
            gradients[estimator], = torch.autograd.grad(F.mse_loss(prediction, target), pi)
    kept = gradients["output_gate"] != 0
    correlation = torch.corrcoef(torch.stack([gradients["eq7"][kept], gradients["output_gate"][kept]]))[0, 1]
    assert correlation < -0.95
    assert gradients["eq7"][~kept].abs().max() < 1e-3 * gradients["eq7"][kept].abs().max()


# ------------------------------------------------------------------------------------------ router, policy, budget


def test_adjacent_blocks_share_a_router():
    assert [group_of(block, 8, 4) for block in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [group_of(block, 8, 1) for block in range(8)] == [0] * 8
    assert [group_of(block, 8, 8) for block in range(8)] == list(range(8))


@pytest.mark.parametrize("groups,count", [("pairs", 2), ("per_layer", 4), (1, 1), (3, 3)])
def test_router_sharing_sets_the_number_of_routers(tiny_backbone, groups, count):
    method = METHODS.build("shiva", {"router_groups": groups})
    method.begin(Loop(tiny_backbone, SamplerConfig()).run)
    assert len(method.routers.routers) == count


@pytest.mark.parametrize("given", ["time", "prompt", "layer"])
def test_each_context_input_reaches_the_scores(tiny_backbone, given):
    torch.manual_seed(0)
    method = METHODS.build("shiva", {"router_inputs": [given], "router_groups": 1})
    method.begin(Loop(tiny_backbone, SamplerConfig()).run)
    x, time, prompt = torch.randn(1, 64, 32), torch.randn(1, 32), torch.randn(1, 20)
    base = method.routers(x, time, prompt, 1)
    changed = {"time": (x, time + 1, prompt, 1), "prompt": (x, time, torch.randn(1, 20), 1), "layer": (x, time, prompt, 2)}
    for name, arguments in changed.items():
        assert torch.equal(method.routers(*arguments), base) == (name != given)


@pytest.mark.parametrize("kind", [*LEARNED, "fixed"])
def test_every_policy_starts_at_the_target(kind):
    ratios = RatioPolicy(kind, 5, 0.6)(torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(ratios, torch.full((2, 5), 0.6))


def test_the_additive_policy_is_decoupled():
    policy = RatioPolicy("additive", 5, 0.6)
    for head in (policy.time, policy.layer):
        nn.init.normal_(head[-1].weight)
    logits = policy.logits(torch.tensor([0.1, 0.5, 0.9]))
    centred = logits - logits.mean(0) - logits.mean(1, keepdim=True) + logits.mean()
    assert centred.abs().max() < 1e-4 and logits.std() > 0.1


@pytest.mark.parametrize("target", [0.3, 0.6, 0.85])
def test_the_table_meets_the_target_exactly_whatever_was_learned(tiny_backbone, target):
    torch.manual_seed(0)
    method = METHODS.build("shiva", {"keep_ratio": target})
    run = Loop(tiny_backbone, SamplerConfig(num_steps=6)).run
    method.begin(run)
    for head in (method.policy.time, method.policy.layer):
        nn.init.normal_(head[-1].weight, std=0.2)
    method.begin(run)
    assert method.ratios().std() > 0.01
    assert method.ratios().mean().item() == pytest.approx(target, abs=1e-5)
    table = torch.tensor(method.table).double()
    assert (table.mean() / 64).item() == pytest.approx(target, abs=1 / 64)


def test_the_budget_loss_pushes_towards_the_target_and_starts_at_the_first_mean():
    loss = BudgetLoss(target=0.6, weight=5.0, beta=0.2)
    logit = torch.tensor(2.0, requires_grad=True)
    first = torch.sigmoid(logit)
    loss(first)
    assert loss.mean == pytest.approx(first.item())
    optimizer = torch.optim.SGD([logit], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss(torch.sigmoid(logit)).backward()
        optimizer.step()
    assert torch.sigmoid(logit).item() == pytest.approx(0.6, abs=0.01)


def test_the_budget_average_is_not_differentiated():
    loss, ratio = BudgetLoss(0.6, 5.0, 0.2), torch.tensor(0.8, requires_grad=True)
    loss(ratio).backward()
    assert ratio.grad.item() == pytest.approx(5.0 * 2 * (0.8 - 0.6))


def test_the_routers_warm_up_is_shared_between_budgets_and_policies():
    def key(stage, **options):
        return METHODS.build("shiva", options).stage_key(stage)

    assert key("router", keep_ratio=0.6) == key("router", keep_ratio=0.8, ratio_policy="fixed")
    assert key("policy", keep_ratio=0.6) != key("policy", keep_ratio=0.8)
    assert key("router") != key("router", router_width=128)
    assert key("router") != key("router", estimator="eq7")
    assert key("joint", unify="max") == key("joint", unify="mean")


def test_exactly_k_tokens_are_computed_and_the_first_block_is_dense(tiny_backbone):
    torch.manual_seed(0)
    method = METHODS.build("shiva", {"keep_ratio": 0.5})
    run = Loop(tiny_backbone, SamplerConfig(num_steps=2)).run
    method.begin(run)
    for index in range(4):
        call = Call(step=0, timestep=torch.ones(2), seeds=torch.tensor([1, 1]), guidance_halves=2,
                    time_embedding=torch.randn(2, 32), pooled_prompt=torch.randn(2, 20))
        plan = method.reduce(torch.randn(2, 64, 32), Site(call, run, index, "block", ""))
        assert plan is None if index == 0 else plan.num_tokens == method.table[0][index - 1]
