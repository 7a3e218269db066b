"""What a sweep file means, and what is refused before anything is computed."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import fake_sweep
import pytest

from harness.api import BACKBONES, ConfigError
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.trial.ids import trial_id

ROOT = Path(__file__).parent.parent
HEAD = "name: s\nseeds: 4\nbackbone: sd3\nmetrics: [probe]\n"


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    fake_sweep.install(monkeypatch)


@pytest.fixture
def read(tmp_path):
    """Text of a sweep file -> the resolved sweep."""

    def read(text: str):
        path = tmp_path / "s.yaml"
        path.write_text(text)
        return resolve(load(path))

    return read


def with_methods(*lines: str, top: str = "") -> str:
    return HEAD + top + "methods:\n" + "".join(f"  - {line}\n" for line in lines)


def test_reading_a_sweep_imports_no_heavy_library():
    code = "import sys, harness.sweep.file; print(sorted({'torch','ray','mlflow','diffusers','numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_only_grid_search_makes_an_axis(read):
    trials = read(with_methods("{name: random_drop, keep_ratio: {grid_search: [0.9, 0.7]}}")).trials
    assert [trial["method"]["keep_ratio"] for trial in trials] == [0.9, 0.7]
    with pytest.raises(ConfigError, match=r"methods\[0\]\.keep_ratio: expected float, got list \[0.9, 0.7\]"):
        read(with_methods("{name: random_drop, keep_ratio: [0.9, 0.7]}"))


def test_an_entry_may_ask_for_a_measured_speedup_in_place_of_the_default_budget(read):
    sweep = read(with_methods("dense", "{name: random_drop, speedup: {grid_search: [1.25, 2]}}", "{name: tomesd}",
                              top="budget: {flops_cut: 0.2}\nresources: {timing_threads: 2}\n"))
    assert [trial["budget"] for trial in sweep.trials] == [
        None, {"speedup": 1.25, "threads": 2}, {"speedup": 2.0, "threads": 2}, {"flops_cut": 0.2}]
    assert [entry.label for entry in sweep.entries] == ["dense", "random_drop x1.25", "random_drop x2", "tomesd -20%"]


def test_an_axis_may_sit_on_any_leaf_and_the_last_one_turns_fastest(read):
    sweep = read(with_methods("dense", "{name: random_drop, flops_cut: {grid_search: [0.2, 0.4]}}",
                              top="sampler: {num_steps: {grid_search: [4, 8]}}\n"))
    assert [(t["method"]["name"], t["sampler"]["num_steps"], (t["budget"] or {}).get("flops_cut")) for t in sweep.trials] == [
        ("dense", 4, None), ("dense", 8, None), ("random_drop", 4, 0.2), ("random_drop", 4, 0.4), ("random_drop", 8, 0.2),
        ("random_drop", 8, 0.4)]


def test_dense_comes_first_and_no_trial_comes_twice(read):
    sweep = read(with_methods("{name: random_drop, keep_ratio: {grid_search: [0.9, 0.9]}}", "random_drop",
                              "{name: random_drop, keep_ratio: 0.6}", "dense"))
    assert [entry.label for entry in sweep.entries] == ["dense", "random_drop keep_ratio=0.9", "random_drop"]


def test_a_trial_id_depends_on_the_resolved_trial_and_on_nothing_else(read):
    plain = read(with_methods("{name: tomesd, ffn: true}")).trial_ids
    assert plain == read("# a comment\n" + with_methods("{ffn: true, name: tomesd, stride: 2}", top="question: why\n")).trial_ids
    for other in ("{name: tomesd}", "{name: tomesd, ffn: true, stride: 4}"):
        assert plain != read(with_methods(other)).trial_ids
    assert plain != read(with_methods("{name: tomesd, ffn: true}").replace("seeds: 4", "seeds: 5")).trial_ids


def test_a_trial_id_is_the_same_tomorrow():
    assert trial_id({"b": [1, 2.5], "a": None}) == "6971a9c19db1"


def test_whole_numbers_mean_the_same_as_decimals(read):
    one, two = (read(with_methods("dense", top=f"sampler: {{guidance_scale: {scale}}}\n")).trial_ids for scale in ("4", "4.0"))
    assert one == two


@pytest.mark.parametrize(("written", "means"), [("96", [0, 95]), ("0-95", [0, 95]), ("'7-7'", [7, 7]), ("100 - 103", [100, 103])])
def test_seeds_are_a_count_or_an_inclusive_range(read, written, means):
    assert read(with_methods("dense").replace("seeds: 4", f"seeds: {written}")).trials[0]["seeds"] == means


def test_a_budget_takes_the_place_of_the_knob(read):
    trial = read(with_methods("{name: tomesd, flops_cut: 0.24}")).trials[0]
    assert trial["budget"] == {"flops_cut": 0.24}
    assert "keep_ratio" not in trial["method"] and trial["method"]["stride"] == 2


def test_a_default_budget_yields_to_methods_that_say_their_own(read):
    text = with_methods("dense", "tomesd", "{name: tomesd, flops_cut: 0.41}", "{name: tomesd, keep_ratio: 0.7}",
                        "{name: random_drop, flops_cut: null}", top="budget: {flops_cut: 0.24}\n")
    assert [(t["budget"] or {}).get("flops_cut") for t in read(text).trials] == [None, 0.24, 0.41, None, None]


def test_training_options_reach_trained_methods_only(read):
    text = with_methods("dense", "learner", "{name: learner, train: {steps: 5}}", top="train: {steps: 9, seed: 3}\n")
    trains = [trial["train"] for trial in read(text).trials]
    assert trains[0] is None
    assert [(train["steps"], train["seed"]) for train in trains[1:]] == [(9, 3), (5, 3)]


def test_labels_are_unique_and_name_what_differs(read):
    text = with_methods("dense", "{name: tomesd, flops_cut: {grid_search: [0.24, 0.41]}}",
                        "{name: tomesd, flops_cut: 0.24, stride: 4}",
                        "{name: random_drop, label: chance, keep_ratio: {grid_search: [0.5, 0.7]}}")
    sweep = read(text)
    assert [entry.label for entry in sweep.entries] == [
        "dense", "tomesd -24%", "tomesd -41%", "tomesd -24% stride=4", "chance random_drop keep_ratio=0.5",
        "chance random_drop keep_ratio=0.7"]
    assert sweep.entries[3].varied == {"method.name": "tomesd", "method.stride": 4, "budget.flops_cut": 0.24}


REFUSED = {
    "empty file": ("", ["s.yaml", "empty", "methods"]),
    "not a mapping": ("- dense\n", ["s.yaml", "expected keys"]),
    "tab": ("name: s\nmethods:\n\t- dense\n", ["line 3", "spaces, never with tabs"]),
    "open brace": ("name: {s\n", ["line 2"]),
    "key twice": (HEAD + "name: t\nmethods: [dense]\n", ["line 5", "'name' is written twice"]),
    "key that is no text": (HEAD + "methods:\n  - {name: dense, off: 1}\n", ["'off'", "no text", "quotes"]),
    "unknown key": (HEAD + "method: [dense]\n", ["unknown key 'method'", "Did you mean 'methods'"]),
    "missing key": ("name: s\nseeds: 4\nbackbone: sd3\nmethods: [dense]\n", ["metrics is missing"]),
    "folder name": (with_methods("dense").replace("name: s\n", "name: ../s\n"), ["name", "'../s'", "folder name"]),
    "name is a number": (with_methods("dense").replace("name: s\n", "name: 5\n"), ["name: int 5"]),
    "no methods": (HEAD + "methods: []\n", ["methods", "[]", "{name: dense}"]),
    "methods is a mapping": (HEAD + "methods: {name: dense}\n", ["methods: expected a list"]),
    "entry without name": (with_methods("{keep_ratio: 0.5}"), ["methods[0]", "needs a name"]),
    "unknown method": (with_methods("dense", "{name: random_drp}"),
        ["methods[1]", "unknown method 'random_drp'", "Did you mean 'random_drop'"]),
    "misspelt option": (with_methods("{name: random_drop, keep_raito: 0.5}"),
        ["methods[0]", "'keep_raito'", "Did you mean 'keep_ratio'"]),
    "keep ratio 0": (with_methods("{name: random_drop, keep_ratio: 0.0}"), ["methods[0]", "keep_ratio", "(0, 1]", "0.0"]),
    "keep ratio 1.5": (with_methods("{name: random_drop, keep_ratio: 1.5}"), ["methods[0]", "keep_ratio", "(0, 1]", "1.5"]),
    "keep ratio in a grid": (with_methods("{name: random_drop, keep_ratio: {grid_search: [0.5, 1.5]}}"), ["methods[0]", "1.5"]),
    "number as text": (with_methods("{name: random_drop, keep_ratio: '5e-1'}"),
        ["methods[0].keep_ratio", "expected float", "str '5e-1'"]),
    "yes is a bool": (with_methods("{name: tomesd, stride: yes}"), ["methods[0].stride", "line 6", "yes", "write true"]),
    "not a number": (with_methods("{name: random_drop, keep_ratio: .nan}"), ["keep_ratio", "finite"]),
    "cut of 1": (with_methods("{name: tomesd, flops_cut: 1.0}"), ["methods[0].flops_cut", "between 0 and 1", "1.0"]),
    "cut in percent": (with_methods("{name: tomesd, flops_cut: 24}"), ["flops_cut", "0.24", "int 24"]),
    "cut as text": (with_methods("{name: tomesd, flops_cut: 24%}"), ["methods[0].flops_cut", "0.24", "str '24%'"]),
    "cut for dense": (with_methods("{name: dense, flops_cut: 0.2}"), ["methods[0].flops_cut", "0.2", "remove flops_cut"]),
    "cut and knob": (with_methods("{name: tomesd, flops_cut: 0.2, keep_ratio: 0.5}"),
        ["methods[0].keep_ratio", "contradicts", "remove one"]),
    "slower": (with_methods("{name: tomesd, speedup: 0.8}"), ["methods[0].speedup", "above 1", "0.8"]),
    "two budgets": (with_methods("{name: tomesd, speedup: 1.2, flops_cut: 0.2}"), ["methods[0]", "two budgets", "remove one"]),
    "speedup of dense": (with_methods("{name: dense, speedup: 1.2}"), ["methods[0].speedup", "1.2", "remove speedup"]),
    "budget option": (with_methods("dense", top="budget: {flops: 0.2}\n"), ["budget", "'flops'", "flops_cut"]),
    "train for untrained": (with_methods("{name: tomesd, train: {steps: 3}}"), ["methods[0].train", "not trained"]),
    "train option": (with_methods("learner", top="train: {step: 3}\n"),
        ["train", "unknown option 'step'", "Did you mean 'steps'"]),
    "train value": (with_methods("{name: learner, train: {adapter_lr: '1e-4'}}"), ["methods[0].train.adapter_lr", "str '1e-4'"]),
    "metrics not a list": (with_methods("dense").replace("[probe]", "probe"), ["metrics", "expected a list", "'probe'"]),
    "unknown metric": (with_methods("dense").replace("[probe]", "[prove]"), ["metrics[0]", "'prove'", "Did you mean 'probe'"]),
    "metric option": (with_methods("dense").replace("[probe]", "[{name: probe, sise: 3}]"), ["metrics[0]", "'sise'", "'size'"]),
    "metric twice": (with_methods("dense").replace("[probe]", "[probe, probe]"), ["metrics[1]", "'probe' is listed twice"]),
    "unknown backbone": (with_methods("dense").replace("sd3", "sd4"), ["backbone", "'sd4'", "Did you mean 'sd3'"]),
    "backbone option": (with_methods("dense").replace("sd3", "{name: sd3, dtype: float8}"), ["backbone.dtype", "float8"]),
    "backbone missing name": (with_methods("dense").replace("sd3", "{dtype: float32}"), ["backbone", "needs a name"]),
    "sampler option": (with_methods("dense", top="sampler: {steps: 4}\n"), ["sampler", "'steps'", "Did you mean 'num_steps'"]),
    "sampler value": (with_methods("dense", top="sampler: {num_steps: 0}\n"), ["sampler", "num_steps", "at least 1", "0"]),
    "data set": (with_methods("dense", top="data: emojis\n"), ["data", "'emojis'", "Did you mean 'emoji'"]),
    "data split": (with_methods("dense", top="data: {name: emoji, split: test}\n"), ["data.split", "'test'", "reference"]),
    "seeds list": (with_methods("dense").replace("seeds: 4", "seeds: [0, 3]"), ["seeds", "[0, 3]", "0-95"]),
    "no seeds": (with_methods("dense").replace("seeds: 4", "seeds: 0"), ["seeds", "0"]),
    "seeds backwards": (with_methods("dense").replace("seeds: 4", "seeds: 9-3"), ["seeds", "9-3", "smaller seed first"]),
    "empty axis": (with_methods("{name: tomesd, stride: {grid_search: []}}"), ["methods[0].stride", "at least one value"]),
    "axis not a list": (with_methods("{name: tomesd, stride: {grid_search: 2}}"), ["methods[0].stride", "needs a list", "2"]),
    "axis with company": (with_methods("{name: tomesd, stride: {grid_search: [2], ffn: true}}"),
        ["methods[0].stride", "stands alone"]),
    "axis in resources": (with_methods("dense", top="resources: {workers: {grid_search: [1, 2]}}\n"),
        ["grid_search", "resources"]),
    "axis on a shared leaf": (with_methods("dense", top="sampler: {num_steps: {grid_search: [4, '8']}}\n"),
        ["sampler.num_steps", "str '8'"]),
    "resources option": (with_methods("dense", top="resources: {worker: 2}\n"),
        ["resources", "'worker'", "Did you mean 'workers'"]),
    "resources value": (with_methods("dense", top="resources: {threads: 0}\n"), ["resources", "threads", "at least 1"]),
    "label": (with_methods("{name: dense, label: [a]}"), ["methods[0].label", "short text"]),
    "empty label": (with_methods("{name: dense, label: ''}"), ["methods[0].label"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_place_value_and_remedy(read, case):
    text, fragments = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        read(text)
    for fragment in ["s.yaml", *fragments]:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such sweep file"):
        load(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tmp_path / "b.yaml")


def test_resolved_trials_are_complete(read):
    trial = read(with_methods("random_drop")).trials[0]
    from harness.engine.sampler import SamplerConfig

    assert set(trial["sampler"]) == {f.name for f in dataclasses.fields(SamplerConfig)}
    assert trial["metrics"] == [{"name": "probe", "size": 8}]
    assert set(trial["backbone"]) - {f.name for f in dataclasses.fields(BACKBONES.get("sd3").Config)} == {"name", "fingerprint"}
    assert trial["method"] == {"name": "random_drop", "keep_ratio": 0.6, "first_block": False}


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("table*.yaml")), ids=lambda file: file.stem)
def test_the_papers_sweeps_say_what_to_fetch(file, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.path.*data/mjhq30k"):
        resolve(load(file))


@pytest.mark.parametrize("file", [file for file in sorted((ROOT / "sweeps").glob("*.yaml")) if "table" not in file.stem],
                         ids=lambda file: file.stem)
def test_every_shipped_sweep_can_be_run(file, monkeypatch):
    monkeypatch.undo()
    sweep = resolve(load(file))
    assert sweep.name == file.stem and sweep.question or file.stem == "smoke"
    assert sweep.entries[0].label == "dense"
    assert len({entry.label for entry in sweep.entries}) == len(sweep.entries)
    written = file.read_text().partition(" trials")[0].rpartition("(")[2]
    assert written == str(len(sweep.entries)), "the header's number of trials"
