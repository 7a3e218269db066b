"""Over training seeds the report claims less, never more; the paper's claims are judged from the rows."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from fake_results import make_seeded_sweep, write_result

from harness.reporting import curves, seeds
from harness.reporting.claims import ablation_section, control_comparisons, only_differ_in, verdicts
from harness.reporting.paired import compare, compare_any
from harness.reporting.paper import CLAIMS, matches, paper_section
from harness.reporting.report import write_report
from harness.reporting.rows import load_sweep
from harness.reporting.score_maps import stored_scores
from harness.reporting.seeds import over_seeds
from harness.statistics import intervals

FD, ERROR = "fidelity/fd_effnet_24", "dense/velocity_error"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of three training seeds with its report: read, never changed."""
    folder = tmp_path_factory.mktemp("results") / "policy"
    make_seeded_sweep(folder, images=24)
    write_report(folder)
    return folder


@pytest.fixture
def seeded(tmp_path, monkeypatch):
    """(folder, results) of a sweep to change, whose figures are not drawn."""
    monkeypatch.setattr("harness.reporting.report._figures", lambda *sweeps: set())
    folder = tmp_path / "policy"
    return folder, make_seeded_sweep(folder, images=24, artifacts=False)


def rows_of(folder):
    return {row.label: row for row in over_seeds(load_sweep(folder)).rows}


def trainings(results, start):
    """Results of one setting, by seed."""
    return [r for r in results if r["label"] == start or r["label"].startswith(f"{start} seed=")]


def shift(folder, result, metric, by, image_noise=0.0):
    """Move a metric of one training, all its images alike, but for `image_noise`."""
    rng = np.random.default_rng(0)
    values = np.array(result["per_image"][metric])
    result["per_image"][metric] = (values + by + image_noise * rng.normal(size=len(values))).tolist()
    measure = result["metrics"][metric]
    measure["value"] += by
    measure["interval"] = [end + by for end in measure["interval"]]
    write_result(folder, result)


# ---------------------------------------------------------------------------------------------- one row per setting


def test_trainings_of_a_setting_are_one_row_of_their_mean(finished):
    trials = load_sweep(finished)
    rows = rows_of(finished)
    assert (len(trials.rows), len(rows)) == (17, 7)
    row = rows["shiva -41% ratio_policy=fixed"]
    mine = [r for r in trials.rows if r.label.startswith(row.label)]
    values = [r.value(ERROR) for r in mine]
    assert len(values) == 3 and row.value(ERROR) == pytest.approx(np.mean(values))
    assert row.spread(ERROR) == (min(values), max(values))
    assert np.allclose(row.per_image(ERROR), np.mean([r.per_image(ERROR) for r in mine], axis=0))
    assert rows["random_drop -41%"].spread(ERROR) is None and rows["random_drop -41%"].members == ()


def test_the_report_shows_the_spread_and_every_trial(finished):
    text = (finished / "report.md").read_text(encoding="utf-8")
    over, every = text.split("## Results over training seeds")[1], text.split("## Every trial")[1]
    line = next(line for line in over.splitlines() if line.startswith("| shiva -41% |"))
    assert line.split("|")[2].strip() == "3" and "–" in line
    for row in load_sweep(finished).rows:
        assert f"| {row.label} |" in every
    assert "One training seed" not in text
    with open(finished / "table.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 17


def test_a_factor_is_told_over_seeds_and_the_seed_is_no_factor(finished):
    sweep = over_seeds(load_sweep(finished))
    text = ablation_section(sweep)
    assert "### shiva: ratio_policy" in text and "seed=" not in text and "### shiva: seed" not in text
    rows = [row for row in sweep.rows if row.method == "shiva"]
    assert [len(group) for group in only_differ_in(rows, "method.ratio_policy")] == [3]


def test_a_lost_training_is_named_and_the_others_speak(seeded):
    folder, results = seeded
    lost = trainings(results, "shiva -41%")[1]
    write_result(folder, lost | {"status": "failed", "metrics": {}, "per_image": {}, "executed": {}, "series": {},
                                 "error": {"job": "score", "type": "E", "message": "m", "traceback": ""}})
    text = write_report(folder).read_text(encoding="utf-8")
    assert "failed in the score job" in text and "1 of 3 training seeds not whole" in text
    assert rows_of(folder)["shiva -41%"].spread(ERROR) is not None


def test_a_disturbed_timing_is_not_averaged_in(seeded):
    folder, results = seeded
    odd = trainings(results, "shiva -41%")[0]
    odd["environment"]["timing"]["latency/ratio_to_dense"]["contaminated"] = True
    odd["metrics"]["latency/ratio_to_dense"]["value"] = 9.0
    write_result(folder, odd)
    assert rows_of(folder)["shiva -41%"].value("latency/ratio_to_dense") < 1


# ---------------------------------------------------------------------------------------------- what may be claimed


def test_the_interval_by_hand():
    parts = [seeds.seed_part([1.0, 2.0, 3.0]), (0.0, np.inf)]
    low, high = intervals.combined_interval(2.0, parts)  # t(2) at 97.5 % is 4.3027, standard error 1 / sqrt(3)
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert intervals.freedom([(1.0, 2.0), (1.0, 2.0)]) == pytest.approx(4) and intervals.freedom([(0.0, np.inf)]) == np.inf


def test_trainings_that_mingle_are_no_claim_whatever_the_images_say(seeded):
    folder, results = seeded
    base = trainings(results, "shiva -41%")
    for one, other, by in zip(base, trainings(results, "shiva -41% ratio_policy=film"), (0.02, 0.02, 0.02), strict=True):
        other["per_image"], other["metrics"][ERROR] = {**one["per_image"]}, {**one["metrics"][ERROR]}
        shift(folder, other, ERROR, by, 1e-4)
    for result, by in zip(base, (-0.1, 0.0, 0.1), strict=True):  # 0.02 is nothing beside what trainings differ by
        shift(folder, result, ERROR, by)
    rows = rows_of(folder)
    comparison = compare(rows["shiva -41% ratio_policy=film"], rows["shiva -41%"], ERROR)
    assert comparison.apart is False and comparison.verdict == "noise"
    assert "overlap: no claim" in ablation_section(over_seeds(load_sweep(folder)))
    one, other = base[0], trainings(results, "shiva -41% ratio_policy=film")[0]
    alone = [load_sweep(folder).rows[[r["trial_id"] for r in results].index(r["trial_id"])] for r in (other, one)]
    assert compare(*alone, ERROR).verdict == "worse"  # a single seed would have claimed it


def test_trainings_apart_with_a_small_difference_to_their_spread_are_no_claim(tmp_path):
    folder = tmp_path / "policy"
    results = make_seeded_sweep(folder, images=24, artifacts=False)
    for name, values in (("shiva -41%", (0.10, 0.20, 0.30)), ("shiva -41% ratio_policy=film", (0.31, 0.41, 0.51))):
        for result, value in zip(trainings(results, name), values, strict=True):
            shift(folder, result, ERROR, value - result["metrics"][ERROR]["value"])
    rows = rows_of(folder)
    comparison = compare(rows["shiva -41% ratio_policy=film"], rows["shiva -41%"], ERROR)
    assert comparison.apart and comparison.p > 0.05 and comparison.verdict == "noise"


def test_equal_settings_are_rarely_told_apart():
    """Both kinds of chance: images and trainings. A test over images alone would claim most of these."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        a, b = rng.normal(size=3), rng.normal(size=3)
        images = rng.normal(size=64) * 0.1
        per_image = (a.mean() - b.mean()) + images - images.mean()
        variance = [seeds.seed_part(a), seeds.seed_part(b), (per_image.var(ddof=1) / 64, 63)]
        low, high = intervals.combined_interval(per_image.mean(), variance)
        found.append(low > 0 or high < 0)
    assert np.mean(found) < 0.08


def test_a_frechet_distance_is_compared_with_both_kinds_of_chance(finished):
    rows = rows_of(finished)
    comparison = compare_any(rows["shiva -41%"], rows["random_drop -41%"], FD)
    low, high = rows["random_drop -41%"].interval(FD)
    assert comparison.verdict == "better" and comparison.high - comparison.low > high - low
    assert compare_any(rows["shiva -41%"], rows["shiva -41% ratio_policy=film"], FD).verdict == "noise"


def test_an_untrained_control_is_compared_with_every_training(finished):
    sweep = over_seeds(load_sweep(finished))
    comparisons = control_comparisons(sweep)
    assert {c.row.label for c in comparisons} == {label for label in rows_of(finished) if label.startswith("shiva")}
    assert all(c.apart for c in comparisons if c.metric == ERROR)
    assert all(verdict.beats for verdict in verdicts(sweep, comparisons))


# ---------------------------------------------------------------------------------------------- the paper's claims


def test_a_claim_compares_rows_that_differ_in_its_option_only(finished):
    rows = over_seeds(load_sweep(finished)).rows
    table3 = next(claim for claim in CLAIMS if claim.place == "Table 3")
    ((better, worse),) = matches(rows, table3)
    assert (better.label, worse.label) == ("shiva -41%", "shiva -41% ratio_policy=fixed")
    for claim in CLAIMS:
        for better, worse in matches(rows, claim):
            assert better.trial["method"] != worse.trial["method"] and better.trial["budget"] == worse.trial["budget"]


@pytest.mark.parametrize(("by", "words"), [(0.0, "**held here**"), (-0.12, "**did not hold here**"),
                                           (None, "**no difference shown**")])
def test_the_verdict_follows_the_rows(seeded, by, words):
    folder, results = seeded
    fixed = trainings(results, "shiva -41% ratio_policy=fixed")
    for one, other in zip(trainings(results, "shiva -41%"), fixed, strict=True):
        if by is None:
            other["per_image"], other["metrics"] = one["per_image"], one["metrics"]
            write_result(folder, other)
        else:
            other["metrics"][FD] = one["metrics"][FD]
            shift(folder, other, ERROR, by)
    line = next(line for line in paper_section(over_seeds(load_sweep(folder))).splitlines() if line.startswith("| Table 3"))
    assert words in line and "FID 17.36 / 21.76" in line and "one training" not in line


def test_a_verdict_on_one_training_says_so_in_its_cell(seeded):
    folder, results = seeded
    for result in results:
        if (result["trial"]["train"] or {}).get("seed"):
            (folder / f"{result['trial_id']}.json").unlink()
    line = next(line for line in paper_section(over_seeds(load_sweep(folder))).splitlines() if line.startswith("| Table 3"))
    assert line.rstrip(" |").endswith("(one training each)")


def test_without_rows_for_a_claim_the_paper_is_not_quoted(seeded):
    folder, results = seeded
    for result in results:
        if "=" in result["label"].replace("seed=", ""):
            (folder / f"{result['trial_id']}.json").unlink()
    assert paper_section(over_seeds(load_sweep(folder))) == ""


# ---------------------------------------------------------------------------------------------- figures


def test_every_figure_of_a_seeded_sweep_is_drawn(finished):
    text = (finished / "report.md").read_text(encoding="utf-8")
    names = ["pareto.png", "grid.png", "keep_ratio.png", "training.png", "validation.png", "score_histograms.png"]
    names += [f"scores_{row.trial_id}.png" for row in over_seeds(load_sweep(finished)).rows if row.method == "shiva"]
    for name in names:
        assert f"({name})" in text and (finished / name).stat().st_size > 10_000
    assert len(list(finished.glob("scores_*.png"))) == 5  # one per setting, not per training


def test_curves_are_means_over_seeds(finished):
    row = rows_of(finished)["shiva -41%"]
    steps, values = curves.over_seeds(row, "val/diffusion_mse")
    assert values.shape == (3, len(steps)) and values.std(0).max() > 0
    expected = [r.result["series"]["val/diffusion_mse"] for r in row.members]
    assert np.allclose(values, np.array(expected)[..., 1])


def test_every_validation_series_has_a_panel_of_its_own(finished, monkeypatch, tmp_path):
    """The distance to the dense prediction is a curve of the trained model, not a line of the dense one."""
    monkeypatch.setattr(curves.plt, "close", lambda figure: None)
    curves.validation_figure(over_seeds(load_sweep(finished)).rows, tmp_path / "validation.png")
    panels = {axis.get_title(loc="left"): axis for axis in curves.plt.gcf().axes}
    assert {"validation loss", "distance to dense"} <= set(panels)
    assert len(panels["validation loss"].lines) == len(panels["distance to dense"].lines) > 1
    monkeypatch.undo()
    curves.plt.close("all")


def test_scores_are_standardised_within_their_map(finished):
    found = stored_scores(over_seeds(load_sweep(finished)))
    assert len(found) == 5 and found[0].routed == list(range(1, 8))
    maps = found[0].standardised[:, :, 1:]
    assert np.allclose(maps.mean(-1), 0, atol=1e-6) and np.allclose(maps.std(-1), 1)
