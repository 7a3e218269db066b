"""The token algebra, proved once on random shapes."""

import pytest
import torch

from harness.api import ConfigError
from harness.tokens import Keep, hashed_uniform, num_kept, top_indices

SHAPES = [(1, 9, 3), (4, 64, 8), (6, 30, 5)]


@pytest.mark.parametrize("batch,num,width", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_kept_rows_are_replaced_and_the_others_untouched(batch, num, width, shared):
    x, kept = torch.randn(batch, num, width), num // 3
    indices = torch.randperm(num)[:kept] if shared else torch.rand(batch, num).argsort(dim=1)[:, :kept]
    plan = Keep(indices, num)
    out = plan.restore(plan.reduce(x) + 100, x)
    mask = torch.zeros(batch, num, dtype=torch.bool)
    mask[:, indices] = True if shared else mask[:, indices]
    if not shared:
        mask.scatter_(1, indices, True)
    assert torch.equal(out[~mask], x[~mask])
    assert torch.equal(out[mask], x[mask] + 100)


def test_at_a_branch_site_a_missing_token_contributes_zero():
    plan = Keep(torch.tensor([2, 0]), 4)
    out = plan.restore(torch.ones(1, 2, 3), None)
    assert out[0, :, 0].tolist() == [1, 0, 1, 0]


def test_keeping_everything_in_any_order_is_the_identity():
    x = torch.randn(2, 16, 4)
    assert torch.equal(Keep(torch.randperm(16), 16).reduce(x), x)


def test_a_ratio_becomes_a_count_by_floor_and_never_leaves_one_to_n():
    assert num_kept(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert num_kept(0.6, 256) == 153
    assert num_kept(1e-9, 256) == 1 and num_kept(1, 256) == 256
    assert num_kept(0.6, 256, multiple=64) == 192 and num_kept(0.99, 100, multiple=64) == 100
    for bad in (0, -0.1, 1.5):
        with pytest.raises(ConfigError, match="keep_ratio"):
            num_kept(bad, 10)


def test_random_numbers_depend_on_seed_step_and_block_alone():
    seeds = torch.tensor([5, 6, 7])
    together, alone = hashed_uniform(seeds, 3, 2, 50), hashed_uniform(seeds[1:2], 3, 2, 50)
    assert torch.equal(together[1:2], alone)
    for step, block in ((4, 2), (3, 3)):
        assert not torch.equal(hashed_uniform(seeds, step, block, 50), together)


def test_random_numbers_are_uniform():
    u = hashed_uniform(torch.arange(400), 1, 1, 256).double()
    assert 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    expected = u.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 63 degrees of freedom: p = 0.0002
    assert abs(torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize("unify", ["max", "mean", "cond"])
def test_guided_halves_keep_the_same_tokens_unless_told_otherwise(unify):
    scores = torch.randn(6, 40)
    uncond, cond = top_indices(scores, 7, halves=2, unify=unify).chunk(2)
    assert torch.equal(uncond, cond)
    free = top_indices(scores, 7, halves=2, unify="off")
    assert torch.equal(free, scores.topk(7).indices)


def test_the_maximum_of_the_halves_decides():
    scores = torch.tensor([[0.0, 5.0, 1.0], [3.0, 0.0, 1.0]])  # max: 3, 5, 1
    assert top_indices(scores, 2, halves=2, unify="max")[0].tolist() == [1, 0]
    assert top_indices(scores, 1, halves=2, unify="cond")[0].tolist() == [0]
