"""ToMA against a transcription, loop by loop, of selection and matrices, and its own claims."""

import itertools

import pytest
import torch
from sites import make_run, make_site, started

from harness.api import ConfigError
from harness.engine.tokens import cells
from methods.toma import facility_location

X = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(2))
TILES = cells((8, 8), 4, torch.device("cpu")).tolist()


def check_greedy(unit, chosen):
    """Each of `chosen` in turn covers the rows of `unit` (n, D) best, up to ties: equals the loop over all candidates."""
    similarity = (unit @ unit.T).tolist()

    def value(picks):
        return sum(max(row[j] for j in picks) for row in similarity)

    for count, pick in enumerate(chosen):
        before = chosen[:count]
        best = max(value([*before, v]) for v in range(len(unit)) if v not in before)
        assert pick not in before and value([*before, pick]) > best - 3e-4


@pytest.mark.parametrize("unmerge", ["transpose", "pinv"])
@pytest.mark.parametrize("beta", [1000.0, 5.0])
def test_merge_and_unmerge_equal_a_naive_transcription(unmerge, beta):
    run = make_run()
    plan = started("toma", run, keep_ratio=0.375, unmerge=unmerge, beta=beta).reduce(X, make_site(run))
    computed = plan.reduce(X)
    restored = plan.restore(computed + 1, None)
    assert computed.shape == (4, 24, 16)
    for row, (number, tile) in itertools.product(range(4), enumerate(TILES)):
        unit = torch.nn.functional.normalize(X[row, tile], dim=-1)
        slots = slice(6 * number, 6 * number + 6)
        dst = [tile.index(position) for position in plan.positions()[row, slots]]
        check_greedy(torch.nn.functional.normalize(X[row % 2, tile], dim=-1), dst)  # of the unconditional half, for both
        share = torch.stack([(beta * unit[dst] @ unit[i]).softmax(0) for i in range(16)], dim=1)  # (6, 16), columns sum to 1
        mix = share / share.sum(1, keepdim=True)
        torch.testing.assert_close(computed[row, slots], mix @ X[row, tile], atol=1e-4, rtol=1e-4)
        unmix = share.T if unmerge == "transpose" else torch.linalg.pinv(mix)
        torch.testing.assert_close(restored[row, tile], unmix @ (computed[row, slots] + 1), atol=1e-3, rtol=1e-3)


def test_of_two_equal_gains_the_first_wins():
    unit = torch.tensor([[1.0, 0, 0], [0, 0.8, 0.6], [0, 0.6, 0.8], [1.0, 0, 0]])
    noise = 1e-7 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0))
    picks = facility_location(unit @ unit.T + noise + noise.mT, 3)
    assert picks.tolist() == [[0, 1, 2]] * 50


def test_the_greedy_choice_is_within_its_guarantee():
    for seed in range(20):
        points = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed))
        unit = torch.nn.functional.normalize(points, dim=-1)
        similarity = 1 + unit @ unit.T  # non-negative

        def value(chosen, similarity=similarity):
            return float(similarity[:, list(chosen)].max(dim=1).values.sum())

        best = max(value(chosen) for chosen in itertools.combinations(range(10), 3))
        assert value(facility_location(similarity, 3).tolist()) >= (1 - 1 / torch.e) * best


def test_destinations_of_equal_tokens_are_distinct_and_equal_tokens_come_back_exactly():
    run, same = make_run(), torch.ones(4, 64, 16)
    for unmerge in ("transpose", "pinv"):
        plan = started("toma", run, keep_ratio=0.5, unmerge=unmerge).reduce(same, make_site(run))
        assert all(len(set(row)) == 32 for row in plan.positions().tolist())
        if unmerge == "transpose":
            torch.testing.assert_close(plan.restore(plan.reduce(same), None), same)


def test_tiles_do_not_see_each_other_and_a_tile_with_all_its_tokens_is_the_identity():
    run = make_run()
    method = started("toma", run, keep_ratio=0.5)
    before = method.reduce(X, make_site(run)).positions()
    changed = X.clone()
    changed[:, TILES[3]] = torch.randn(4, 16, 16)
    method.reset()
    after = method.reduce(changed, make_site(run)).positions()
    assert torch.equal(before[:, :24], after[:, :24]) and not torch.equal(before[:, 24:], after[:, 24:])
    plan = started("toma", run, keep_ratio=63 / 64, beta=1e6).reduce(X, make_site(run))
    torch.testing.assert_close(plan.restore(plan.reduce(X), None)[:, TILES[1]], X[:, TILES[1]])


def test_counts_are_met_to_the_token_or_rounded_down_per_tile():
    run = make_run((16, 16))
    exact, rounded = (started("toma", run, keep_ratio=0.6, exact=exact) for exact in (True, False))
    assert sum(exact.slots(256)) == 153 and set(exact.slots(256)) == {9, 10}
    assert rounded.slots(256) == [9] * 16
    x = torch.randn(2, 256, 8)
    plan = exact.reduce(x, make_site(run, seeds=(1,)))
    assert plan.reduce(x).shape[1] == plan.positions().shape[1] == plan.num_tokens == 153


def test_a_plan_serves_blocks_and_steps_as_told():
    run = make_run(num_steps=10, num_blocks=8)
    method = started("toma", run, dense_blocks=2, plan_blocks=3, dst_every=4, matrix_every=2)
    plans = {(step, block): method.reduce(torch.randn(4, 64, 16), make_site(run, step, block))
             for step in range(5) for block in range(8)}
    assert all(plans[step, block] is None for step in range(5) for block in range(2))
    assert all(plans[0, 2] is plans[step, block] for step in (0, 1) for block in (2, 3, 4))
    assert plans[0, 5] is not plans[0, 2] and plans[0, 5] is plans[1, 7]
    assert plans[2, 2] is not plans[0, 2] and torch.equal(plans[2, 2].positions(), plans[0, 2].positions())
    assert not torch.equal(plans[4, 2].positions(), plans[0, 2].positions())
    method.reset()
    assert method.reduce(X, make_site(run, 1, 2)) is not plans[4, 2]


def test_only_every_third_step_merges_as_in_the_released_script():
    run = make_run()
    method = started("toma", run, merge_every=3)
    assert [method.reduce(X, make_site(run, step)) is not None for step in range(7)] == [True, False, False] * 2 + [True]


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="4 x 4 do not cover a grid of"):
        started("toma", make_run((6, 8)))
    with pytest.raises(ConfigError, match="dense_blocks: 5 leaves none of the 4 blocks"):
        started("toma", make_run(), dense_blocks=5)
    with pytest.raises(ConfigError, match=r"toma.keep_ratio must lie in \[0.0625, 1\]"):
        started("toma", make_run(), keep_ratio=0.05)
