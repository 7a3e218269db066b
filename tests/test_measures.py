"""A measure says itself what it is about: its name decides nothing, but for results made before measures said it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from fake_results import make_sweep, write_result
from test_metrics import make_subject

import harness.metrics  # noqa: F401  (fills the registry)
from harness.api import METRICS, ConfigError, Measure, Metric, Traits
from harness.api import records as types
from harness.reporting.equivalence import dense_comparisons
from harness.reporting.merge import merge
from harness.reporting.page_data import rows_data
from harness.reporting.report import write_report
from harness.reporting.rows import Row, heading, load_sweep, title
from harness.reporting.tables import QUALITY, cell, cost_table, main_table, quality_columns
from harness.storage import records
from harness.storage.measures import traits
from harness.tracking import mapping

ROOT = Path(__file__).parent.parent
ENDS = ("report.md", "report.html", "table.csv", "table.tex")


@pytest.fixture
def sweep(tmp_path):
    """(folder, results) of a sweep made before measures said anything of themselves."""
    folder = tmp_path / "before"
    return folder, make_sweep(folder, images=24, artifacts=False)


def give(folder, results, name, make) -> None:
    """Every result gets the measure `make(result, index)` by `name`."""
    for index, result in enumerate(results):
        result["metrics"][name] = make(result, index)
        write_result(folder, result)


def measured(value, better="lower", **said):
    return {"value": value, "better": better, "interval": [value - 0.1, value + 0.1], "n": 24, **said}


# ---------------------------------------------------------------------------------------------- plug-ins


def test_a_measure_without_a_prefix_leads_ranks_and_compares_by_what_it_says(sweep):
    folder, results = sweep
    said = dict(group="fidelity", heading="likeness", title="likeness to photographs", unit="points", lead=9)
    give(folder, results, "odd", lambda result, index: measured(50.0 - 2 * index, **said))
    found = load_sweep(folder)
    assert found.quality == "odd" and title(found, "odd") == "likeness to photographs, points"
    (column,) = [head for name, head, _ in quality_columns(found) if name == "odd"]
    assert column == "likeness, points, n = 24 ↓" and column in main_table(found) and "odd" not in cost_table(found)
    assert re.search(r"\*\*\d\d\.\d\d \[", main_table(found))  # the clear best of a budget
    compared = [c for c in dense_comparisons(found) if c.metric == "odd"]
    assert len(compared) == 10 and not any(c.refused for c in compared)
    row = found.rows[0]
    moved = Row("x", "x", "done", {**row.result, "trial": {**row.trial, "data": {"name": "others"}}})
    assert row.comparison_key("odd") != moved.comparison_key("odd")
    assert "likeness to photographs, points" in write_report(folder).read_text(encoding="utf-8")
    assert rows_data(found)["y"] == "odd" and rows_data(found)["metrics"]["odd"]["group"] == "images"
    assert next(mapping.metrics(results[0]))[0] == "odd" and '"odd"' in mapping.view(mapping.known_metrics(results), "id")


def test_a_timing_or_a_share_by_any_name_is_shown_and_compared_as_one(sweep):
    folder, results = sweep
    give(folder, results, "pace", lambda result, index: measured(3.0, group="latency", heading="pace", unit="s"))
    give(folder, results, "spared", lambda result, index: measured(0.25, "higher", group="cost", percent=True))
    results[1]["environment"]["timing"]["latency/ratio_to_dense"]["contaminated"] = True
    results[1]["environment"]["timing"]["pace"] = {"kernel": "math"}
    write_result(folder, results[1])
    found = load_sweep(folder)
    assert cell(found.rows[1], "pace").endswith(" †") and cell(found.rows[0], "spared") == "25.0 %"
    assert "pace, s" in cost_table(found) and "spared" in cost_table(found)
    assert not {"pace", "spared"} & {name for name, *_ in quality_columns(found)}
    shown = rows_data(found)["metrics"]
    assert shown["pace"]["timing"] and shown["spared"]["percent"] and shown["spared"]["group"] == "cost"
    row = found.rows[0]
    other = Row("x", "x", "done", {**row.result, "trial": {**row.trial, "sampler": {"num_steps": 1}}})
    assert row.comparison_key("pace") != other.comparison_key("pace")
    assert "pace.kernel" not in str(mapping.tags(results[1], None)) and "pace" not in write_report(folder).read_text().split(
        "Environment: ")[1]  # the notes of a metric are no fact of the machine


def test_two_runs_of_a_trial_may_differ_in_a_timing_by_any_name(sweep, tmp_path):
    folder, results = sweep
    give(folder, results, "pace", lambda result, index: measured(3.0, group="latency"))
    again = tmp_path / "again"
    others = make_sweep(again, images=24, artifacts=False)
    give(again, others, "pace", lambda result, index: measured(4.0, group="latency"))
    (merged,) = merge([folder, again], tmp_path / "out")
    assert not any("gave other numbers" in note for note in merged.notes)


def test_a_window_is_what_the_measure_says_and_none_is_asked_where_it_says_none(sweep):
    folder, results = sweep
    give(folder, results, "wide", lambda result, index: measured(10.0 + index, group="prompt", window=["absolute", 50.0]))
    give(folder, results, "derived", lambda result, index: measured(10.0, group="prompt", window=None))
    found = load_sweep(folder)
    assert {c.metric for c in dense_comparisons(found)} & {"wide", "derived"} == {"wide"}
    assert "wide, window ±50.00" in write_report(folder).read_text(encoding="utf-8")


def test_a_group_that_is_none_is_refused_where_it_is_written():
    with pytest.raises(ConfigError, match="group is 'fidelty'; take one of fidelity, prompt"):
        Measure("x", 1.0, "lower", group="fidelty")
    with pytest.raises(ConfigError, match="Wrong: its group is 'speed'"):
        type("Wrong", (Metric,), {"group": "speed"})


def test_every_metric_of_the_catalogue_says_its_group():
    for name in METRICS.names():
        assert METRICS.get(name).group != "other", name


# ---------------------------------------------------------------------------------------------- results made before


def test_results_made_before_render_as_those_that_say_the_same(sweep, tmp_path):
    folder, results = sweep
    after = tmp_path / "after" / folder.name
    for result, new in zip(results, make_sweep(after, images=24, artifacts=False), strict=True):
        assert not any("group" in measure for measure in result["metrics"].values())
        new["metrics"] = {name: {**measure, **traits(name, measure).traits()} for name, measure in new["metrics"].items()}
        write_result(after, new)
        assert list(mapping.metrics(new)) == list(mapping.metrics(result))
        assert mapping.measures_table(new) == mapping.measures_table(result)
        assert mapping.tags(new, "parent") == mapping.tags(result, "parent")
    write_report(folder), write_report(after)
    for end in ENDS:
        assert (folder / end).read_text(encoding="utf-8") == (after / end).read_text(encoding="utf-8"), end
    assert rows_data(load_sweep(folder)) == rows_data(load_sweep(after))
    text = (folder / "report.md").read_text(encoding="utf-8")
    for words in ("FD to real images (EfficientNet-Lite0 features, n = 24)", "PSNR to dense, dB, n", "FLOPs cut", "tokens kept"):
        assert words in text, words


def same(measure: Measure, group: str) -> None:
    """What the name of `measure` meant before is what it says now."""
    said = {"value": 1.0, **measure.traits(), "group": measure.group or group}
    before, now = (Row("x", "x", "done", {"metrics": {measure.name: record}}) for record in ({"value": 1.0}, said))
    for words in (heading, title):
        assert words(before, measure.name, *([True] if words is heading else [])) == \
            words(now, measure.name, *([True] if words is heading else []))
    old, new = before.traits(measure.name), now.traits(measure.name)
    assert (old.group, old.percent, old.lead, old.window) == (new.group, new.percent, new.lead, new.window)


@pytest.mark.parametrize("name, options", [("fd", {}), ("precision_recall", {"features": "effnet"}), ("paired", {})])
def test_what_a_metric_says_is_what_its_names_meant_before(tmp_path, name, options):
    rng = np.random.default_rng(0)
    images, dense = (rng.integers(0, 255, (8, 64, 64, 3)).astype(np.uint8) for _ in range(2))
    metric = METRICS.build(name, options)
    found = list(metric.measure(make_subject(tmp_path, images, dense_images=dense)))
    assert len(found) == 2
    for measure in found:
        same(measure, metric.group)


def test_nothing_reads_the_name_of_a_measure_but_the_reader_of_old_results():
    reading = re.compile(r"""(startswith|endswith)\(\(?["'](fidelity|prompt|image|dense|compute|tokens|memory|latency|_cut)"""
                         r"""|split\(["']/["']\)\[""")
    for file in sorted((ROOT / "harness").rglob("*.py")):
        if file.name != "measures.py" and "embedded" not in file.parts:
            assert not reading.search(file.read_text(encoding="utf-8")), file
    assert traits("latency/anything", {}) == Traits(group="latency") and traits("odd", {}) == Traits(group="other")
    assert set(QUALITY) < {"fidelity", "prompt", "image", "dense", "other", "cost"}


# ---------------------------------------------------------------------------------------------- types and checks


@pytest.mark.parametrize("check, of", [(records.MEASURE, types.MeasureRecord), (records.TRIAL, types.Trial),
                                       (records.PART, types.Part), (records.RESULT, types.Result),
                                       (records.ERROR, types.Failure)], ids=lambda one: getattr(one, "__name__", ""))
def test_what_is_checked_when_it_is_read_is_what_the_types_say(check, of):
    assert set(check.known) == set(get_type_hints(of))


def test_a_damaged_word_of_a_measure_counts_as_missing_by_name():
    with pytest.raises(records.Unreadable, match=r"metrics.odd.group should be fidelity or"):
        records.PART({"trial": {}, "code": "x", "metrics": {"odd": measured(1.0, group="fun")}}, "")
    with pytest.raises(records.Unreadable, match="window should be a pair"):
        records.PART(json.loads(json.dumps({"trial": {}, "code": "x", "metrics": {"odd": measured(1.0, window=[1])}})), "")
