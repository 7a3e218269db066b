"""SDTM against a transcription, loop by loop, of the two stages."""

import math

import pytest
import torch
from sites import make_run, make_site, started

from harness.api import ConfigError
from harness.engine.tokens import cells

X = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(1))
WINDOWS = cells((8, 8), 2, torch.device("cpu")).tolist()


def cos(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def folds(plan, row):
    """{destination: its sources} of a row."""
    groups = {}
    for slot, head in enumerate(plan.kept[row].tolist()):
        members = (plan.group[row] == slot).nonzero().flatten().tolist()
        if len(members) > 1:
            groups[head] = sorted(members)
    return groups


def naive_windows(x, waiting, num_windows):
    """Members of the windows with the highest score, best first."""
    priority = [t / (sum(waiting) / len(waiting) + 1e-6) for t in waiting]
    scored = []
    for window in WINDOWS:
        similarity = sum(cos(x[i], x[j]) for i in window for j in window) / 16
        scored.append((similarity + 0.05 * sum(priority[i] for i in window) / 4, window))
    return [window for _, window in sorted(scored, reverse=True)[:num_windows]]


def naive_details(x, waiting, removed):
    """Pairs (source, destination)."""
    dst = [max(window, key=lambda i: (waiting[i], -i)) for window in WINDOWS]
    pairs = []
    for i in set(range(64)) - set(dst):
        best = max(dst, key=lambda j: cos(x[i], x[j]))
        pairs.append((cos(x[i], x[best]), i, best))
    return [(i, j) for _, i, j in sorted(pairs, reverse=True)[:removed]], dst


def test_both_stages_equal_a_naive_transcription_with_the_counter_carried_on():
    run = make_run(num_steps=4)
    method = started("sdtm", run, keep_ratio=1 - 24 / 64)
    waiting = [[0] * 64 for _ in range(4)]
    for step, block in [(0, 0), (0, 1), (1, 0), (2, 0), (3, 1)]:
        x, memory = X + step + 0.3 * torch.randn(4, 64, 16), {}
        attention = method.reduce(x, make_site(run, step, block, memory=memory))
        plan = method.reduce(X, make_site(run, step, block, "ffn", memory=memory))
        assert plan.num_tokens == 40 and (attention is plan if step <= 1 else attention is None)
        for row in range(4):
            if step <= 1:
                chosen = naive_windows(x[row], waiting[row], 8)
                assert sorted(folds(plan, row).values()) == sorted(chosen)
                busy = {i for window in chosen for i in window}
            else:
                pairs, dst = naive_details(x[row], waiting[row], 24)
                want = {}
                for source, target in pairs:
                    want.setdefault(target, [target]).append(source)
                assert folds(plan, row) == {head: sorted(members) for head, members in want.items()}
                busy = {i for i, _ in pairs} | set(dst)
            waiting[row] = [t + 1 if i in busy else 0 for i, t in enumerate(waiting[row])]
            assert method._waiting[row].tolist() == waiting[row]


def test_the_ratio_falls_along_a_cosine_as_published():
    method = started("sdtm", make_run(num_steps=50), keep_ratio=0.75, delta=0.2)
    folded = [method.num_folded(step, 50, 10_000) / 10_000 for step in range(50)]
    want = [0.05 + 0.4 * math.cos(math.pi / 2 * step / 49) for step in range(50)]
    assert folded == pytest.approx(want, abs=2e-4)
    assert (folded[0], folded[-1]) == pytest.approx((0.45, 0.05), abs=2e-4)
    assert sum(folded) / 50 == pytest.approx(0.3035, abs=3e-4)


def test_counts_rounded_as_released():
    run = make_run((64, 64), num_steps=50)
    for keep, removed in ((0.5, 2016), (0.7, 1200), (0.9, 384)):  # 16 * floor(R / 48) windows of three
        plan = started("sdtm", run, keep_ratio=keep, multiple=16).reduce(torch.randn(2, 4096, 4), make_site(run, seeds=(1,)))
        assert 4096 - plan.num_tokens == removed


def test_the_first_stage_lasts_to_step_20_of_50():
    run = make_run(num_steps=50)
    method = started("sdtm", run)
    assert [method.in_structure(make_site(run, step)) for step in (0, 20, 21, 49)] == [True, True, False, False]


def test_the_last_window_is_folded_in_part_to_meet_the_count():
    run = make_run()
    plan = started("sdtm", run, keep_ratio=0.5).reduce(X, make_site(run))
    assert plan.num_tokens == 32
    assert sorted(len(group) for group in folds(plan, 0).values()) == [3] + [4] * 10


def test_a_token_that_waited_long_becomes_a_destination():
    run = make_run()
    method = started("sdtm", run, keep_ratio=0.5, structure_share=0.0)
    method.reduce(X, make_site(run))
    method._waiting[:, 27] = 1000
    plan = method.reduce(X, make_site(run, 1, kind="ffn"))
    assert all(27 in row for row in plan.kept.tolist())


def test_the_cache_blends_folded_tokens_only():
    run = make_run(num_steps=10)
    method = started("sdtm_cache", run, keep_ratio=0.5, fresh=0.1)
    everything = method.reduce(X, make_site(run, 0))
    assert everything.num_tokens is None and torch.equal(everything.restore(everything.reduce(X), None), X)
    plain, memory = started("sdtm", run, keep_ratio=0.5).reduce(X, make_site(run, 1)), {}
    plan = method.reduce(X, make_site(run, 1, memory=memory))
    output = 3 * plan.reduce(X)
    fresh, blended = plain.restore(output, None), plan.restore(output, None)
    lone = torch.stack([torch.bincount(group, minlength=32) for group in plain.group]).gather(1, plain.group) == 1
    assert torch.equal(blended[lone], fresh[lone])
    torch.testing.assert_close(blended[~lone], 0.1 * fresh[~lone] + 0.9 * X[~lone])
    assert method.reduce(X, make_site(run, 1, block=1)).num_tokens == 32, "nothing is cached for another block"


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="2 x 2 do not tile a grid of"):
        started("sdtm", make_run((7, 8)))
    with pytest.raises(ConfigError, match="cache_every must be at least 2"):
        started("sdtm_cache", make_run(), cache_every=1)
