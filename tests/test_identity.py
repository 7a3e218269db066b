"""Every input of a trial is known by its content: changed under its old name, what depends on it runs again and nothing else."""

import json
import os
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import fake_sweep
import numpy as np
import pytest
import torch
from fake_data import make_folder, picture
from rich.console import Console

from harness.api import BACKBONES, DATASETS, METHODS, METRICS, Backbone, ConfigError, Content, DataSet, Method, Metric
from harness.backbones import loading
from harness.data.emoji import EmojiSet
from harness.execution import worker
from harness.execution.driver import DONE, Options, run_sweep
from harness.execution.results_folder import ResultsFolder
from harness.metrics.prompt.hps import Hps
from harness.storage import fingerprints
from harness.storage.fingerprints import UNKNOWN, fingerprint
from harness.storage.store import Store
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.training import train
from harness.trial import identity

HUB = "owner/model"
COMMITS = ("a" * 40, "b" * 40)
PLUGS = {kind: f"import plug_{kind}_helper\nfrom test_identity import Plug{kind}\n\n\nclass Own(Plug{kind}):\n"
               f"    value = plug_{kind}_helper.VALUE\n" for kind in ("Backbone", "Metric", "Method", "Data")}


class PlugBackbone(Backbone):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        weights: str
        device: str = "cpu"


class PlugMetric(Metric):
    measures = ("fidelity/plug_{n}", "latency/plug_ms")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        weights: str | None = None
        threshold: float = 0.5

    def measure(self, subject):
        return iter(())


class PlugMethod(Method):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        keep_ratio: float = 0.5
        table: str


class PlugData(DataSet):
    def contents(self, split):
        return [Content("a", "a cat", "")]

    def load(self, split):
        return None


SWEEP = """
name: one
seeds: 0-3
backbone: {{name: plug, weights: {place}/model}}
data: {{name: folder, path: {place}/pictures, resolution: 16, train: {{name: folder, path: {place}/lessons}}}}
metrics:
  - {{name: plug, weights: {place}/scores.bin}}
  - {{name: hps, command: {place}/python}}
methods:
  - {{name: plug, table: {place}/table.csv, keep_ratio: 0.3}}
  - {{name: random_drop, keep_ratio: 0.7}}
"""
OTHER = """
name: two
seeds: 0-3
backbone: {{name: hub, weights: owner/model}}
data: plug
metrics: [probe]
methods:
  - {{name: random_drop, keep_ratio: 0.9}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with all that two sweeps name, and plug-ins of every kind in modules of their own with a helper each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_sweep.install(monkeypatch)
    plugs = tmp_path / "plugs"
    plugs.mkdir()
    monkeypatch.syspath_prepend(plugs)
    for kind, text in PLUGS.items():
        (plugs / f"plug_{kind}.py").write_text(text)
        (plugs / f"plug_{kind}_helper.py").write_text("VALUE = 1\n")
        for name in (f"plug_{kind}", f"plug_{kind}_helper"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        cls = __import__(f"plug_{kind}").Own
        registry = {"Backbone": BACKBONES, "Metric": METRICS, "Method": METHODS, "Data": DATASETS}[kind]
        cls.name = "plug"
        monkeypatch.setitem(registry._classes, "plug", cls)
    monkeypatch.setitem(BACKBONES._classes, "hub", type("OnHub", (PlugBackbone,), {"name": "hub", "__module__": __name__}))
    monkeypatch.setitem(METRICS._classes, "hps", Hps)
    for file, text in {"model/model_index.json": "{}", "model/scheduler/scheduler_config.json": "{}", "model/README.md": "words",
                       "model/tokenizer/vocab.json": "{}", "model/transformer/weights.safetensors": "old weights",
                       "scores.bin": "old scores", "table.csv": "old table"}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    make_folder(tmp_path / "pictures", 4)
    make_folder(tmp_path / "lessons", 5, "lesson {}")
    for index in range(5):
        picture(tmp_path / "lessons" / "in" / f"{index:02d}.png", 50 + index)
    environment(tmp_path, "hpsv2 1.0")
    hub_cache(tmp_path, monkeypatch)
    return tmp_path


def environment(place: Path, listed: str) -> None:
    """A program that answers as a Python that holds these packages."""
    (place / "python").write_text(f"#!/bin/sh\necho '{listed}'\n")
    (place / "python").chmod(0o755)


def hub_cache(place: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for commit in COMMITS:
        (place / "hub" / "models--owner--model" / "snapshots" / commit).mkdir(parents=True)
    set_revision(place, COMMITS[0])


def set_revision(place: Path, commit: str) -> None:
    (place / "hub" / "models--owner--model" / "refs").mkdir(exist_ok=True)
    (place / "hub" / "models--owner--model" / "refs" / "main").write_text(commit)


def run(place: Path, text: str) -> str:
    """Run a sweep file with jobs that cost nothing; returns what was said."""
    (place / "sweep.yaml").write_text(text.format(place=place))
    (place / "results").mkdir(exist_ok=True)
    screen = StringIO()
    options = Options(results=place / "results", local=True, run_job=fake_sweep.run_job, publish=False)
    assert run_sweep(place / "sweep.yaml", options, Console(file=screen, width=400)) == DONE
    return screen.getvalue()


def write(name: str, text: str):
    return lambda place: (place / name).write_text(text)


def same_size_and_time(place: Path) -> None:
    """Other weights of the same length, with the old time of change."""
    file = place / "model/transformer/weights.safetensors"
    found = file.stat()
    file.write_text("new weights")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


ALL, PLUG, TWO = {"0.3", "0.7"}, {"0.3"}, {"0.9"}
CHANGES = {
    "weights of the model": (write("model/transformer/weights.safetensors", "other weights"), ALL),
    "weights of the same size and time": (same_size_and_time, ALL),
    "scheduler": (write("model/scheduler/scheduler_config.json", '{"shift": 3}'), ALL),
    "tokenizer": (write("model/tokenizer/vocab.json", '{"a": 1}'), ALL),
    "a new file of the model": (write("model/transformer/more.safetensors", "more"), ALL),
    "weights of a metric": (write("scores.bin", "new scores"), ALL),
    "packages of a scorer": (lambda place: environment(place, "hpsv2 1.1"), ALL),
    "an image": (lambda place: picture(place / "pictures/in/00.png", 99), ALL),
    "a caption": (lambda place: (place / "pictures/captions.csv").write_text(
        (place / "pictures/captions.csv").read_text().replace("picture 1", "picture one")), ALL),
    "an image to train on": (lambda place: picture(place / "lessons/in/00.png", 98), ALL),
    "a file of a method": (write("table.csv", "new table"), PLUG),
    "a method": (write("plugs/plug_Method.py", PLUGS["Method"] + "    more = 1\n"), PLUG),
    "a method's helper": (write("plugs/plug_Method_helper.py", "VALUE = 2\n"), PLUG),
    "a metric's helper": (write("plugs/plug_Metric_helper.py", "VALUE = 2\n"), ALL),
    "a backbone's helper": (write("plugs/plug_Backbone_helper.py", "VALUE = 2\n"), ALL),
    "a data set's helper": (write("plugs/plug_Data_helper.py", "VALUE = 2\n"), TWO),
    "revision of a hub model": (lambda place: set_revision(place, COMMITS[1]), TWO),
    "words about the model": (write("model/README.md", "other words"), set()),
    "words in a helper": (write("plugs/plug_Method_helper.py", '"""Says more."""\nVALUE = 1  # yes\n'), set()),
    "nothing": (lambda place: None, set()),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_content_under_the_same_name_runs_again_what_depends_on_it_and_nothing_else(place, changed):
    change, expected = CHANGES[changed]
    for text in (SWEEP, OTHER):
        run(place, text)
    before = fake_sweep.diary(place / "results")
    assert sorted(before) == sorted(f"{job} {ratio}" for job in ("score", "timing") for ratio in ALL | TWO)
    change(place)
    said = "".join(run(place, text) for text in (SWEEP, OTHER))
    again = fake_sweep.diary(place / "results")[len(before):]
    assert sorted(again) == sorted(f"{job} {ratio}" for job in ("score", "timing") for ratio in expected)
    assert ("not used" in said) == bool(expected)


def results_of(place: Path) -> dict[str, dict]:
    folder = place / "results" / "one"
    ids = json.loads((folder / "sweep.json").read_text())["trial_ids"]
    return {trial_id: json.loads((folder / f"{trial_id}.json").read_text()) for trial_id in ids}


def test_two_models_never_meet_in_one_table_and_the_old_ones_results_wait_for_it(place):
    run(place, SWEEP)
    old, file = results_of(place), place / "model/transformer/weights.safetensors"
    for path in sorted((place / "results/one/parts").glob("*.timing.json")):
        path.unlink()
    file.write_text("other weights")
    said = run(place, SWEEP)
    new = results_of(place)
    assert not old.keys() & new.keys() and "2 finished jobs are not used, for the files of backbone are others now" in said
    assert len({result["trial"]["backbone"]["fingerprint"] for result in new.values()}) == 1
    file.write_text("old weights")
    before = len(fake_sweep.diary(place / "results"))
    run(place, SWEEP)
    assert results_of(place).keys() == old.keys()
    assert fake_sweep.diary(place / "results")[before:] == ["timing 0.3", "timing 0.7"], "its own score jobs are known again"


def test_results_from_before_content_was_recorded_are_told_and_left_alone(place):
    run(place, SWEEP)
    for path in sorted((place / "results/one/parts").glob("*.json")):
        part = json.loads(path.read_text())
        part["trial"]["backbone"].pop("fingerprint")
        path.with_name(f"0123456789ab.{path.name.split('.', 1)[1]}").write_text(json.dumps(part))
        path.unlink()
    said = run(place, SWEEP)
    assert "not used, for the files of backbone were not recorded then" in said
    assert len(fake_sweep.diary(place / "results")) == 8


@pytest.mark.parametrize(("kind", "file"), [("backbone", "model/transformer/weights.safetensors"), ("metric", "scores.bin"),
                                            ("method", "table.csv")])
def test_a_job_refuses_files_that_changed_after_the_sweep_was_read(place, kind, file):
    (place / "sweep.yaml").write_text(SWEEP.format(place=place))
    trial = next(one for one in resolve(load(place / "sweep.yaml")).trials if one["method"]["name"] == "plug")
    entry = trial["metrics"][0] if kind == "metric" else trial[kind]
    identity.check_content(kind, entry, kind)
    (place / file).write_text("changed since")
    with pytest.raises(ConfigError, match=f"{kind}: the files of 'plug' have changed: .* run the sweep file again"):
        identity.check_content(kind, entry, kind)


def test_a_job_refuses_code_that_was_edited_after_the_sweep_was_read(place, monkeypatch):
    monkeypatch.setattr("harness.trial.job.run_job", fake_sweep.run_job)
    (place / "sweep.yaml").write_text(OTHER.format(place=place))
    sweep, folder = resolve(load(place / "sweep.yaml")), ResultsFolder(place / "results" / "two")
    folder.begin(sweep)
    score, timing = folder.jobs(sweep)
    assert worker.run(score, folder.path)
    (place / "plugs/plug_Data_helper.py").write_text("VALUE = 2\n")
    assert not worker.run(timing, folder.path)
    assert "edited after the run was started" in folder.part(timing.key)["error"]["message"]


def test_a_model_that_is_nowhere_is_unknown_and_what_it_turned_out_to_be_is_recorded(place):
    (place / "sweep.yaml").write_text(OTHER.format(place=place).replace(HUB, "owner/elsewhere"))
    (trial,) = resolve(load(place / "sweep.yaml")).trials
    assert trial["backbone"]["fingerprint"] == UNKNOWN
    (place / "hub/models--owner--model").rename(place / "hub/models--owner--elsewhere")
    identity.check_content("backbone", trial["backbone"], "backbone")
    assert identity.found_out(trial) == {"backbone_fingerprint": COMMITS[0][:16]}


# ---------------------------------------------------------------------------------------------- what is stored


def test_a_backbones_own_fingerprint_holds_files_that_are_no_tensors():
    pipes = [SimpleNamespace(components={}, scheduler=SimpleNamespace(config={}), content=text) for text in ("a", "b", "a")]
    one, other, same = (loading.fingerprint(pipe, "float32") for pipe in pipes)
    assert one == same != other


class Encoder:
    """A backbone that counts how often it encodes."""

    fingerprint, encoded = "model", 0
    transformer = torch.nn.Linear(1, 1)
    transformer.device = torch.device("cpu")

    def encode_images(self, images):
        type(self).encoded += 1
        return images


def test_latents_are_encoded_again_by_other_code_from_another_model_or_of_other_images(tmp_path, monkeypatch):
    images = EmojiSet(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], ["a", "b"])
    store, encoder, code = Store(tmp_path), Encoder(), ["one"]
    monkeypatch.setattr(train, "code_hash", lambda *parts: code[0])

    def again() -> int:
        before = Encoder.encoded
        train.training_set(encoder, images, store)
        return Encoder.encoded - before

    assert [again(), again()] == [1, 0]
    code[0] = "two"
    assert [again(), again()] == [1, 0]
    encoder.fingerprint = "other model"
    assert [again(), again()] == [1, 0]
    images.images[0] = 1
    assert [again(), again()] == [1, 0]


# ---------------------------------------------------------------------------------------------- reading once


@pytest.fixture
def reads(monkeypatch):
    """The files that are read for their hashes."""
    seen, real = [], fingerprints._sha256
    monkeypatch.setattr(fingerprints, "_sha256", lambda file: seen.append(file.name) or real(file))
    return seen


def test_gigabytes_are_read_once_and_that_is_said(place, reads, monkeypatch):
    monkeypatch.setattr(fingerprints, "LARGE_BYTES", 10)
    assert f"Reading the weights of {place}/model (0.0 GiB) once" in run(place, SWEEP)
    assert reads.count("weights.safetensors") == 1
    assert "Reading the weights" not in run(place, SWEEP) and reads.count("weights.safetensors") == 1
    (place / "model/tokenizer/vocab.json").write_text('{"b": 2}')
    run(place, SWEEP)
    assert reads.count("weights.safetensors") == 1 and reads.count("vocab.json") == 2


@pytest.mark.parametrize("damage", ["", "[]", '{"/x": 3}', '{"/x": [1, 2, 3]}', "[" * 100_000])
def test_a_damaged_cache_costs_time_only(place, reads, damage):
    found = fingerprint([place / "model"])
    for path in (place / "cache").rglob("*.json"):
        path.write_text(damage)
    assert fingerprint([place / "model"]) == found and reads.count("weights.safetensors") == 2


def test_a_fingerprint_is_of_names_and_bytes_and_not_of_the_place(place):
    found = fingerprint([place / "model"])
    (place / "model").rename(place / "moved")
    assert fingerprint([str(place / "moved")]) == found
    (place / "moved/tokenizer/vocab.json").rename(place / "moved/tokenizer/other.json")
    assert fingerprint([place / "moved"]) != found
    assert fingerprint([]) is None and fingerprint(["embedded"]) is None


@pytest.mark.parametrize("word", ["embedded", "~nobody-of-this-name/x/y", "a/" * 4000, "x\0/y", "in memory"])
def test_a_word_that_names_no_file_is_no_content(place, word):
    assert fingerprint([word]) is None
    cls = METRICS.get("plug")
    assert list(cls.sources(cls.Config(weights=None))) == [] and list(cls.sources(cls.Config(weights=word))) == [word]


def test_a_file_that_cannot_be_read_is_named(place, monkeypatch):
    def refused(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(fingerprints, "_sha256", refused)
    with pytest.raises(ConfigError, match=r"scores.bin cannot be read \(Permission denied\).* make it readable"):
        fingerprint([place / "scores.bin"])


# ---------------------------------------------------------------------------------------------- entries of one metric, folders


TWICE = SWEEP.replace("  - {{name: hps, command: {place}/python}}\n", "  - {{name: plug, threshold: 0.7{alias}}}\n")


def test_two_entries_of_one_metric_are_refused_or_named_apart(place):
    (place / "sweep.yaml").write_text(TWICE.format(place=place, alias=""))
    with pytest.raises(ConfigError, match=r"metrics\[1\]: 'fidelity/plug_4' is measured by metrics\[0\] too.* as: other"):
        resolve(load(place / "sweep.yaml"))
    (place / "sweep.yaml").write_text(TWICE.format(place=place, alias=", as: strict"))
    trial = resolve(load(place / "sweep.yaml")).trials[0]
    assert [metric.get("as") for metric in trial["metrics"]] == [None, "strict"]
    (place / "sweep.yaml").write_text(TWICE.format(place=place, alias=", as: a b"))
    with pytest.raises(ConfigError, match=r"metrics\[1\].as: str 'a b' cannot name a metric"):
        resolve(load(place / "sweep.yaml"))


def test_a_results_folder_has_an_id_of_its_own_that_stays(place):
    run(place, SWEEP)
    folder = ResultsFolder(place / "results/one")
    first = folder.identity
    run(place, SWEEP)
    run(place, OTHER)
    assert len(first) == 32 and folder.identity == first != ResultsFolder(place / "results/two").identity
