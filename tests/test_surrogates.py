"""Surrogates of hard top-k: the identities they must satisfy, and closed-form gradients against autograd."""

import pytest
import torch
from torch.autograd import gradcheck

from harness.api import ConfigError
from methods.shiva.soft_topk import BLOCK_ELEMENTS, pairwise_rank, soft_rank, soft_rank_binned, standardise
from methods.shiva.surrogates import SURROGATE_NAMES, SURROGATES, inclusion, perturbation

WITH_K = [name for name in SURROGATE_NAMES if name != "sigmoid"]
EXACT_SUM = ["sum_to_k", "gumbel"]


def normal(batch: int, num: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, num, generator=torch.Generator().manual_seed(num), dtype=dtype)


def value_and_gradient(function, scores: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.clone().requires_grad_()
    out = function(scores)
    return out.detach(), torch.autograd.grad((out * weight).sum(), scores)[0]


# ------------------------------------------------------------------------------------------ soft rank


@pytest.mark.parametrize("num,elements", [(1, 1), (7, 3), (7, 40), (300, 5000), (1100, BLOCK_ELEMENTS)])
@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.3])  # at 1e-3 products of exponentials would overflow
def test_the_chunked_soft_rank_equals_naive_autograd(num, elements, tau):
    scores, weight = normal(2, num), normal(2, num).flip(1)
    naive = value_and_gradient(lambda s: pairwise_rank(s, tau), scores, weight)
    mine = value_and_gradient(lambda s: soft_rank(s, tau, elements), scores, weight)
    torch.testing.assert_close(mine, naive, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("spread", [1.0, 30.0, 50.0, 1e4])
def test_far_apart_scores_do_not_overflow_in_float32(spread):
    scores = spread * torch.linspace(-1, 1, 64)[None]
    exact = pairwise_rank(scores.double(), 0.5)
    torch.testing.assert_close(soft_rank(scores, 0.5).double(), exact, atol=1e-4, rtol=0)


def test_the_backward_pass_of_the_soft_rank_keeps_only_the_scores():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        soft_rank(normal(1, 400).requires_grad_(), 0.2)
        soft_rank_binned(normal(1, 400).requires_grad_(), 0.2)
    assert saved == [400, 400]


@pytest.mark.parametrize("rank", [soft_rank, soft_rank_binned])
@pytest.mark.parametrize("tau", [0.05, 0.2, 5.0])
def test_ranks_sum_to_the_triangle_number_ignore_a_shift_and_have_gradients_that_cancel(rank, tau):
    scores, weight = normal(3, 120), normal(3, 120).flip(1)
    value, gradient = value_and_gradient(lambda s: rank(s, tau), scores, weight)
    torch.testing.assert_close(value.sum(-1), torch.full((3,), 120 * 121 / 2, dtype=torch.float64))
    torch.testing.assert_close(rank(scores + 3, tau), value)
    assert gradient.sum(-1).abs().max() < 1e-8 * gradient.abs().max() * 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.05, 0.2])
@pytest.mark.parametrize("num", [16, 1000])
def test_the_binned_soft_rank_is_within_a_thousandth_of_the_exact_one(num, tau, dtype):
    scores, weight = standardise(normal(2, num)), normal(2, num).flip(1)
    exact = value_and_gradient(lambda s: soft_rank(s, tau), scores, weight)
    binned = value_and_gradient(lambda s: soft_rank_binned(s, tau), scores.to(dtype), weight.to(dtype))
    assert (exact[0] - binned[0]).abs().max() / num < 1e-3
    assert (exact[1] - binned[1]).norm() / exact[1].norm() < 1e-3


def test_an_outlier_does_not_spoil_the_binned_soft_rank():
    scores = normal(1, 1000)
    scores[0, 0] = 40.0
    assert (soft_rank_binned(scores, 0.1) - soft_rank(scores, 0.1)).abs().max() / 1000 < 1e-3


@pytest.mark.slow
def test_the_form_that_a_compiler_fuses_is_the_same_function():
    for num in (33, 64):
        scores, weight = normal(2, num), normal(2, num).flip(1)
        plain = value_and_gradient(lambda s: soft_rank(s, 0.2), scores, weight)
        fused = value_and_gradient(lambda s: soft_rank(s, 0.2, fused=True), scores, weight)
        torch.testing.assert_close(fused, plain)


def test_the_closed_form_that_is_compiled_on_cuda_is_the_gradient():
    from methods.shiva.soft_topk import pairwise_rank_gradient

    scores, weight = normal(2, 30), normal(2, 30).flip(1)
    _, gradient = value_and_gradient(lambda s: pairwise_rank(s, 0.2), scores, weight)
    torch.testing.assert_close(pairwise_rank_gradient(scores, weight, 0.2), gradient)


# ------------------------------------------------------------------------------------------ every surrogate


@pytest.mark.parametrize("name", SURROGATE_NAMES)
@pytest.mark.parametrize("k", [torch.tensor(3.4), torch.tensor([2.6, 5.3])], ids=["one k", "k per row"])
def test_every_surrogate_differentiates_rightly_in_scores_and_k(name, k):
    if name == "soft_rank_binned":
        pytest.skip("its backward is the closed form on bins, not the derivative of the binned value; compared above")
    k = k.double().requires_grad_()
    scores = normal(2, 8).requires_grad_()
    if name == "sigmoid":
        assert gradcheck(lambda s: inclusion(name, s, k, 0.3, 0.1), (scores,))
        return
    assert gradcheck(lambda s, k: inclusion(name, s, k, 0.3, 0.1), (scores, k))


@pytest.mark.parametrize("name", SURROGATE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("k", [0.0, 1e-3, 4.0, 49.999, 50.0])
def test_values_and_gradients_are_finite_at_equal_scores_and_extreme_k(name, dtype, equal, k):
    scores = (torch.zeros(2, 50, dtype=dtype) if equal else 4 * normal(2, 50, dtype)).requires_grad_()
    budget = torch.tensor(k, dtype=dtype, requires_grad=True)
    pi = inclusion(name, scores, budget, 0.02, 0.02)
    gradients = torch.autograd.grad((pi * normal(2, 50, dtype)).sum(), (scores, budget), allow_unused=True)
    assert pi.dtype == dtype and pi.shape == (2, 50)
    assert (pi >= 0).all() and (pi <= 1 + 1e-6).all()
    assert all(g is None or torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", [name for name in SURROGATE_NAMES if name not in ("softsort", "neuralsort")])
def test_a_higher_score_never_has_a_lower_probability(name):
    pi = inclusion(name, normal(1, 60), 20.0, 0.2, 0.1)
    in_order = pi[0, normal(1, 60)[0].argsort()]
    assert (in_order.diff() >= -1e-6).all() and in_order[-1] > in_order[0]


@pytest.mark.parametrize("name", [name for name in WITH_K if name != "neuralsort"])
def test_a_cold_surrogate_is_hard_top_k(name):
    scores = standardise(torch.randperm(40, generator=torch.Generator().manual_seed(0)).double()[None])
    hard = torch.zeros(1, 40, dtype=torch.float64).scatter(1, scores.topk(12).indices, 1.0)
    pi = inclusion(name, scores, 12.5 if "rank" in name else 12.0, 4e-3, 1e-3)
    torch.testing.assert_close(pi, hard, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", WITH_K)
def test_more_budget_raises_every_probability_that_competes_for_it(name):
    k = torch.tensor(8.3, dtype=torch.float64, requires_grad=True)
    pi = inclusion(name, normal(1, 20), k, 0.2, 0.1)
    gain = torch.stack([torch.autograd.grad(p, k, retain_graph=True)[0] for p in pi[0]])
    assert (gain >= 0).all() and 0.5 < gain.sum() < 1.1


@pytest.mark.parametrize("name", EXACT_SUM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1.0, 300.5, 999.0])
def test_sum_to_k_sums_to_k_and_hands_out_the_whole_of_a_budget_change(name, dtype, k):
    budget = torch.tensor([k, k / 2], dtype=dtype, requires_grad=True)
    pi = inclusion(name, normal(2, 1000, dtype), budget, 0.1, 0.1)
    assert (pi.double().sum(-1) - budget.double()).abs().max() < 1e-4
    gain, = torch.autograd.grad(pi.sum(), budget)
    torch.testing.assert_close(gain, torch.ones_like(gain))


@pytest.mark.parametrize("name", ["softsort", "neuralsort"])
@pytest.mark.parametrize("k", [5.0, 5.5])
def test_relaxed_permutations_sum_to_k_where_nothing_is_clipped(name, k):
    budget = torch.tensor(k, dtype=torch.float64, requires_grad=True)
    pi = inclusion(name, normal(1, 40), budget, 1.0, 0.1)
    assert pi.max() < 1
    gain, = torch.autograd.grad(pi.sum(), budget)
    assert pi.sum().item() == pytest.approx(k) and gain.item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["soft_rank", "sum_to_k", "softsort", "neuralsort"])
def test_tokens_compete_except_under_the_plain_sigmoid(name):
    scores = normal(1, 20).requires_grad_()
    best = inclusion(name, scores, 8.3, 0.3, 0.1)[0, scores[0].argmax()]
    gradient, = torch.autograd.grad(best, scores)
    others = gradient[0].clone()
    others[scores[0].argmax()] = 0
    assert others.abs().max() > 0
    plain, = torch.autograd.grad(inclusion("sigmoid", scores, 8.3, 0.3, 0.1)[0, 3], scores)
    assert (plain != 0).sum() == 1


def test_the_plain_sigmoid_has_no_gradient_to_k():
    k = torch.tensor(5.0, requires_grad=True)
    pi = inclusion("sigmoid", normal(1, 20, torch.float32).requires_grad_(), k, 0.2, 0.1)
    assert torch.autograd.grad(pi.sum(), k, allow_unused=True) == (None,)


def test_softsort_by_rows_is_softsort_at_once():
    scores, weight = normal(2, 150), normal(2, 150).flip(1)  # more than one chunk of rows

    def whole(s):
        rows = torch.softmax(-(s.sort(dim=-1, descending=True).values[:, :, None] - s[:, None, :]).abs() / 0.2, dim=-1)
        return rows[:, :60].sum(1).clamp_max(1)

    mine = value_and_gradient(lambda s: inclusion("softsort", s, 60.0, 0.2, 0.1), scores, weight)
    torch.testing.assert_close(mine, value_and_gradient(whole, scores, weight))


def test_neuralsort_refuses_long_sequences_and_names_what_to_use():
    with pytest.raises(ConfigError, match="at most 1024 tokens, got 1025.*softsort"):
        inclusion("neuralsort", torch.zeros(1, 1025), 3.0, 0.2, 0.1)


def test_an_unknown_surrogate_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="'soft_sort'.*Did you mean 'softsort'"):
        inclusion("soft_sort", torch.zeros(1, 8), 3.0, 0.2, 0.1)
    assert set(SURROGATE_NAMES) == set(SURROGATES)


# ------------------------------------------------------------------------------------------ perturbation


@pytest.mark.parametrize("name,mean,deviation", [("soft_rank", 0.0, 1.0), ("sigmoid", 0.0, 1.0), ("gumbel", 0.5772, 1.2825)])
def test_the_perturbation_has_the_moments_of_its_distribution(name, mean, deviation):
    uniform = (torch.arange(200_000, dtype=torch.float64)[None] + 0.5) / 200_000
    noise = perturbation(name, uniform, 0.5)
    assert noise.mean().item() == pytest.approx(0.5 * mean, abs=1e-3)
    assert noise.std().item() == pytest.approx(0.5 * deviation, abs=1e-3)
    edges = perturbation(name, torch.tensor([[0.0, 1 - 2**-24]]), 1.0)
    assert torch.isfinite(edges).all()


def test_gumbel_top_k_samples_without_replacement_in_proportion_to_the_weights():
    """Kool et al. 2019: the largest of log w_i + Gumbel is i with probability w_i / sum w."""
    weights = torch.tensor([0.5, 0.3, 0.2])
    uniform = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0))
    winners = (weights.log() + perturbation("gumbel", uniform, 1.0)).argmax(-1)
    torch.testing.assert_close(winners.bincount() / 200_000, weights, atol=5e-3, rtol=0)
