"""IBTM against a transcription, loop by loop, and its own claims."""

import pytest
import torch
from sites import make_run, make_site, started

from harness.api import ConfigError
from harness.api.draws import hashed_uniform

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(4, 64, 16, generator=GENERATOR)
PREDICTION = torch.randn(4, 3, 16, 16, generator=GENERATOR)  # two images, both halves, patches of 2 x 2


def importance(prediction=PREDICTION):
    """(2, 64), by loops."""
    change = (prediction[2:] - prediction[:2]).abs().mean(1)
    return torch.stack([torch.stack([change[i, 2 * y:2 * y + 2, 2 * x:2 * x + 2].mean() for y in range(8) for x in range(8)])
                        for i in range(2)])


def naive_pairs(scores, noise, similarity, options):
    """{source: destination} of one image; similarity(i, j) says which destination suits."""
    removed, num_dst = options["removed"], options["num_dst"]
    num_pool = min(64, int((64 - removed) * options["pool"] + 1e-3))
    order = sorted(range(64), key=lambda i: -scores[i])
    dst = sorted(range(num_pool), key=lambda rank: -noise[rank])[:num_dst]
    dst = [order[rank] for rank in dst]
    found = []
    for i in set(range(64)) - set(dst):
        best = max(dst, key=lambda j: similarity(i, j))
        forced = scores[i] < scores[order[num_pool - 1]]
        found.append((forced, similarity(i, best), i, best))
    return {i: j for _, _, i, j in sorted(found, reverse=True)[:removed]}, set(order[:num_pool])


def pairs(plan, row):
    """{source: destination} of a row."""
    heads = plan.kept[row, plan.group[row]].tolist()
    return {i: head for i, head in enumerate(heads) if i != head}


@pytest.mark.parametrize("metric,pool", [("distance", 1.0), ("features", 1.0), ("features", 1.4)])
def test_the_plan_equals_a_naive_transcription(metric, pool):
    run = make_run()
    method = started("ibtm", run, keep_ratio=0.5, metric=metric, pool=pool, blocks=[0, 3])
    method.observe(make_site(run).call, PREDICTION)
    site = make_site(run, 4, 1)
    plan = method.reduce(X, site)
    assert plan.num_tokens == 32 and plan.mode == "mean"
    noise = hashed_uniform(site.call.seeds, 4, 1, 64)
    unit = torch.nn.functional.normalize(X, dim=-1)
    for row in range(4):
        def near(i, j, row=row):
            if metric == "features":
                return float(unit[row, i] @ unit[row, j])
            away = ((i // 8 - j // 8) ** 2 + (i % 8 - j % 8) ** 2) ** 0.5
            return float(0.5e-5 * (noise[row, i] + noise[row, j])) - away

        want, candidates = naive_pairs(importance()[row % 2].tolist(), noise[row].tolist(), near,
                                       {"removed": 32, "num_dst": 16, "pool": pool})
        found = pairs(plan, row)
        assert set(found) == set(want)
        assert set(found.values()) <= candidates
        if metric == "features":
            assert found == want
        else:  # ties within a float32 rounding may go either way
            assert all(near(i, found[i]) >= near(i, want[i]) - 2e-6 for i in want)


def test_with_a_pool_of_one_exactly_the_least_important_tokens_are_folded():
    run = make_run()
    method = started("ibtm", run, keep_ratio=0.6, blocks=[0, 3])
    method.observe(make_site(run).call, PREDICTION)
    plan = method.reduce(X, make_site(run, 4))
    for row in range(4):
        assert set(pairs(plan, row)) == set(importance()[row % 2].argsort()[:26].tolist())
    assert torch.equal(plan.group[:2], plan.group[2:]), "guided halves share the plan"


def test_importance_is_blind_to_the_order_of_the_halves_and_to_monotone_changes():
    run = make_run()
    plans = []
    for prediction in (PREDICTION, PREDICTION.roll(2, 0), 7 * PREDICTION):
        method = started("ibtm", run, blocks=[0, 3])
        method.observe(make_site(run).call, prediction)
        plans.append(method.reduce(X, make_site(run, 4)).group)
    assert torch.equal(plans[0], plans[1]) and torch.equal(plans[0], plans[2])


def test_equal_importance_forces_none_and_still_folds_the_count():
    run = make_run()
    method = started("ibtm", run, blocks=[0, 3])
    method.observe(make_site(run).call, torch.zeros(4, 3, 16, 16))
    assert method.reduce(X, make_site(run, 4)).num_tokens == 32


def test_before_an_importance_is_known_it_merges_by_chance_or_not_at_all():
    run = make_run()
    plan = started("ibtm", run, blocks=[0, 3]).reduce(X, make_site(run))
    assert plan.num_tokens == 32 and plan.mode == "prune"
    assert started("ibtm", run, blocks=[0, 3], first_step="dense").reduce(X, make_site(run)) is None


def test_early_steps_prune_and_later_ones_average():
    run = make_run((8, 8), num_steps=20)
    method = started("ibtm", run, blocks=[0, 3])
    method.observe(make_site(run).call, PREDICTION)
    assert [method.reduce(X, make_site(run, step)).mode for step in (1, 3, 4, 19)] == ["prune", "prune", "mean", "mean"]


def test_the_middle_half_is_blocks_7_to_20_of_28():
    for num_blocks, first, last in ((28, 7, 20), (24, 6, 17), (4, 1, 2)):
        run = make_run(num_blocks=num_blocks)
        method = started("ibtm", run)
        acts = [block for block in range(num_blocks) if method.reduce(X, make_site(run, block=block)) is not None]
        assert (acts[0], acts[-1], len(acts)) == (first, last, last - first + 1)


def test_the_proxy_is_the_change_since_the_step_before_and_knows_no_guidance():
    run = make_run(halves=1)
    method = started("ibtm_proxy", run, blocks=[0, 3], first_step="dense")
    method.observe(make_site(run).call, PREDICTION[:2])
    assert method.reduce(X[:2], make_site(run, 1)) is None
    method.observe(make_site(run).call, PREDICTION[2:])
    plan = method.reduce(X[:2], make_site(run, 2))
    for row in range(2):
        assert set(pairs(plan, row)) == set(importance()[row].argsort()[:32].tolist())


def test_runs_and_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="no guidance.*guidance_scale above 1.*ibtm_proxy"):
        started("ibtm", make_run(halves=1))
    with pytest.raises(ConfigError, match=r"blocks: \[7, 20\] does not fit the 4 blocks"):
        started("ibtm", make_run(), blocks=[7, 20])
    with pytest.raises(ConfigError, match=r"keep_ratio must lie in \[0.4, 1\]"):
        started("ibtm", make_run(), keep_ratio=0.3, dst_ratio=0.4)
