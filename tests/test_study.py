"""The studies in miniature: each invariant that a published report rests on, without figures."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import TinySD3, tiny_pipeline

from harness.engine.sampler import Loop, SamplerConfig
from harness.engine.tokens import Keep
from harness.study import estimators, estimators_report, stratified, synthetic
from harness.study.__main__ import main
from harness.study.flips import LOSSES, Samples, probing
from harness.study.synthetic import Task, cosines, learn, rest
from harness.study.synthetic_report import settles
from harness.study.writing import write

# ------------------------------------------------------------------------------------------ synthetic task


@pytest.fixture(scope="module")
def reproduced():
    """Curves of the reading that reproduces the paper's figure, in fewer steps."""
    return learn(Task(), seed=3, warmup=40, steps=350)


def test_k_settles_near_the_number_of_signal_tokens_and_the_router_finds_them(reproduced):
    at_rest = rest(reproduced)
    assert reproduced["k"][0] == 50 and settles([at_rest])
    assert at_rest["precision"] > 0.99 and at_rest["recall"] > 0.85


def test_without_the_factor_n_nearly_every_gate_is_shut():
    scores = 5 * torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    slopes = [(pi * (1 - pi) > 0.01).sum() for pi in (synthetic.inclusion(scores, 50.5, 0.2, tau) for tau in (0.1, 0.1 / 100))]
    assert slopes[0] > 80 and slopes[1] <= 2


def test_a_penalty_on_k_over_n_does_not_bring_k_down(reproduced):
    assert min(learn(Task(penalty="k/N"), seed=0, warmup=40, steps=150)["k"]) > 35 > reproduced["k"][149]


def test_eq_7_on_a_residual_block_learns_the_reverse_order():
    recall = {name: np.mean(learn(Task(block="residual", estimator=name), seed=0, warmup=50, steps=50)["recall"][30:])
              for name in ("eq7", "teacher_contrast")}
    assert recall["eq7"] < 0.2 and recall["teacher_contrast"] > 0.95


def test_the_cosines_with_a_closed_form_meet_it_and_eq_7_opposes_the_gradient_of_a_residual_block():
    means = {name: np.mean(values) for name, values in cosines(40, torch.Generator().manual_seed(0)).items()}
    assert means["independent"] == pytest.approx(0.5**0.5, abs=0.04)
    assert means["bernoulli"] == pytest.approx((2 / 3) ** 0.5, abs=0.04)
    assert means["residual/pi"] < -0.4 and means["task/pi"] > 0.5


def test_a_curve_that_ends_outside_the_range_is_not_called_settled():
    good = {"k": 19.0, "k_swing": 0.3}
    assert settles([good]) and not settles([good, {"k": 24.0, "k_swing": 0.3}]) and not settles([{"k": 19.0, "k_swing": 5.0}])


# ------------------------------------------------------------------------------------------ stratified timesteps


@pytest.mark.parametrize("batch_size", stratified.BATCH_SIZES)
def test_the_linear_curve_has_the_variances_of_its_closed_form(batch_size):
    found = stratified.theory(stratified.ratio_curves(0)["linear"], batch_size)
    whole = 0.4**2 / 12
    assert found["uniform"] == pytest.approx(whole / batch_size, rel=1e-4)
    assert found["stratified"] == pytest.approx(whole / batch_size**3, rel=1e-3)
    assert found["between"] == pytest.approx(found["uniform"] - found["stratified"], rel=1e-6)


def test_stratified_draws_save_the_variance_between_strata():
    for row in stratified.measure([0], num_batches=1000)["rows"]:
        for kind in ("uniform", "stratified"):
            assert abs(row[kind]["variance"] - row["theory"][kind]) < 4 * row[kind]["standard_error"]
        saved, error = stratified.saved(row)
        assert abs(saved - row["theory"]["between"]) < 4 * error
        assert row["stratified"]["variance"] < row["uniform"]["variance"]


def test_the_report_says_so_when_the_variance_does_not_fall_as_claimed():
    data = {**stratified.measure([0], num_batches=200), "seconds": 1.0}
    assert "**Held**" in stratified.report(data)
    for row in data["rows"]:
        row["stratified"]["variance"] = row["uniform"]["variance"]
    assert "**Did not hold**" in stratified.report(data)


# ------------------------------------------------------------------------------------------ exact flips


@pytest.fixture
def samples():
    """Three noised rows for a tiny SD3."""
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor([0.2, 0.5, 0.8])
    noisy, target = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return Samples(noisy, target, level * 1000, level, torch.tensor([1, 2, 3]), tiny(1).encode(["a", "b", "c"]))


def tiny(num_layers):
    return TinySD3.from_pipeline(tiny_pipeline(num_layers=num_layers, dual_attention_layers=()))


@pytest.fixture
def probe(samples):
    """Routed at random, 38 of 64 tokens."""
    backbone = tiny(5)
    with probing(backbone, Loop(backbone, SamplerConfig(num_steps=2, guidance_scale=1.0)).run, samples) as probe:
        probe.route(estimators.by_chance, 38)
        yield probe


@pytest.mark.parametrize("block", [1, 4])
def test_replaying_the_blocks_before_a_change_gives_the_loss_of_a_whole_pass(probe, block):
    rows = torch.arange(3)
    unchanged = probe.losses_with(block, rows, probe.kept[block])
    fewer = probe.losses_with(block, rows, probe.kept[block][:, 1:])
    sets = [None if kept is None else kept.clone() for kept in probe.kept]
    sets[block] = sets[block][:, 1:]
    probe.injection.method.choose = lambda hidden_states, site: None if site.block == 0 else Keep(sets[site.block], 64)
    with torch.no_grad():
        whole = probe._losses(*probe._predict(rows), rows)
    for loss in LOSSES:
        torch.testing.assert_close(unchanged[loss], probe.losses[loss], rtol=1e-5, atol=0)
        torch.testing.assert_close(fewer[loss], whole[loss], rtol=1e-5, atol=0)
        assert not torch.allclose(fewer[loss], unchanged[loss], rtol=1e-5, atol=0)


def test_the_effect_of_a_token_is_the_loss_with_it_minus_the_loss_without_it(probe):
    rows, kept = torch.arange(3), probe.kept[2]
    inside = kept[:, 5]
    without = probe.losses_with(2, rows, kept[:, [i for i in range(38) if i != 5]])
    outside = torch.tensor([next(i for i in range(64) if i not in row) for row in kept.tolist()])
    joined = probe.losses_with(2, rows, torch.cat([kept, outside[:, None]], dim=1))
    for loss in LOSSES:
        torch.testing.assert_close(probe.effects(2, rows, inside)[loss], probe.losses[loss] - without[loss])
        torch.testing.assert_close(probe.effects(2, rows, outside)[loss], joined[loss] - probe.losses[loss])


def test_a_probe_leaves_the_backbone_as_it_was(samples):
    backbone = tiny(3)
    before = backbone.denoise(samples.noisy, samples.timestep, samples.conditioning)
    with probing(backbone, Loop(backbone, SamplerConfig(num_steps=2, guidance_scale=1.0)).run, samples) as probe:
        probe.route(estimators.by_norm, 30)
        probe.effects(2, torch.tensor([0]), probe.kept[2][0, :1])
    assert torch.equal(backbone.denoise(samples.noisy, samples.timestep, samples.conditioning), before)
    assert all("forward" not in block.__dict__ for block in backbone.transformer.transformer_blocks)


def test_contrast_estimators_follow_the_exact_change_and_eq_7_on_the_last_block_opposes_it(samples):
    backbone = tiny(2)
    with probing(backbone, Loop(backbone, SamplerConfig(num_steps=2, guidance_scale=1.0)).run, samples) as probe:
        probe.route(estimators.by_chance, 52)
        records = estimators.study_probe(probe, torch.Generator().manual_seed(0), per_side=12, more=4)
    chosen = [record for record in records if record["loss"] == "diffusion"]  # near its minimum distillation is not first order
    for name in ("dense_contrast", "teacher_contrast"):
        assert np.mean(estimators_report.agreement(chosen, name, estimators_report.pearson)) > 0.3
    assert np.mean(estimators_report.agreement(chosen, "eq7", estimators_report.pearson, "kept")) < -0.9
    assert np.mean(estimators_report.agreement(chosen, "eq7_prose", estimators_report.pearson, "kept")) > 0.9


def test_the_losses_are_those_of_training(probe):
    from harness.training import losses

    features, wanted = probe._features, probe._wanted
    expected = losses.normalised_error(features[3][1], wanted[3][1])
    with torch.no_grad():
        probe.injection.method.choose = lambda hidden_states, site: None if site.block == 0 else Keep(probe.kept[site.block], 64)
        prediction, _ = probe._predict(torch.arange(3))
    expected = expected + torch.nn.functional.mse_loss(prediction, probe._dense)
    torch.testing.assert_close(probe.losses["distill"].mean().float(), expected)
    torch.testing.assert_close(probe.losses["diffusion"].mean().float(),
                               torch.nn.functional.mse_loss(prediction, probe.samples.target))


def test_the_slope_in_k_is_the_sum_over_tokens_of_the_closed_form():
    gradient, scores = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    pi = estimators.inclusion(estimators.standardise(scores[None]), 38.0, estimators.TAU_RANK, estimators.TAU_SEL)[0]
    expected = (gradient * pi * (1 - pi)).sum() / (estimators.TAU_SEL * 64)
    torch.testing.assert_close(estimators.estimated_slope(gradient, scores, 38), expected)


def test_an_estimate_without_information_scores_zero_and_half():
    truth, nothing = np.array([1.0, -2.0, 3.0]), np.zeros(3)
    assert estimators_report.pearson(truth, nothing) == 0 and estimators_report.cosine(truth, nothing) == 0
    assert estimators_report.same_sign(truth, nothing) == 0.5 and estimators_report.same_sign(truth, -truth) == 0


# ------------------------------------------------------------------------------------------ command line and reports


@pytest.mark.parametrize("arguments,words", [(["stratifed"], "Did you mean 'stratified'"),
                                             (["synthetic", "--seeds", "1", "1"], "--seeds"),
                                             (["stratified", "--store", "x"], "--store")])
def test_bad_arguments_are_refused_with_their_name(arguments, words, caplog):
    assert main(arguments) == 2
    assert words in caplog.text


def test_a_study_writes_its_report_its_numbers_and_its_figures(tmp_path):
    data = {**stratified.measure([0], num_batches=100), "seconds": 1.0}
    report = write("stratified", stratified, copy.deepcopy(data), tmp_path / "out").read_text()
    assert "python -m harness.study stratified --seeds 0" in report and "standard error" in report
    assert json.loads((tmp_path / "out" / "data.json").read_text())["rows"] == data["rows"]
    assert (tmp_path / "out" / "stratified.png").stat().st_size > 1000


def test_the_synthetic_report_tells_a_claim_that_failed(tmp_path):
    curve = {"k": [50.0, 24.0], "recall": [1.0, 1.0], "precision": [0.5, 0.8]}
    data = {"seeds": [0], "steps_between_points": 5, "curves": {name: [curve] for name in synthetic.VARIANTS},
            "rest": {name: [rest(curve)] for name in synthetic.VARIANTS}, "cosines": cosines(2, torch.Generator().manual_seed(0))}
    assert "**Did not hold**" in synthetic.report(data) and "**Held**" not in synthetic.report(data)
