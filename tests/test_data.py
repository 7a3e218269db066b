"""Which pairs of a data set are trained on and which are compared with, what may not leak, and how a reference is named."""

import dataclasses
import shutil
from types import SimpleNamespace

import fake_sweep
import numpy as np
import pytest
import torch
from fake_data import make_folder, options_of, own_cache, pairs_of, picture, write_csv  # noqa: F401  (own_cache: a fixture)
from fake_results import make_sweep, write_result

from harness import data
from harness.api import METRICS, ConfigError
from harness.data import hashes
from harness.data.emoji import load_emoji
from harness.data.images import ImageFile
from harness.metrics.extractors.base import Extractor
from harness.metrics.fidelity import reference as reference_module
from harness.metrics.fidelity.feature_sets import features_of
from harness.metrics.fidelity.reference import load_reference
from harness.reporting import paired, tables
from harness.reporting.report import write_report
from harness.reporting.rows import load_sweep
from harness.storage.store import Store
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.trial.images import calibration_prompts, prompts_of

# ---------------------------------------------------------------------------------------------- splits and fingerprints


def test_the_embedded_data_set_is_what_it_was():
    assert data.resolve({}, "data", 512) == {"name": "emoji", "split": "reference", "fingerprint": "a24b65bfd70f3bb2"}
    assert data.load("emoji", "reference").fingerprint == load_emoji("reference").fingerprint
    assert data.describe({"name": "emoji", "split": "reference"}, "reference") == "emoji-reference"


def test_every_pair_is_in_one_split_whatever_it_is_called_and_whoever_is_beside_it(tmp_path):
    options = options_of("folder", make_folder(tmp_path / "a"), reference_share=0.4)
    train, reference = pairs_of(options, "train"), pairs_of(options, "reference")
    assert train and reference and not train.keys() & reference.keys() and len(train) + len(reference) == 24
    (tmp_path / "b").mkdir()
    rows = []
    for index in range(0, 24, 2):  # other names, half of them
        shutil.copy(tmp_path / "a" / "in" / f"{index:02d}.png", tmp_path / "b" / f"z{99 - index}.png")
        rows.append((f"z{99 - index}.png", f"picture {index}"))
    write_csv(tmp_path / "b" / "captions.csv", rows)
    again = options_of("folder", tmp_path / "b", reference_share=0.4)
    assert set(pairs_of(again, "train").values()) == {text for text in train.values() if int(text.split()[1]) % 2 == 0}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_nothing_leaves_no_pair(tmp_path, share):
    options = options_of("folder", make_folder(tmp_path, 5), reference_share=share)
    empty = "reference" if share == 0 else "train"
    with pytest.raises(ConfigError, match=f"no '{empty}' pair at reference_share {share}"):
        data.load(options, empty)
    assert len(data.load(options, "train" if share == 0 else "reference")) == 5


def test_the_fingerprint_follows_captions_and_bytes_and_not_the_place(tmp_path):
    one, same = options_of("folder", make_folder(tmp_path / "a", 4)), options_of("folder", make_folder(tmp_path / "b", 4))
    assert one["fingerprint"] == same["fingerprint"] and len(one["fingerprint"]) == 16
    write_csv(tmp_path / "a" / "captions.csv", [(f"in/{i:02d}.png", f"picture {i}!") for i in range(4)])
    picture(tmp_path / "b" / "in" / "00.png", seed=77)
    data.forget()
    others = {options_of("folder", tmp_path / name, reference_share=1.0)["fingerprint"] for name in "ab"}
    assert len(others | {one["fingerprint"]}) == 3


def test_a_split_has_another_fingerprint_at_another_resolution(tmp_path):
    make_folder(tmp_path, 3)
    small, large = (data.load(options_of("folder", tmp_path, resolution=side), "reference") for side in (16, 32))
    assert small.fingerprint != large.fingerprint and small.captions == large.captions


def test_files_that_changed_after_the_sweep_was_read_are_refused(tmp_path):
    options = options_of("folder", make_folder(tmp_path, 3))
    picture(tmp_path / "in" / "01.png", seed=50)
    data.forget()  # as in a worker, which is another process
    with pytest.raises(ConfigError, match=f"have changed.*{options['fingerprint']}"):
        data.load(options, "reference")


def test_known_files_are_not_read_again(tmp_path, monkeypatch):
    options = options_of("folder", make_folder(tmp_path, 3))
    data.forget()
    monkeypatch.setattr(ImageFile, "read", lambda image: pytest.fail("read again"))
    assert options_of("folder", tmp_path) == options


def test_a_broken_cache_of_hashes_costs_time_only(tmp_path):
    options = options_of("folder", make_folder(tmp_path / "a", 3))
    for file in hashes.cache_folder().iterdir():
        file.write_text("{")
    data.forget()
    assert options_of("folder", tmp_path / "a") == options


def test_a_limit_takes_the_same_pairs_whatever_the_order(tmp_path):
    make_folder(tmp_path, 12)
    few, more = (pairs_of(options_of("folder", tmp_path, limit=n), "reference") for n in (4, 7))
    assert len(few) == 4 and len(more) == 7 and few.items() <= more.items()


# ---------------------------------------------------------------------------------------------- leaks


@pytest.mark.parametrize("kind", ["image", "caption"])
def test_what_two_splits_share_is_refused_with_count_and_example_or_dropped_on_demand(tmp_path, kind):
    make_folder(tmp_path, 24, "picture {}" if kind == "image" else "Picture")
    if kind == "image":
        for index in range(24):
            (tmp_path / "in" / f"{index:02d}.png").write_bytes((tmp_path / "in" / "00.png").read_bytes())
    words = {"image": "is the same image as 'in/", "caption": "has the caption of 'in/"}[kind]
    with pytest.raises(ConfigError, match=rf"data: \d+ training pairs leak .*'in/\d\d.png' {words}.*leaks: drop"):
        options_of("folder", tmp_path, reference_share=0.5)
    options = options_of("folder", tmp_path, reference_share=0.5, leaks="drop")
    with pytest.raises(ConfigError, match="no 'train' pair"):
        data.load_training(options)


def test_another_data_set_to_train_on_must_not_overlap_with_the_reference(tmp_path):
    make_folder(tmp_path / "a", 6)
    make_folder(tmp_path / "b", 8, "other {}")
    train = {"name": "folder", "path": str(tmp_path / "b")}
    with pytest.raises(ConfigError, match="data: 6 training pairs leak.*'in/00.png' is the same image as 'in/00.png'"):
        options_of("folder", tmp_path / "a", train=train)
    options = options_of("folder", tmp_path / "a", train={**train, "leaks": "drop"})
    assert data.load_training(options).captions == ["other 6", "other 7"]
    assert options["train"]["resolution"] == 16


def test_training_captions_must_not_be_the_prompts_of_evaluation(tmp_path):
    make_folder(tmp_path / "a", 4)
    (tmp_path / "p.txt").write_text("a dog\nPICTURE 2\n")
    with pytest.raises(ConfigError, match="1 training pairs leak.*'in/02.png' has the caption of '000001'"):
        options_of("prompts", tmp_path / "p.txt", train={"name": "folder", "path": str(tmp_path / "a"), "resolution": 16})


def test_nothing_is_calibrated_on_the_prompts_of_the_trial(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n")
    assert calibration_prompts(options_of("prompts", tmp_path / "p.txt"), [1, 2]) == ["", ""]
    options = options_of("folder", make_folder(tmp_path / "a", 24), reference_share=0.5)
    assert set(calibration_prompts(options, range(9))) <= set(pairs_of(options, "train").values())
    emoji = {"name": "emoji", "split": "reference"}
    assert calibration_prompts(emoji, range(3)) == prompts_of({"name": "emoji", "split": "train"}, range(3))


# ---------------------------------------------------------------------------------------------- what a sweep may ask


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Lines of a sweep file about data -> the resolved sweep."""
    fake_sweep.install(monkeypatch)
    monkeypatch.setattr(fake_sweep.Probe, "needs_reference", False, raising=False)

    def read(text, method="dense"):
        path = tmp_path / "s.yaml"
        path.write_text(f"name: s\nseeds: 4\nbackbone: sd3\nmetrics: [probe]\ndata: {text}\nmethods: [{method}]\n")
        return resolve(load(path))

    return read


def test_a_metric_of_real_images_is_refused_where_there_are_prompts_alone(tmp_path, read, monkeypatch):
    (tmp_path / "p.txt").write_text("a dog\n")
    assert read(f"{{name: prompts, path: {tmp_path}/p.txt}}").trials[0]["data"]["name"] == "prompts"
    monkeypatch.setattr(fake_sweep.Probe, "needs_reference", True)
    with pytest.raises(ConfigError, match="metrics: probe compares with real images.*'prompts' is prompts alone; remove it"):
        read(f"{{name: prompts, path: {tmp_path}/p.txt}}")
    with pytest.raises(ConfigError, match="prompts without images"):
        load_reference(options_of("prompts", tmp_path / "p.txt"), "reference", Store(tmp_path / "store"), lambda *state: None)


def test_what_is_trained_is_not_judged_by_its_training_images_and_needs_some(tmp_path, read):
    folder = make_folder(tmp_path / "a")
    with pytest.raises(ConfigError, match="data.split: 'learner' is trained on the 'train' pairs"):
        read(f"{{name: folder, path: {folder}, resolution: 16, reference_share: 0.5, split: train}}", "learner")
    with pytest.raises(ConfigError, match="data: 'learner' must be trained, and 'folder' has no pair.*reference_share below 1"):
        read(f"{{name: folder, path: {folder}, resolution: 16}}", "learner")
    assert read(f"{{name: folder, path: {folder}, resolution: 16, reference_share: 0.5}}", "learner").trials


def test_other_files_make_another_trial(tmp_path, read):
    text = f"{{name: folder, path: {make_folder(tmp_path / 'a', 4)}, resolution: 16}}"
    before = read(text)
    assert read(text).trial_ids == before.trial_ids
    picture(tmp_path / "a" / "in" / "02.png", seed=60)
    after = read(text)
    assert after.trial_ids != before.trial_ids
    assert after.trials[0]["data"]["fingerprint"] != before.trials[0]["data"]["fingerprint"]


# ---------------------------------------------------------------------------------------------- references


def test_a_reference_id_tells_data_preprocessing_and_extractor(tmp_path, monkeypatch):
    make_folder(tmp_path / "a", 3)
    monkeypatch.setattr(reference_module, "features_of", lambda images, progress: SimpleFeatures(images[:]))
    store = Store(tmp_path / "store")

    def id_of(**changes):
        data.forget()
        return load_reference(options_of("folder", tmp_path / "a", **changes), "reference", store, lambda *state: None).id

    first = id_of()
    assert first.startswith("folder-reference-square16-") and first == id_of(leaks="drop")
    other = [id_of(resolution=32)]
    picture(tmp_path / "a" / "in" / "00.png", seed=9)
    other.append(id_of())
    monkeypatch.setattr(reference_module, "extractor_id", lambda: "0" * 12)
    other.append(id_of())
    assert len({first, *other}) == 4


@dataclasses.dataclass
class SimpleFeatures:
    """Stands for the extractor's tensor."""

    images: np.ndarray

    def numpy(self):
        return self.images.reshape(len(self.images), -1)[:, :4].astype(np.float32)


def test_every_distance_reads_the_real_images_of_the_trials_own_data(tmp_path):
    options = options_of("folder", make_folder(tmp_path / "a"), reference_share=0.4)
    subject = SimpleNamespace(trial={"data": options}, store=Store(tmp_path / "store"), progress=lambda *state: None,
                              images=np.zeros((3, 16, 16, 3), np.uint8), dense_images=None)
    stub = Extractor("stub", "0" * 12, lambda image: torch.from_numpy(image.copy()).float(), lambda batch: batch.flatten(1),
                     torch.device("cpu"))
    found, real = features_of(subject, stub), data.load(options, "reference")
    assert np.array_equal(found.reference, np.stack([image.reshape(-1) for image in real.images[:]]))
    assert found.reference_id == f"folder-reference-square16-{real.fingerprint[:8]}-stub-00000000"
    assert all(METRICS.get(name).needs_reference for name in ("fd", "fid", "kid", "precision_recall", "fd_dinov2"))


def test_rows_of_different_references_are_never_ranked_together_and_the_report_says_so(tmp_path):
    results = make_sweep(tmp_path / "s", images=24, artifacts=False)
    name, others = "fidelity/fd_effnet_24", [r for r in results if r["trial"]["method"]["name"] in ("dense", "tomesd")]
    assert "real images differ" not in write_report(tmp_path / "s").read_text(encoding="utf-8")
    for result in others:
        result["environment"]["score"][name]["reference_id"] = "folder-reference-square64-cafe"
        write_result(tmp_path / "s", result)
    sweep = load_sweep(tmp_path / "s")
    columns = [rows for column, _, rows in tables.quality_columns(sweep) if column == name]
    apart = [{row.notes(name)["reference_id"] for row in rows} for rows in columns]
    assert sorted(map(sorted, apart)) == [["emoji-ref-5c1e"], ["folder-reference-square64-cafe"]]
    drop, tome = (next(row for row in sweep.rows if row.method == method) for method in ("random_drop", "tomesd"))
    assert paired.clear_best([drop, tome], name) is None and paired.compare_any(tome, drop, name).refused
    text = write_report(tmp_path / "s").read_text(encoding="utf-8")
    assert f"differ between rows**: {name} against `emoji-ref-5c1e` and `folder-reference-square64-cafe`. Each has" in text
