"""What is unavailable is said in every table, and nothing is called as good as dense that was not shown to be."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from fake_results import make_seeded_sweep, make_sweep, write_result

from harness.reporting.equivalence import dense_comparisons, equivalent, window
from harness.reporting.report import write_merged, write_report
from harness.reporting.rows import Row, load_sweep
from harness.tracking import mapping

REASON = "inception.pth could not be fetched ([Errno -2] Name_or service | not known)"
GONE = {"value": None, "better": "none", "interval": None, "n": None, "unavailable": REASON}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """(folder, results) of a sweep without pictures, whose figures are not drawn."""
    monkeypatch.setattr("harness.reporting.report._figures", lambda *sweeps: set())
    return tmp_path / "s", make_sweep(tmp_path / "s", images=24, artifacts=False)


def change(folder, results, name, make) -> None:
    """Give every result the measure `make(result)` -> (measure, values per image, notes) of metric `name`."""
    for result in results:
        measure, per_image, notes = make(result)
        result["metrics"][name] = measure
        result["per_image"] |= {} if per_image is None else {name: per_image}
        result["environment"]["score"][name] = notes
        write_result(folder, result)


def test_an_unavailable_metric_is_told_in_every_table_and_never_a_number(sweep):
    folder, results = sweep
    change(folder, results, "fidelity/fid_24", lambda result: (GONE, None, {}))
    text = write_report(folder).read_text(encoding="utf-8").replace("\\[", "[").replace("\\]", "]")
    table = text[text.index("## Results"):].splitlines()
    head, _, *lines = [line.replace("\\|", "!").strip("| ").split(" | ") for line in table if line.startswith("|")][:13]
    cells = {line[head.index("fid_24")] for line in lines}
    assert len(lines) == 11 and cells == {f"unavailable: {REASON}".replace("|", "!")}
    assert f"- `fid_24`: unavailable: {REASON} (11 of 11 trials)" in text
    with open(folder / "table.csv", encoding="utf-8") as file:
        assert {row["fidelity/fid_24"] for row in csv.DictReader(file)} == {f"unavailable: {REASON}"}
    assert (folder / "table.tex").read_text(encoding="utf-8").count(r"unavailable: inception.pth could not be fetched") == 11
    assert r"Name\_or service" in (folder / "table.tex").read_text(encoding="utf-8")
    assert "unavailable: inception.pth could not be fetched" in (folder / "report.html").read_text(encoding="utf-8")
    assert load_sweep(folder).quality == "fidelity/fd_effnet_24"  # what has no value leads nothing


def test_some_rows_without_it_keep_the_numbers_of_the_others(sweep):
    folder, results = sweep
    measured = {"value": 12.5, "better": "lower", "interval": [12.0, 13.0], "n": 24}
    change(folder, results, "fidelity/fid_24", lambda r: (GONE if r is results[2] else measured, None, {"reference_id": "x"}))
    text = write_report(folder).read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith(f"| {results[2]['label']} "))
    assert "unavailable: " in line and "12.5 [12.0, 13.0]" not in line and text.count("12.5 [12.0, 13.0]") >= 10
    assert "(1 of 11 trials)" in text and load_sweep(folder).quality == "fidelity/fid_24"


def test_mlflow_gets_a_tag_and_no_metric(sweep):
    folder, results = sweep
    change(folder, results, "fidelity/fid_24", lambda result: (GONE, None, {}))
    assert mapping.tags(results[0], None)["fidelity/fid_24"] == f"unavailable: {REASON}"
    assert "fidelity/fid_24" not in [name for name, _, _ in mapping.metrics(results[0])]
    rows = {row[0]: row[1] for row in mapping.measures_table(results[0])["data"]}
    assert rows["fidelity/fid_24"] == f"unavailable: {REASON}"


def test_training_seeds_without_it_are_pooled_to_unavailable(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.reporting.report._figures", lambda *sweeps: set())
    results = make_seeded_sweep(tmp_path / "s", images=24, artifacts=False)
    change(tmp_path / "s", results, "fidelity/fid_24", lambda result: (GONE, None, {}))
    text = write_report(tmp_path / "s").read_text(encoding="utf-8")
    assert text.count("unavailable: inception.pth") == 7 + len(results) + 1  # settings, trials, and the list on top


def test_a_measured_value_of_an_equal_trial_fills_the_hole(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.reporting.report._figures", lambda *sweeps: set())
    measured = {"value": 77.25, "better": "lower", "interval": [70.0, 80.0], "n": 24}
    for name, measure in (("a", GONE), ("b", measured)):
        results = make_sweep(tmp_path / name, images=24, artifacts=False)
        change(tmp_path / name, results, "fidelity/fid_24", lambda result, m=measure: (m, None, {"reference_id": "x"}))
    text = write_merged([tmp_path / "a", tmp_path / "b"], tmp_path / "merged").read_text(encoding="utf-8")
    assert "unavailable" not in text and text.count("77 [70, 80]") >= 11


# ---------------------------------------------------------------------------------------------- as good as dense


def scored(spread: float, shift: float):
    """A CLIP score around 30 for each of 24 images; methods are `shift` off dense, image by image with `spread`."""
    base = 30 + np.random.default_rng(0).normal(size=24)

    def make(result):
        own = base if result["trial"]["method"]["name"] == "dense" else \
            base + shift + spread * np.random.default_rng(int(result["trial_id"], 16)).normal(size=24)
        return {"value": float(own.mean()), "better": "higher", "interval": None, "n": 24}, own.tolist(), {"scorer_id": "clip"}
    return make


@pytest.mark.parametrize(("spread", "shift", "words"), [(0.01, 0.0, "equivalent"), (0.5, 0.0, "no difference shown"),
                                                        (0.1, -0.8, "worse"), (0.1, 0.8, "better")])
def test_equal_worse_and_not_to_be_told_are_three_answers(sweep, spread, shift, words):
    folder, results = sweep
    change(folder, results, "prompt/clip_score_24", scored(spread, shift))
    found = [c for c in dense_comparisons(load_sweep(folder)) if c.metric.startswith("prompt/")]
    assert len(found) == 10 and all(c.n == 24 for c in found)
    said = ["equivalent" if equivalent(c) else {"noise": "no difference shown"}.get(c.verdict, c.verdict) for c in found]
    assert said.count(words) >= 9
    text = write_report(folder).read_text(encoding="utf-8")
    assert "## As good as dense?" in text and words in text and "clip_score_24, window ±0.0" in text


def test_the_recorded_gap_of_a_distance_is_what_is_compared(sweep):
    folder, results = sweep
    gap = {"difference": 3.0, "interval": [2.5, 3.5], "p": 0.0005, "permutations": 1999}

    def make(result):
        notes = {"reference_id": "x", "subsets": {"count": 10, "size": 12, "mean": 21.0, "sd": 1.25}}
        dense = result["trial"]["method"]["name"] == "dense"
        value = 40.0 if dense else 43.0
        return ({"value": value, "better": "lower", "interval": [value - 9, value + 9], "n": 24}, None,
                notes if dense else {**notes, "to_dense": gap})
    change(folder, results, "fidelity/fid_24", make)
    found = [c for c in dense_comparisons(load_sweep(folder)) if c.metric == "fidelity/fid_24"]
    tested = len(dense_comparisons(load_sweep(folder)))
    assert {(c.difference, c.low, c.high, c.verdict) for c in found} == {(3.0, 2.5, 3.5, "worse")}
    assert all(0.0005 * (tested - 30) <= c.p <= 0.0005 * tested for c in found)  # Holm over everything in the table
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Over 10 random halves (12 images" in text and text.count("21.00 ± 1.25") == 11


def test_windows_are_a_share_of_dense_or_in_the_metrics_own_unit():
    def half(name, value, **said):
        return window(Row("id", "dense", "done", {"metrics": {name: {"value": value, "better": "lower", **said}}}), name)
    assert half("prompt/clip_score_5k", 32.0) == pytest.approx(0.064) and half("fidelity/fid_5k", -25) == 0.5
    assert half("prompt/image_reward_5k", 0.001) == 0.05
    assert half("likes", 10.0, group="prompt", window=["absolute", 0.3]) == 0.3 and half("likes", 10.0, group="prompt") == 0.2


def test_other_scorers_and_seeds_are_never_compared(sweep):
    folder, results = sweep
    change(folder, results, "prompt/clip_score_24", scored(0.1, -0.8))
    results[1]["environment"]["score"]["prompt/clip_score_24"] = {"scorer_id": "another"}
    results[2]["trial"]["seeds"] = [100, 123]
    for result in results[1:3]:
        write_result(folder, result)
    refused = [c.row.label for c in dense_comparisons(load_sweep(folder)) if c.refused and c.metric.startswith("prompt/")]
    assert refused == [results[1]["label"], results[2]["label"]]


def test_the_reference_of_one_metric_does_not_part_the_rows_of_another(sweep):
    folder, results = sweep
    measured = {"value": 12.5, "better": "lower", "interval": [12.0, 13.0], "n": 24}
    for result in results[:3]:  # only these measured KID, against other features
        change(folder, [result], "fidelity/kid_24", lambda _: (measured, None, {"reference_id": "inception"}))
    rows = load_sweep(folder).rows
    assert len({row.comparison_key("fidelity/fd_effnet_24") for row in rows}) == 1
    assert json.loads(rows[0].comparison_key("fidelity/kid_24"))[1] == ["inception"]
