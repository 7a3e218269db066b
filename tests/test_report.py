"""The report says what the numbers allow and no more; it never hides a trial."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_reports import by_label, table_line, text_of
from fake_reports import finished as finished
from fake_reports import sweep_folder as sweep_folder
from fake_results import make_sweep, write_result

from harness.api import ConfigError
from harness.reporting import tables
from harness.reporting.claims import ablation_section, based, control_comparisons, only_differ_in, summary, verdicts
from harness.reporting.paired import clear_best
from harness.reporting.report import main, write_report
from harness.reporting.rows import budgets, comparable, load_sweep

ROOT = Path(__file__).parents[1]


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
    code = "import harness.reporting.report, sys; sys.exit(bool({'torch', 'ray', 'mlflow', 'diffusers'} & set(sys.modules)))"
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
    part["stages"].pop("timing")
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


def test_what_a_rows_flops_leave_out_stands_beside_it_and_the_row_is_whole(sweep_folder):
    folder, results = sweep_folder
    whole = text_of(folder)
    control = by_label(results, "random_drop -24%")
    control["environment"]["score"]["compute/gflops_per_image"] = {"uncounted": "its scoring"}
    write_result(folder, control)
    text = text_of(folder)
    assert "*FLOPs leave out its scoring*" in table_line(text, "random_drop -24%")
    assert ("Not everything is here" in text) == ("Not everything is here" in whole)


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
    assert "**`tomesd -24%` is not shown to beat `random_drop`**" in text
    assert "**Not shown to beat `random_drop`**, on the machine of this sweep: `tomesd -24%`, `tomesd -41%`" in text
    assert "`shiva -24%` is not shown to beat" not in text


def test_of_an_equal_method_no_difference_is_shown_with_its_numbers(sweep_folder):
    folder, results = sweep_folder
    control, twin = by_label(results, "random_drop -24%"), by_label(results, "shiva -24%")
    rng = np.random.default_rng(0)
    twin["metrics"]["fidelity/fd_effnet_24"] = control["metrics"]["fidelity/fd_effnet_24"]
    twin["per_image"] = {name: [v + 1e-3 * rng.normal() for v in values] for name, values in control["per_image"].items()}
    write_result(folder, twin)
    sweep = load_sweep(folder)
    verdict = next(v for v in verdicts(sweep, control_comparisons(sweep)) if v.row.label == "shiva -24%")
    assert verdict.beats is False and "noise" not in verdict.sentence
    numbers = r"difference [-+][\d.e-]+, 95 % interval \[.*?, .*?\], n = 24"
    found = re.findall(rf"no difference shown \({numbers}\)", verdict.sentence)
    assert len(found) == 5 and "fd_effnet_24 no difference shown" in verdict.sentence


def test_nearer_to_the_real_images_counts_even_where_the_drift_is_larger(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "tomesd -24%")
    odd["metrics"]["fidelity/fd_effnet_24"] |= {"value": 5.0, "interval": [4.0, 6.0]}
    write_result(folder, odd)
    sweep = load_sweep(folder)
    verdict = next(v for v in verdicts(sweep, control_comparisons(sweep)) if v.row.label == "tomesd -24%")
    assert verdict.beats and "beats `random_drop` in fd_effnet_24 (intervals apart); but worse in velocity" in verdict.sentence
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
    said = "no speed-up over dense shown** on the machine of this sweep: `tomesd -24%` (1.010"
    assert said in summary(sweep, control_comparisons(sweep))


def test_an_ablation_holds_everything_else_equal(finished):
    rows = [row for row in load_sweep(finished).rows if row.method == "shiva"]
    for group in only_differ_in(rows, "method.ratio_policy"):
        rest = [{k: v for k, v in row.varied.items() if k != "method.ratio_policy"} for row in group]
        assert len(group) == 2 and rest[0] == rest[1]
    (groups,) = only_differ_in(rows, "method.router_groups")
    assert [row.varied["method.router_groups"] for row in groups] == [4, 1, 8]  # as the sweep has them


def test_the_baseline_of_an_ablation_is_the_default_of_the_option(sweep_folder):
    """Neither the alphabet nor the value that came out best."""
    folder, _ = sweep_folder
    header = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    for default, others in (("fixed", "additive"), ("additive", "fixed")):
        header["defaults"] = {"shiva": {"method.ratio_policy": default, "method.router_groups": 8}}
        (folder / "sweep.json").write_text(json.dumps(header), encoding="utf-8")
        text = ablation_section(load_sweep(folder))
        lines = [line for line in text.splitlines() if line.startswith("- ratio_policy")]
        assert len(lines) == 2 and all(f"{others} against {default}" in line for line in lines)
        assert text.count(f"| {default} (default) |") == 2
        assert "router_groups 1 against 8" in text and "router_groups 4 against 8" in text
    rows = [row for row in load_sweep(folder).rows if row.varied.get("method.router_groups") in (4, 8)][:2]
    assert based(rows, "method.router_groups", {})[0] is rows[0]  # no row has the default: the first of the sweep


def test_a_sentence_that_rests_on_one_training_says_so_itself(sweep_folder):
    folder, _ = sweep_folder
    text = text_of(folder)
    short = text.split("## In short")[1].split("##")[0]
    for line in short.splitlines():
        assert "machine" in line or not line.startswith("-")
        assert ("one training" in line) == ("`shiva" in line and "random_drop" in line), line
    verdicts = text.split("## Does it beat chance?")[1].split("\n## ")[0].splitlines()
    for line in (line for line in verdicts if line.startswith("- ")):
        assert ("from one training" in line) == ("`shiva" in line), line


def test_an_ablation_without_a_difference_is_told_so(sweep_folder):
    folder, results = sweep_folder
    additive, fixed = by_label(results, "shiva -41%"), by_label(results, "shiva -41% ratio_policy=fixed")
    values = additive["per_image"]["dense/velocity_error"]
    fixed["per_image"]["dense/velocity_error"] = [v + (1e-4 if i % 2 else -0.9e-4) for i, v in enumerate(values)]
    write_result(folder, fixed)
    line = next(line for line in ablation_section(load_sweep(folder)).splitlines()
                if line.startswith("- ratio_policy fixed against additive") and "0.41" in line)
    assert re.search(r"\*\*no difference shown \(difference .*?, 95 % interval \[.*?\], n = 24\)\*\*", line)
    assert "from one training each" in line
