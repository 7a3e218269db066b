"""DiffCR's, DyDiT's and SparseDiT's recipes by hand: options, stages, learning rates, losses and schedules, a line each."""

import pytest
import torch
from toy import Toy

from harness.api import METHODS, Call, Run, Site
from harness.engine.sampler import Loop, SamplerConfig
from harness.engine.tokens import Mixture
from methods.diffcr.bins import bins_after, nearest_moves
from methods.diffcr.gates import gate_of
from methods.dydit import gates
from methods.dydit.gates import FlopsLoss, Gates, Schedule, hard_gate
from methods.sparsedit.layout import MEAN_SHARE, layout_of, nearest_size, pool_sizes, progress_share, ratio_at

DEFAULTS = {
    "diffcr": {"keep_ratio": 0.8, "regions": 4, "bin_step": 0.1, "gate_scope": "ffn", "gate_norm": False, "ratio_weight": 0.3,
               "router_lr": 1e-4, "ratio_lr": 1e-4, "distill": False},
    "dydit": {"keep_ratio": 0.7, "flops_weight": 2.0, "hold": 0.01, "ramp": 0.05, "complete": True, "width_bias": 15.0,
              "token_bias": 35.0, "tau": 5.0, "router_lr": 1e-4, "distill": False},
    "sparsedit": {"keep_ratio": 0.25, "layout": None, "swing": 1.0, "merge_lr": 1e-4}}
STAGES = {"diffcr": ("joint", 1.0, True, True), "dydit": ("joint", 1.0, True, False), "sparsedit": ("joint", 1.0, True, True),
          "finetuned": ("joint", 1.0, True, False)}
RUN = Run("toy", 3, (4, 4), 8, 2, (1.0, 0.6, 0.2), 1, num_heads=4)


def begun(name, run=RUN, **options):
    """The method at the start of its stage."""
    torch.manual_seed(0)
    method = METHODS.build(name, options)
    method.begin(run)
    return method


def call(rows=2, level=0.5, **facts):
    """One of a training."""
    return Call(-1, torch.full((rows,), level), torch.arange(rows), training=True, **facts)


# ------------------------------------------------------------------------------------------ options and stages


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_the_released_codes_where_there_is_one(name):
    assert METHODS.get(name).Config().__dict__ == DEFAULTS[name]


@pytest.mark.parametrize("name", STAGES)
def test_one_stage_in_which_adapters_train(name):
    found = [(stage.name, stage.share, stage.adapters, stage.one_timestep) for stage in METHODS.get(name).stages]
    assert found == [STAGES[name]] and not METHODS.get(name).needs_teacher


@pytest.mark.parametrize("name, distils, passes", [("diffcr", False, 1), ("dydit", False, 2), ("sparsedit", False, 1),
                                                   ("finetuned", False, 1), ("shiva", True, 1)])
def test_only_shiva_distils_and_only_dydit_takes_two_passes(name, distils, passes):
    method = METHODS.build(name, {})
    assert (method.distils, method.num_passes) == (distils, passes)
    if name in ("diffcr", "dydit"):
        assert METHODS.build(name, {"distill": True}).distils
    assert METHODS.build("dydit", {"complete": False}).num_passes == 1


def test_what_trains_how_fast_and_without_decay():
    groups = begun("diffcr", router_lr=0.1, ratio_lr=0.2).start_stage("joint", torch.Generator())
    assert [(g["name"], g["lr"], g.get("weight_decay")) for g in groups] == [("router", 0.1, None), ("ratio", 0.2, 0.0)]
    assert [[tuple(p.shape) for p in g["params"]] for g in groups] == [[(3, 8)], [(3, 4)]]
    method = begun("dydit", router_lr=0.1)
    [group] = method.start_stage("joint", torch.Generator())
    assert (group["name"], group["lr"], group["weight_decay"]) == ("router", 0.1, 0.0)
    assert len(group["params"]) == 3 * 8 == len(list(method.parameters()))
    [group] = begun("sparsedit", Run("toy", 4, (4, 4), 8, 2, (1.0,), 1), merge_lr=0.3).start_stage("joint", torch.Generator())
    assert (group["name"], group["lr"], group["weight_decay"]) == ("merge", 0.3, 0.0) and len(group["params"]) == 4


# ------------------------------------------------------------------------------------------ DiffCR


def test_diffcrs_loss_is_the_square_of_the_mean_ratio_of_the_region():
    method = begun("diffcr", keep_ratio=0.8, ratio_weight=0.5)
    with torch.no_grad():
        method.ratio[:] = torch.tensor([[1.0, 0.05, 0.5, 0.4], [0.9, 1.0, 0.5, 1.3], [0.8, 1.0, 0.5, 1.0]])
    for level, region in ((0.0, 0), (0.24, 0), (0.25, 1), (0.74, 2), (0.99, 3), (1.0, 3)):
        assert method.region(level) == region
    for level, mean in ((0.1, 0.9), (0.3, (0.1 + 2) / 3), (0.6, 0.5), (0.9, 2.4 / 3)):  # held inside [0.1, 1]
        method.start_step(0.0, torch.full((2,), level))
        assert float(method.losses()["ratio"].detach()) == pytest.approx(0.5 * (mean - 0.8) ** 2, abs=1e-7)
    assert float(method.ratio.detach().min()) == pytest.approx(0.1) and float(method.ratio.detach().max()) == 1


@pytest.mark.parametrize("ratio, counts, weight", [(1.0, (14, 16), 0.0), (0.94, (14, 16), 0.6), (0.9, (14, 16), 1.0),
                                                   (0.55, (8, 9), 0.5), (0.1, (1, 3), 1.0)])
def test_diffcr_blends_the_two_bins_beside_its_ratio(ratio, counts, weight):
    method, x = begun("diffcr"), torch.randn(2, 16, 8)
    with torch.no_grad():
        method.ratio.fill_(ratio)
    method.start_step(0.0, torch.full((2,), 0.5))
    plan = method.reduce(x, Site(call(), RUN, 1, "block", ""))
    assert isinstance(plan, Mixture) and tuple(one.num_tokens for one in plan.plans) == counts
    assert [float(w.detach()) for w in plan.weights] == pytest.approx([weight, 1 - weight], abs=1e-5)
    scores = x @ method.router_weights[1]
    torch.testing.assert_close(plan.plans[0]._gate, torch.sigmoid(scores)[..., None])
    assert torch.equal(plan.plans[0].indices, scores.topk(counts[0]).indices.sort(-1).values)


def test_diffcrs_gate_and_its_routers_start():
    scores = torch.tensor([[0.0, 2.0, -200.0]], requires_grad=True)
    torch.testing.assert_close(gate_of(scores, False), torch.sigmoid(scores)[..., None])
    gate = gate_of(scores, True)
    assert gate.flatten().tolist() == [1, 1, 1]
    torch.testing.assert_close(torch.autograd.grad(gate.sum(), scores)[0], torch.sigmoid(-scores))
    weights = begun("diffcr", Run("toy", 50, (2, 2), 64, 2, (1.0,), 1)).router_weights.detach()
    assert weights.abs().max() <= 1 / 8 and weights.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert torch.equal(begun("diffcr").ratio.detach(), torch.ones(3, 4))


def test_diffcrs_table_moves_by_bins():
    ratio = torch.tensor([[1.0, 0.62]])
    assert [bins_after(moves, ratio, 4).tolist() for moves in range(7)] == [
        [[1, 1]], [[2, 1]], [[3, 1]], [[3, 2]], [[4, 2]], [[4, 3]], [[4, 4]]]  # a shift of 0 lies after the fourth
    assert nearest_moves(lambda moves: moves / 10, 10, 0.34) == 3 and nearest_moves(lambda moves: moves / 10, 10, 0.36) == 4
    assert nearest_moves(lambda moves: moves, 5, 9) == 5 and nearest_moves(lambda moves: moves, 5, -1) == 0


# ------------------------------------------------------------------------------------------ DyDiT


def test_dydits_target_holds_at_one_and_falls_in_a_line():
    method = begun("dydit", keep_ratio=0.5, hold=0.1, ramp=0.2, flops_weight=3.0)
    for progress, target in ((0.0, 1.0), (0.1, 1.0), (0.15, 0.875), (0.2, 0.75), (0.3, 0.5), (0.9, 0.5)):
        method.start_step(progress, torch.full((2,), 0.5))
        assert method._loss.target == pytest.approx(target) and method._loss.weight == 3.0
    method = begun("dydit", keep_ratio=0.5, hold=0.0, ramp=0.0)
    method.start_step(0.001, torch.full((2,), 0.5))
    assert method._loss.target == pytest.approx(0.5)


def test_dydits_second_pass_is_complete_and_its_loss_is_of_the_first():
    method, x = begun("dydit"), torch.randn(2, 16, 8)
    method.start_stage("joint", torch.Generator())
    method.start_step(0.5, torch.full((2,), 0.5))
    method.start_pass(0)
    for block in range(3):
        memory = {}
        for kind, module in (("attention", "attn"), ("attention", "attn2"), ("ffn", "ff")):
            site = Site(call(time_embedding=torch.zeros(2, 8)), RUN, block, kind, module, memory)
            assert method.reduce(x, site) is not None
    method.start_pass(1)
    assert method.reduce(x, Site(call(), RUN, 0, "ffn", "ff")) is None
    assert float(method.losses()["flops"].detach()) == pytest.approx(2 * (1 - 0.7) ** 2), "all gates are open at the start"
    assert method._complete is False


def test_dydits_routers_start_open_and_draw_these_numbers():
    gate = Gates(Run("toy", 1, (4, 4), 32, 2, (1.0,), 1, num_heads=4), 15.0, 35.0)
    assert gate.heads.bias.tolist() == gate.groups.bias.tolist() == [15.0] * 3 and gate.tokens[2].bias.tolist() == [35.0]
    assert gate.tokens[0].weight.shape == (2, 32) and gates.LEVELS == 64
    method, x = begun("dydit", width_bias=0.0, token_bias=0.0, tau=3.0), torch.randn(2, 16, 8)
    method.start_step(0.5, torch.full((2,), 0.5))
    site = Site(call(time_embedding=torch.randn(2, 8)), RUN, 1, "ffn", "ff")
    plan = method.reduce(x, site)
    noise = site.rand(3 + 3 + 16).split([3, 3, 16], dim=1)
    for made, logits, uniform in ((site.memory["heads"], method.gates[1].heads, noise[0]),
                                  (site.memory["groups"], method.gates[1].groups, noise[1])):
        assert torch.equal(made[:, 0], torch.ones(2))
        torch.testing.assert_close(made[:, 1:], hard_gate(logits(site.call.time_embedding), uniform, 3.0))
    torch.testing.assert_close(plan._tokens, hard_gate(method.gates[1].tokens(x).squeeze(-1), noise[2], 3.0))
    method.start_step(0.5, torch.full((2,), 0.5), validating=True)
    site = Site(call(time_embedding=torch.randn(2, 8)), RUN, 1, "ffn", "ff")
    torch.testing.assert_close(method.reduce(x, site)._tokens, (method.gates[1].tokens(x).squeeze(-1) > 0).float())


def test_dydits_gate_has_the_gradient_of_its_relaxation():
    logits = torch.tensor([0.5, -0.5], requires_grad=True)
    uniform = torch.tensor([0.2, 0.9])
    gate = hard_gate(logits, uniform, 2.0)
    soft = torch.sigmoid((logits + torch.logit(uniform)) / 2)
    assert gate.tolist() == [0.0, 1.0]
    torch.testing.assert_close(torch.autograd.grad(gate.sum(), logits)[0], (soft * (1 - soft) / 2).detach())
    assert torch.isfinite(hard_gate(logits, torch.tensor([0.0, 1.0]), 1e-3)).all()


def test_dydits_flops_are_of_four_projections_two_products_and_eight_of_the_feed_forward():
    loss = FlopsLoss(RUN, 0.25, 3.0)
    attention, ffn = 4 * 8 + 2 * 16, 8 * 8
    loss.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    loss.add(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    used = ((attention / 2 + ffn / 4) + (attention + ffn / 4)) / 2 / (attention + ffn)
    assert float(loss.value()) == pytest.approx(3 * (used - 0.25) ** 2)


def test_dydits_schedule_remembers_a_tenth_of_what_is_new_and_the_last_embedding():
    schedule, level = Schedule(2, 3), torch.tensor([0.5])
    for rate in (0.5, 1.0):
        schedule.note_tokens(1, level, torch.tensor([rate]))
    assert float(schedule.tokens[1, 32]) == pytest.approx(0.9 * 0.5 + 0.1 * 1.0) and not schedule.tokens[0].any()
    assert schedule._place(torch.tensor([0.0, 0.0157, 0.999, 1.0])).tolist() == [0, 1, 63, 63]
    for value in (1.0, 2.0):
        schedule.note_embedding(level, torch.full((1, 3), value))
    assert schedule.embedding[32].tolist() == [2, 2, 2] and schedule.seen.nonzero().flatten().tolist() == [32]


def test_dydits_plan_reads_the_nearest_level_and_moves_by_its_shift():
    method = begun("dydit", keep_ratio=0.5)
    untrained = method.plan
    assert untrained[0][0] == ([0, 1], [0, 1, 2, 3], pytest.approx(0.5))
    method.load_fit({"shift": 1.0986123})  # a logit of 3 to 1
    assert method.plan[0][0] == ([0, 1, 2], [0, 1, 2, 3], pytest.approx(0.75))
    schedule, gate = method.schedule, method.gates[1]
    with torch.no_grad():
        for router in (gate.heads, gate.groups):
            router.weight.zero_()
        gate.heads.weight[:, 0], gate.heads.bias[:] = 1.0, torch.tensor([-1.5, 0.5, -0.5])
        gate.groups.bias[:] = torch.tensor([-2.0, 3.0, -0.5])
    for level, value, rate in ((0.1, 0.0, 0.2), (0.7, 1.0, 0.6)):
        schedule.note_embedding(torch.tensor([level]), torch.full((1, 8), value))
        for block in range(3):
            schedule.note_tokens(block, torch.tensor([level]), torch.tensor([rate]))
    method.load_fit({"shift": 0.0})
    assert method.plan[0][1] == ([0, 2, 3], [0, 2], pytest.approx(0.6)) == method.plan[1][1]
    assert method.plan[2][1] == ([0, 2], [0, 2], pytest.approx(0.2))
    method.load_fit({"shift": 1.0})
    assert method.plan[2][1][:2] == ([0, 2, 3], [0, 2, 3])
    assert method.plan[2][1][2] == pytest.approx(float(torch.sigmoid(torch.logit(torch.tensor(0.2)) + 1)))


def test_dydits_fit_bisects_one_number():
    method, asked = begun("dydit"), []

    def cut():
        asked.append(method.fitted["shift"])
        return 1 / (1 + 2.718281828 ** asked[-1])

    fitted = method.fit_budget(cut, 0.3)
    assert asked[:3] == [0.0, 30.0, 15.0] and len(asked) == 14
    assert fitted["shift"] == pytest.approx(0.8473, abs=0.01) and method.fitted == fitted


# ------------------------------------------------------------------------------------------ SparseDiT


def test_sparsedits_tokens_grow_after_a_quarter_of_the_sampling():
    assert [progress_share(at) for at in (0.0, 0.2, 0.25, 0.5, 0.625, 1.0)] == pytest.approx([0, 0, 0, 1 / 3, 0.5, 1])
    mean = sum(progress_share((i + 0.5) / 4000) for i in range(4000)) / 4000
    assert mean == pytest.approx(MEAN_SHARE, abs=1e-4)
    assert ratio_at(0.0, 0.4, 0.5) == pytest.approx(0.4 * (1 - 0.5 * 0.375)) and ratio_at(0.5, 0.4, 0.0) == 0.4
    assert ratio_at(1.0, 0.4, 0.5) == pytest.approx(0.4 * (1 + 0.5 * 0.625)) and ratio_at(1.0, 0.8, 2.0) == pytest.approx(1.0)


def test_sparsedits_pooled_grids():
    assert nearest_size(16, (8, 8)) == (4, 4) and nearest_size(30, (8, 8)) == (5, 6) and nearest_size(32, (4, 16)) == (3, 11)
    assert nearest_size(0.2, (8, 8)) == (1, 1) and nearest_size(64, (8, 8)) == (8, 8) and nearest_size(8, (4, 16)) == (2, 4)
    run = Run("toy", 4, (16, 16), 8, 2, tuple(1 - i / 20 for i in range(20)), 1)
    sizes = pool_sizes(run, 0.25, 1.0)
    counts = [height * width for height, width in sizes]
    assert sum(counts) / 20 == pytest.approx(64, abs=0.2) and counts[0] < 48 < 96 < counts[-1]
    assert pool_sizes(run, 0.25, 0.0) == [(8, 8)] * 20


def test_sparsedits_layout():
    assert layout_of(None, 28) == "P" + "GSSSRD" * 4 + "DDD"
    deeper = ["PGRD", "PGSRD", "PGSSSRD", "PGSSSRDD", "P" + "GSSSRD" * 2 + "D"]
    assert [layout_of(None, blocks) for blocks in (4, 5, 7, 8, 14)] == deeper


def test_the_toy_is_no_backbone_for_those_that_need_heads():
    with pytest.raises(ValueError, match="no blocks whose attention heads"):
        METHODS.build("dydit", {}).begin(Loop(Toy(), SamplerConfig()).run)
