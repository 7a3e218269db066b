"""The report says what the numbers allow and no more; it never hides a trial."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from fake_results import make_sweep, write_result
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from harness.api import ConfigError
from harness.report import main, write_report
from harness.reporting import plots, tables
from harness.reporting.claims import ablation_section, control_comparisons, only_differ_in, summary, verdicts
from harness.reporting.grid import LABEL_CHARACTERS
from harness.reporting.paired import Comparison, clear_best, compare, corrected, holm, paired_difference
from harness.reporting.rows import budgets, comparable, load_sweep

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep with its report: read, never changed."""
    folder = tmp_path_factory.mktemp("results") / "ablation"
    make_sweep(folder)
    write_report(folder)
    return folder


@pytest.fixture
def sweep_folder(tmp_path, monkeypatch):
    """A finished sweep without pictures, to damage, whose figures are not drawn. Returns (folder, results)."""
    monkeypatch.setattr("harness.report._figures", lambda *sweeps: set())
    folder = tmp_path / "ablation"
    return folder, make_sweep(folder, images=24, artifacts=False)


def text_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def by_label(results, label):
    return next(result for result in results if result["label"] == label)


def table_line(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {label}"))


# ---------------------------------------------------------------------------------------------- whole reports


def test_every_trial_is_a_row_and_every_figure_is_drawn(finished):
    text = (finished / "report.md").read_text(encoding="utf-8")
    for row in load_sweep(finished).rows:
        assert table_line(text, row.label)
    for name in ("pareto.png", "pareto_dense.png", "grid.png", "keep_ratio.png", "training.png"):
        assert f"({name})" in text and (finished / name).stat().st_size > 10_000


def test_csv_equals_the_json_numbers(finished):
    with open(finished / "table.csv", encoding="utf-8", newline="") as file:
        lines = {line["trial_id"]: line for line in csv.DictReader(file)}
    for path in finished.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, measure in result.get("metrics", {}).items():
            line = lines[result["trial_id"]]
            assert float(line[name]) == measure["value"]
            if measure["interval"]:
                assert [float(line[f"{name}.lo"]), float(line[f"{name}.hi"])] == measure["interval"]


def test_the_report_is_a_pure_function_of_the_folder(finished):
    before = {name: (finished / name).read_bytes() for name in ("report.md", "table.csv", "table.tex")}
    write_report(finished)
    assert before == {name: (finished / name).read_bytes() for name in before}


def test_the_report_needs_neither_torch_nor_ray_nor_mlflow():
    code = "import harness.report, sys; sys.exit(bool({'torch', 'ray', 'mlflow', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_flops_latency_and_memory_stand_side_by_side(finished):
    lines = (finished / "report.md").read_text(encoding="utf-8").splitlines()
    head = next(line for line in lines if line.startswith("| trial | asked"))
    heads = [cell.strip() for cell in head.split("|")]
    first = heads.index("GFLOP / image")
    assert heads[first:first + 4] == ["GFLOP / image", "FLOPs cut", "latency (dense = 1) ↓", "peak MiB"]


def test_the_embedded_model_is_never_shown_without_its_caveat(sweep_folder):
    folder, results = sweep_folder
    assert "not comparable to anyone's" in text_of(folder)
    for result in results:
        result["trial"]["backbone"]["weights"] = "a/big-model"
        write_result(folder, result)
    assert "not comparable to anyone's" not in text_of(folder)


def test_one_training_seed_is_said_so(finished):
    assert "One training seed" in (finished / "report.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- holes


def test_a_failed_trial_is_a_row_with_its_error(sweep_folder):
    folder, results = sweep_folder
    broken = by_label(results, "tomesd -41%")
    broken |= {"status": "failed", "metrics": {}, "per_image": {}, "executed": {}, "series": {},
               "error": {"job": "score", "type": "RuntimeError", "message": "expected 64 tokens\ngot 65", "traceback": "..."}}
    write_result(folder, broken)
    text = text_of(folder)
    assert "failed in the score job: RuntimeError: expected 64 tokens got 65" in table_line(text, "tomesd -41%")
    assert "Not everything is here" in text


def test_a_trial_without_a_file_is_a_row(sweep_folder):
    folder, results = sweep_folder
    (folder / f"{results[3]['trial_id']}.json").unlink()
    assert "no result file" in table_line(text_of(folder), results[3]["label"])


def test_a_damaged_file_is_a_row(sweep_folder):
    folder, results = sweep_folder
    (folder / f"{results[3]['trial_id']}.json").write_text('{"schema": 1, "tri', encoding="utf-8")
    assert "not JSON" in table_line(text_of(folder), results[3]["label"])


def test_a_partial_trial_keeps_its_numbers_and_says_what_is_missing(sweep_folder):
    folder, results = sweep_folder
    part = by_label(results, "shiva -24%")
    part["status"] = "partial"
    part["metrics"] = {name: m for name, m in part["metrics"].items() if not name.startswith(("latency", "memory"))}
    write_result(folder, part)
    line = table_line(text_of(folder), "shiva -24%")
    assert "timing job not finished" in line and "| 9.524 |" in line


def test_results_of_an_older_sweep_file_are_left_out_and_named(sweep_folder):
    folder, results = sweep_folder
    header = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    header["trial_ids"].remove(results[-1]["trial_id"])
    (folder / "sweep.json").write_text(json.dumps(header), encoding="utf-8")
    text = text_of(folder)
    assert results[-1]["trial_id"] in text and results[-1]["label"] not in text


def test_a_sweep_of_failures_still_has_a_report(tmp_path):
    folder = tmp_path / "ablation"
    results = make_sweep(folder, artifacts=False)
    for result in results:
        write_result(folder, result | {"status": "failed", "metrics": {}, "per_image": {}, "executed": {}, "series": {},
                                       "error": {"job": "score", "type": "E", "message": "m", "traceback": ""}})
    assert text_of(folder).count("failed in the score job") == 2 * len(results)


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither sweep.json"):
        write_report(tmp_path)
    assert main([str(tmp_path / "nowhere")]) == 2


def test_another_schema_is_refused(sweep_folder):
    folder, results = sweep_folder
    write_result(folder, results[0] | {"schema": 99})
    with pytest.raises(ConfigError, match="schema 99"):
        write_report(folder)


# ---------------------------------------------------------------------------------------------- what may be ranked


def test_different_sample_counts_are_never_ranked_in_one_column(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "shiva -24%")
    for name in odd["metrics"]:
        if name.startswith(("fidelity/", "dense/")):
            odd["metrics"][name]["n"] = 7
    write_result(folder, odd)
    sweep = load_sweep(folder)
    columns = [(name, {row.label for row in rows}) for name, _, rows in tables.quality_columns(sweep)]
    for name in ("dense/ssim", "fidelity/fd_effnet_24"):
        mine = [labels for column, labels in columns if column == name]
        assert len(mine) == 2 and {"shiva -24%"} in mine
    assert "never compare across" in text_of(folder)


def test_different_references_are_never_ranked_in_one_column(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "shiva -24%")
    odd["environment"]["score"]["fidelity/fd_effnet_24"]["reference_id"] = "other"
    write_result(folder, odd)
    sets = comparable(load_sweep(folder).rows, "fidelity/fd_effnet_24")
    assert [len(rows) for rows in sets] == [len(results) - 1, 1]


def test_other_seeds_are_not_paired(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "shiva -24%")
    odd["trial"]["seeds"] = [100, 123]
    write_result(folder, odd)
    sweep = load_sweep(folder)
    mine = [c for c in control_comparisons(sweep) if c.row.label == "shiva -24%"]
    assert mine and all(c.verdict == "refused" for c in mine)
    assert "not comparable in velocity error" in text_of(folder)
    del odd["metrics"]["fidelity/fd_effnet_24"], odd["metrics"]["fidelity/kd_effnet_24"]
    write_result(folder, odd)
    assert "could not be compared" in text_of(folder)


def test_a_row_that_missed_its_budget_is_in_no_ranking(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "tomesd -24%")
    odd["metrics"]["compute/flops_cut"]["value"] = 0.10
    write_result(folder, odd)
    sweep = load_sweep(folder)
    assert "tomesd -24%" not in [row.label for group in budgets(sweep.rows) for row in group.rows]
    assert "‡" in table_line(text_of(folder), "tomesd -24%")


def test_rows_without_a_budget_join_the_group_they_executed(sweep_folder):
    folder, results = sweep_folder
    free = by_label(results, "tomesd -24%")
    free["trial"]["budget"] = None
    write_result(folder, free)
    groups = budgets(load_sweep(folder).rows)
    assert [group.cut for group in groups] == [0.24, 0.41]
    assert "tomesd -24%" in [row.label for row in groups[0].rows]


def test_bold_needs_an_interval_outside_all_others(sweep_folder):
    folder, results = sweep_folder
    rows = {row.label: row for row in load_sweep(folder).rows}
    pair = [rows["shiva -24%"], rows["tomesd -24%"]]
    assert clear_best(pair, "dense/velocity_error").label == "shiva -24%"
    wide = by_label(results, "tomesd -24%")
    wide["metrics"]["dense/velocity_error"]["interval"] = [0.0, 1.0]
    write_result(folder, wide)
    rows = {row.label: row for row in load_sweep(folder).rows}
    assert clear_best([rows["shiva -24%"], rows["tomesd -24%"]], "dense/velocity_error") is None


def test_a_disturbed_timing_is_marked_and_never_the_best(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "random_drop -41%")
    odd["metrics"]["latency/ratio_to_dense"] |= {"value": 0.3, "interval": [0.29, 0.31]}
    write_result(folder, odd)
    assert "**0.300 [0.290, 0.310]**" in table_line(text_of(folder), "random_drop -41%")
    odd["environment"]["timing"]["latency/ratio_to_dense"]["contaminated"] = True
    write_result(folder, odd)
    text = text_of(folder)
    assert "0.300 [0.290, 0.310] † |" in table_line(text, "random_drop -41%") and "†" in text.split("## Results")[0]


# ---------------------------------------------------------------------------------------------- claims


def test_a_method_that_does_not_beat_random_drop_is_told_so(sweep_folder):
    folder, _ = sweep_folder
    text = text_of(folder)
    assert "**`tomesd -24%` does not beat `random_drop`**" in text
    assert "**Do not beat `random_drop`**: `tomesd -24%`, `tomesd -41%`" in text
    assert "`shiva -24%` does not beat" not in text


def test_an_equal_method_is_inside_the_noise_and_does_not_beat(sweep_folder):
    folder, results = sweep_folder
    control, twin = by_label(results, "random_drop -24%"), by_label(results, "shiva -24%")
    rng = np.random.default_rng(0)
    twin["metrics"]["fidelity/fd_effnet_24"] = control["metrics"]["fidelity/fd_effnet_24"]
    twin["per_image"] = {name: [v + 1e-3 * rng.normal() for v in values] for name, values in control["per_image"].items()}
    write_result(folder, twin)
    sweep = load_sweep(folder)
    verdict = next(v for v in verdicts(sweep, control_comparisons(sweep)) if v.row.label == "shiva -24%")
    assert verdict.beats is False and "inside the noise" in verdict.sentence


def test_nearer_to_the_real_images_counts_even_where_the_drift_is_larger(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "tomesd -24%")
    odd["metrics"]["fidelity/fd_effnet_24"] |= {"value": 5.0, "interval": [4.0, 6.0]}
    write_result(folder, odd)
    sweep = load_sweep(folder)
    verdict = next(v for v in verdicts(sweep, control_comparisons(sweep)) if v.row.label == "tomesd -24%")
    assert verdict.beats and "beats `random_drop` in fd_effnet_24 (intervals apart), but is worse in velocity" in verdict.sentence
    assert verdict.mixed


def test_more_flops_than_the_control_are_told_with_the_verdict(finished):
    sweep = load_sweep(finished)
    verdict = next(v for v in verdicts(sweep, control_comparisons(sweep)) if v.row.label == "shiva -24%")
    assert "executed 23.2 % fewer FLOPs, `random_drop` 24.0 %" in verdict.sentence


@pytest.mark.parametrize("left", ["no random_drop", "random_drop at another budget"])
def test_without_a_control_nothing_is_claimed(sweep_folder, left):
    folder, results = sweep_folder
    header = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    header["trial_ids"] = [r["trial_id"] for r in results if "random_drop" not in r["label"] and "-41%" not in r["label"]]
    if left != "no random_drop":
        header["trial_ids"] += [r["trial_id"] for r in results if r["label"] == "random_drop -41%"]
    (folder / "sweep.json").write_text(json.dumps(header), encoding="utf-8")
    text = text_of(folder)
    assert "Not answered by this sweep: no `random_drop` row shares a budget" in text and "beats `random_drop`" not in text


def test_a_method_that_saves_flops_but_no_time_is_named(sweep_folder):
    folder, results = sweep_folder
    slow = by_label(results, "tomesd -24%")
    slow["metrics"]["latency/ratio_to_dense"] |= {"value": 1.01, "interval": [0.99, 1.03]}
    write_result(folder, slow)
    sweep = load_sweep(folder)
    assert "no measurable speed-up** over dense: `tomesd -24%` (1.010" in summary(sweep, control_comparisons(sweep))


def test_an_ablation_holds_everything_else_equal(finished):
    rows = [row for row in load_sweep(finished).rows if row.method == "shiva"]
    for group in only_differ_in(rows, "method.ratio_policy"):
        rest = [{k: v for k, v in row.varied.items() if k != "method.ratio_policy"} for row in group]
        assert len(group) == 2 and rest[0] == rest[1]
    (groups,) = only_differ_in(rows, "method.router_groups")
    assert [row.varied["method.router_groups"] for row in groups] == [1, 4, 8]


def test_an_ablation_inside_the_noise_is_told_so(sweep_folder):
    folder, results = sweep_folder
    additive, fixed = by_label(results, "shiva -41%"), by_label(results, "shiva -41% ratio_policy=fixed")
    values = additive["per_image"]["dense/velocity_error"]
    fixed["per_image"]["dense/velocity_error"] = [v + (1e-4 if i % 2 else -0.9e-4) for i, v in enumerate(values)]
    write_result(folder, fixed)
    line = next(line for line in ablation_section(load_sweep(folder)).splitlines()
                if line.startswith("- ratio_policy fixed against additive") and "0.41" in line)
    assert "**inside the noise**" in line


# ---------------------------------------------------------------------------------------------- statistics


def test_pairing_finds_what_independent_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    mean, low, high, p = paired_difference(hard + 0.05 + 0.01 * rng.normal(size=200), hard)
    assert low < 0.05 < high and p < 0.001
    assert 1.96 * hard.std() / np.sqrt(200) > 0.05  # the difference is far inside the spread over images
    assert mean == pytest.approx(0.05, abs=0.01)


def test_the_p_value_is_uniform_when_nothing_differs():
    rng = np.random.default_rng(1)
    p_values = [paired_difference(rng.normal(size=60), rng.normal(size=60), seed=i)[3] for i in range(60)]
    assert 0.3 < np.mean(p_values) < 0.7 and np.mean(np.array(p_values) < 0.05) < 0.15


def test_identical_images_are_no_difference():
    values = np.linspace(0, 1, 30)
    assert paired_difference(values, values) == (0.0, 0.0, 0.0, 1.0)


def test_a_handful_of_images_proves_nothing():
    *_, p = paired_difference(np.array([1.0, 1.1]), np.zeros(2))
    assert p == pytest.approx(0.5, abs=0.05)
    *_, p = paired_difference(np.array([1.0, 1.1, 0.9, 1.2]), np.zeros(4))
    assert p == pytest.approx(0.125, abs=0.02)


def test_below_eight_images_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.report._figures", lambda *sweeps: set())
    make_sweep(tmp_path / "few", images=4, artifacts=False)
    text = text_of(tmp_path / "few")
    assert "4 images, fewer than 8" in text and "beats `random_drop`" not in text and "not beat" not in text
    results = text.split("## Results")[1].split("##")[0]
    assert "**" not in "".join(line.split("|")[-4] for line in results.splitlines() if line.startswith("| shiva"))


def test_a_gap_that_so_few_images_could_never_prove_is_not_called_noise():
    rng, base = np.random.default_rng(0), {"row": None, "other": None, "metric": "m", "better": "lower"}

    def corrected_of(num_images: int, gap: float) -> Comparison:
        found = paired_difference(rng.normal(gap, 0.1, num_images), np.zeros(num_images))
        one = Comparison(**base, difference=found[0], low=found[1], high=found[2], p=found[3], n=num_images)
        return corrected([one] * 30)[0]

    small, large, nothing = corrected_of(8, 1.0), corrected_of(32, 1.0), corrected_of(8, 0.0)
    assert small.verdict == "noise" and small.too_few and small.p > 0.05
    assert large.verdict == "worse" and not large.too_few
    assert nothing.verdict == "noise" and not nothing.too_few


@pytest.mark.parametrize(("name", "lines"), [
    ("shiva ratio_policy=structure_first rejected=cache", ["shiva ratio_policy=", "structure_first", "rejected=cache"]),
    ("shiva estimator=eq7", ["shiva estimator=eq7"]), ("x" * 40, ["x" * 40])])
def test_long_names_break_between_words(name, lines):
    assert plots.wrapped(name, LABEL_CHARACTERS).split("\n") == lines


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_infinite_psnr_pairs_are_dropped_not_averaged(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "shiva -24%")
    odd["per_image"]["dense/psnr_db"][3] = float("inf")
    write_result(folder, odd)
    rows = {row.label: row for row in load_sweep(folder).rows}
    comparison = compare(rows["shiva -24%"], rows["random_drop -24%"], "dense/psnr_db")
    assert comparison.n == 23 and np.isfinite(comparison.difference)


def test_what_a_rows_flops_leave_out_stands_beside_it_and_the_row_is_whole(sweep_folder):
    folder, results = sweep_folder
    whole = text_of(folder)
    control = by_label(results, "random_drop -24%")
    control["environment"]["score"]["compute/gflops_per_image"] = {"uncounted": "its scoring"}
    write_result(folder, control)
    text = text_of(folder)
    assert "*FLOPs leave out its scoring*" in table_line(text, "random_drop -24%")
    assert ("Not everything is here" in text) == ("Not everything is here" in whole)


@pytest.mark.parametrize("timed", [True, False])
def test_the_legend_of_the_front_lies_inside_the_figure(tmp_path, monkeypatch, timed):
    """Without latency there is one panel, half as wide, and as many methods."""
    results = make_sweep(tmp_path / "ablation", images=24, artifacts=False)
    for result in results:
        if not timed:
            result["metrics"] = {name: one for name, one in result["metrics"].items() if not name.startswith("latency/")}
        write_result(tmp_path / "ablation", result)
    sweep, seen = load_sweep(tmp_path / "ablation"), []
    monkeypatch.setattr(plots.plt, "close", seen.append)
    metric = next(name for name in results[0]["metrics"] if name.startswith("fidelity/fd"))
    plots.pareto_figure(sweep, metric, tmp_path / "front.png")
    (figure,) = seen
    box = figure.legends[0].get_window_extent()
    assert len(figure.axes) == 1 + timed and box.x0 >= 0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize(("characters", "width"), [(plots.NAME_CHARACTERS, 6), (90, 12)])
def test_a_name_of_the_front_that_says_everything_does_not_leave_the_figure(finished, tmp_path, monkeypatch, characters, width):
    sweep, seen = load_sweep(finished), []
    monkeypatch.setattr(plots, "NAME_CHARACTERS", characters)
    options = "router_width=32 router_lr=0.00284 ratio_policy=structure_first policy_lr=0.00017"
    rows = [replace(row, label=f"#{i} {row.method} {options}") for i, row in enumerate(sweep.rows)
            if "-24%" not in row.label]
    for row in rows:
        row.result["metrics"] = {name: one for name, one in row.result["metrics"].items() if not name.startswith("latency/")}
    monkeypatch.setattr(plots.plt, "close", seen.append)
    plots.pareto_figure(replace(sweep, rows=tuple(rows)), sweep.quality, tmp_path / "front.png")
    edge = np.asarray(Image.open(tmp_path / "front.png").convert("L"))[:, -2:]
    assert edge.min() == 255 and seen[0].get_figwidth() < width


def test_no_name_of_the_front_covers_another():
    """Also where a long name of one column reaches into the next."""
    figure = Figure(figsize=(5.6, 4.6))
    axis = figure.subplots()
    places = [(0.84, 239, "shiva"), (0.87, 233, "ratio_policy=structure_first rejected=cache"), (0.85, 302, "random_drop"),
              (0.88, 233, "ratio_policy=structure_first"), (1.03, 231, "shiva"), (1.05, 187, "dense"), (1.16, 231, "tomesd")]
    points = [(*place, "black") for place in places]
    axis.scatter(*zip(*[point[:2] for point in points], strict=True))
    plots._label_points(axis, points, 0.05)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # of the words, without their leader
    assert len(boxes) == len(points)
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.shrunk(0.98, 0.8).overlaps(b.shrunk(0.98, 0.8))]


def test_the_titles_of_the_heat_maps_stay_over_their_panels(finished, tmp_path, monkeypatch):
    sweep, seen = load_sweep(finished), []
    rows = [replace(row, label=f"{row.label} ratio_policy=structure_first rejected=cache") for row in sweep.rows]
    monkeypatch.setattr(plots.plt, "close", seen.append)
    assert plots.heat_maps_figure(sweep, rows, tmp_path / "kept.png")
    *maps, bar = [axis for axis in seen[0].axes if axis.axison]
    right = bar.get_window_extent().x0
    assert len(maps) >= 3 and all(axis.title.get_window_extent().x1 < right for axis in maps)
