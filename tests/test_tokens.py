"""The token algebra, proved once on random shapes."""

import pytest
import torch

from harness.api import ConfigError
from harness.api.draws import hashed_uniform
from harness.engine.tokens import Keep, SoftMerge, cells, fold_into, num_kept, others, top_indices

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


def random_fold(batch: int, num: int, folded: int, mode: str):
    """A fold of `folded` random tokens into random others."""
    order = torch.rand(batch, num).argsort(dim=1)
    src, dst = order[:, :folded], order[:, folded:].gather(1, torch.randint(num - folded, (batch, folded)))
    return fold_into(num, src, dst, mode), src, dst


@pytest.mark.parametrize("batch,num,width", SHAPES)
@pytest.mark.parametrize("mode", ["mean", "prune", "mlerp"])
def test_a_fold_equals_its_definition_token_by_token(batch, num, width, mode):
    x = torch.randn(batch, num, width)
    plan, src, dst = random_fold(batch, num, num // 2, mode)
    computed = plan.reduce(x)
    assert plan.num_tokens == computed.shape[1] == num - num // 2
    for row in range(batch):
        for slot, head in enumerate(plan.positions()[row].tolist()):
            members = [head, *src[row][dst[row] == head].tolist()]
            mean = x[row, members].mean(0)
            want = {"mean": mean, "prune": x[row, head], "mlerp": mean / mean.norm() * x[row, members].norm(dim=1).max()}[mode]
            torch.testing.assert_close(computed[row, slot], want if len(members) > 1 else x[row, head], atol=1e-4, rtol=1e-4)
            restored = plan.restore(computed, None)
            assert all(torch.equal(restored[row, member], computed[row, slot]) for member in members)


@pytest.mark.parametrize("mode", ["mean", "mlerp"])
def test_opposite_tokens_fold_without_nan_and_lone_tokens_stay_to_the_bit(mode):
    x = torch.tensor([[[1.0, 2.0], [-1.0, -2.0], [0.1, 0.3]]])
    out = fold_into(3, torch.tensor([[1]]), torch.tensor([[0]]), mode).reduce(x)
    assert torch.isfinite(out).all() and torch.equal(out[0, 1], x[0, 2])


def test_cells_and_others_are_the_grid_apart():
    assert cells((4, 5), 2, torch.device("cpu")).tolist() == [[0, 1, 5, 6], [2, 3, 7, 8], [10, 11, 15, 16], [12, 13, 17, 18]]
    assert others(torch.tensor([[3, 0], [1, 4]]), 5).tolist() == [[1, 2, 4], [0, 2, 3]]


def test_a_soft_merge_equals_its_matrices():
    order = cells((4, 4), 2, torch.device("cpu"))
    mix, unmix, x = torch.rand(2, 4, 2, 4), torch.rand(2, 4, 4, 2), torch.randn(2, 16, 3)
    slots = torch.tensor([0, 1, 2, 4, 5, 6, 7])  # tile 1 uses one slot of two
    plan = SoftMerge(order.flatten(), mix, unmix, slots, order[:, :2].flatten()[slots].expand(2, -1))
    computed = plan.reduce(x)
    restored = plan.restore(computed, None)
    assert plan.num_tokens == computed.shape[1] == 7
    for tile, members in enumerate(order):
        rows = [(slots == 2 * tile + d).nonzero().flatten() for d in range(2)]
        for d, row in enumerate(rows):
            if len(row):
                torch.testing.assert_close(computed[:, row[0]], torch.einsum("bn,bnd->bd", mix[:, tile, d], x[:, members]))
        want = sum(unmix[:, tile, :, d, None] * computed[:, row] for d, row in enumerate(rows) if len(row))
        torch.testing.assert_close(restored[:, members], want)
