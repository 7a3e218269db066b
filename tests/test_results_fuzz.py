"""Whatever JSON lies in a results folder: report, mirror and driver read it or name it. No traceback.

About 440 damaged results, parts and headers, the same ones each time.
"""

import copy
import json

import pytest
from fake_results import make_sweep
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from harness.api import ConfigError
from harness.execution.results_folder import Job, ResultsFolder
from harness.reporting import report
from harness.reporting.front import front_of, summary
from harness.reporting.merge import merge
from harness.reporting.page_data import rows_data
from harness.reporting.rows import load_sweep
from harness.reporting.tables import csv_text, latex_text
from harness.storage import records
from harness.tracking import mapping

COMMON = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
              phases=(Phase.generate, Phase.shrink))
LEAVES = st.sampled_from([None, True, False, 0, -1, 3, 2**53, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "dense",
                          "../../x", "<b>", "\ud800", [], {}, [1, 2], ["a"], {"a": 1}, [[1], [1, 2]]])
SEARCH = {"algorithm": "random", "sampler": "tpe", "parallel": 2, "seed": 0, "num_trials": 3, "space": {"method.name": "x"},
          "objectives": [{"metric": "compute/flops_cut", "direction": "maximize", "reference": None},
                         {"metric": "latency/ratio_to_dense", "direction": "minimize", "reference": 1.0}]}
ASHA = {"rungs": [0.5], "metric": "val/loss", "reduction_factor": 2.0, "synchronous": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, header, three results) of a small sweep with a search and rungs."""
    folder = tmp_path_factory.mktemp("results") / "ablation"
    results = make_sweep(folder, images=4, artifacts=False)
    results = [result for result in results if result["trial"]["budget"] in (None, {"flops_cut": 0.24})][:4]
    header = json.loads((folder / "sweep.json").read_text())
    header |= {"trial_ids": [result["trial_id"] for result in results], "asha": ASHA,
               "search": {**SEARCH, "numbers": {result["trial_id"]: 1 + i for i, result in enumerate(results)}}}
    return folder, header, results


def paths(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


@st.composite
def damage(draw, tree):
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(tree))
        if not places:
            break
        top = [place for place in places if len(place) < 3]
        place = draw(st.sampled_from(places if draw(st.booleans()) else top))
        holder = tree
        for key in place[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if what == "drop":
            del holder[place[-1]]
        elif what == "add" and isinstance(holder, dict):
            key = draw(st.sampled_from(["value", "contaminated", "uncounted", "to_dense", "<i>", "notes/x"]))
            holder[key] = copy.deepcopy(draw(LEAVES))
        else:
            holder[place[-1]] = copy.deepcopy(draw(LEAVES))
    return tree


def read_all(folder):
    """Everything that reads results, figures apart."""
    sweep = load_sweep(folder)
    sections = report._sections(report.marked(sweep), report.marked(report.over_seeds(sweep)), set())
    report.as_markdown("\n\n".join(sections)).encode()
    csv_text(sweep).encode(), latex_text(sweep).encode()
    json.dumps(rows_data(sweep), allow_nan=False)
    front = front_of(sweep)
    if front:
        summary(front)


def mirrored(result):
    for made in (mapping.params(result), mapping.tags(result, "run"), mapping.measures_table(result), mapping.digest(result),
                 mapping.per_image_table(result, []), list(mapping.metrics(result)), list(mapping.system_metrics(result)),
                 list(mapping.data_sets(result))):
        json.dumps(made, allow_nan=False).encode()
    mapping.summary_metrics([result])


def put(path, tree):
    path.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))


@settings(max_examples=200, **COMMON)
@given(choices=st.data())
def test_any_result_is_read_or_named(whole, choices):
    folder, header, results = whole
    put(folder / "sweep.json", header)
    for result in results:
        put(folder / f"{result['trial_id']}.json", result)
    path = folder / f"{results[choices.draw(st.integers(0, 3))]['trial_id']}.json"
    put(path, choices.draw(damage(json.loads(path.read_text()))))
    try:
        read_all(folder)
        merge([folder], folder.parent / "merged")
    except ConfigError as error:
        assert path.name in str(error) or "readable result" in str(error)
    result = records.read(path, records.result_of(path.stem))
    if result is not None:
        mirrored(result)


@settings(max_examples=120, **COMMON)
@given(choices=st.data())
def test_any_header_is_read_or_named(whole, choices):
    folder, header, results = whole
    for result in results:
        put(folder / f"{result['trial_id']}.json", result)
    put(folder / "sweep.json", choices.draw(damage(header)))
    try:
        read_all(folder)
    except ConfigError as error:
        assert "sweep.json" in str(error)


@settings(max_examples=120, **COMMON)
@given(choices=st.data())
def test_any_part_is_read_or_missing(whole, tmp_path_factory, choices):
    folder, _, results = whole
    result = results[1]
    part = {key: result[key] for key in ("metrics", "per_image", "executed", "series", "trial", "timestamp_ms")}
    part |= {"environment": result["environment"]["score"], "stages": result["stages"]["score"], "code": "c", "threads": 1,
             "job": "score", "trial_id": result["trial_id"], "artifacts": {},
             "usage": {"began_ms": 1, "curves": {"cpu": [[0, 1.0]]}},
             "error": choices.draw(st.sampled_from([None, {"job": "score", "type": "T", "message": "m", "traceback": "t"}]))}
    place = ResultsFolder(folder)
    job = Job("score", result["trial_id"], "label", "c", 1, result["trial"])
    place.part_path(job.key).parent.mkdir(exist_ok=True)
    put(place.part_path(job.key), choices.draw(damage(part)))
    place.finished(job), place.failed(job), place.forget_failures([])
    from harness.sweep.file import Entry

    merged = place.merge(Entry(result["trial_id"], result["trial"], "label", {}, "c"), "ablation")
    if merged["status"] != "partial" or merged["metrics"]:
        records.load(folder / f"{result['trial_id']}.json", records.result_of(result["trial_id"]))
