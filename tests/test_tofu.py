"""ToFu against the library it takes its matching from, and against its definition."""

import pytest
import torch
from sites import make_run, make_site, started
from tomesd.merge import bipartite_soft_matching_random2d

from harness.api import ConfigError

X = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid,keep", [((8, 8), 0.5), ((8, 8), 0.25), ((7, 9), 0.4), ((9, 6), 0.9)])
def test_the_matching_is_the_tomesd_librarys(grid, keep):
    run = make_run(grid)
    x, site = torch.randn(4, run.num_tokens, 16), make_site(run, step=3, block=2)
    plan = started("tofu", run, keep_ratio=keep, prune_blocks=0).reduce(x, site)
    plan.mode = "mean"
    merge, unmerge = bipartite_soft_matching_random2d(x, grid[1], grid[0], 2, 2, run.num_tokens - plan.num_tokens,
                                                      generator=site.generator())
    torch.testing.assert_close(plan.restore(plan.reduce(x), None), unmerge(merge(x)))
    biggest = plan.restore(plan.reduce(x.abs()), None)
    torch.testing.assert_close(biggest, unmerge(merge(x.abs())))


def test_early_blocks_compute_the_destination_alone_and_late_blocks_see_every_member():
    run = make_run()
    method = started("tofu", run, keep_ratio=0.5)
    for block, mode in enumerate(["prune", "prune", "mlerp", "mlerp"]):
        plan = method.reduce(X, make_site(run, block=block))
        folded = torch.ones(4, 64).scatter(1, plan.kept, 0.0).unsqueeze(-1)
        computed = plan.reduce(X)
        assert plan.mode == mode
        assert torch.equal(computed, plan.reduce(X + 100 * folded)) == (mode == "prune")
        assert torch.equal(plan.restore(computed, None)[0, plan.kept[0]], computed[0])


def test_mlerp_keeps_the_largest_norm_and_the_direction_of_the_mean():
    run = make_run()
    plan = started("tofu", run, keep_ratio=0.5, prune_blocks=0).reduce(X, make_site(run))
    computed = plan.reduce(X)
    for slot in range(plan.num_tokens):
        members = X[1, plan.group[1] == slot]
        torch.testing.assert_close(computed[1, slot].norm(), members.norm(dim=1).max(), atol=1e-4, rtol=1e-4)
        assert torch.cosine_similarity(computed[1, slot], members.mean(0), dim=0) > 0.9999


def test_the_plan_is_shared_in_a_block_and_drawn_anew_for_the_next():
    run, memory = make_run(), {}
    method = started("tofu", run, keep_ratio=0.5, ffn=True)
    first = method.reduce(X, make_site(run, memory=memory))
    assert method.reduce(X + 1, make_site(run, kind="ffn", memory=memory)) is first
    assert not torch.equal(method.reduce(X, make_site(run, block=1)).kept, first.kept)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="tofu.prune_blocks: 9 is more than the 4 blocks"):
        started("tofu", make_run(), prune_blocks=9)
    with pytest.raises(ConfigError, match=r"tofu.keep_ratio must lie in \[0.25, 1\]"):
        started("tofu", make_run(), keep_ratio=0.2)
    with pytest.raises(ConfigError, match="stride 8 does not fit"):
        started("tofu", make_run((4, 4)), stride=8)
