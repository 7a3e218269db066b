"""A job goes from a plain trial to a part; what it reports is what was executed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TinyInRegistry, tiny_pipeline
from torch import Tensor

from harness import data
from harness.api import BACKBONES, METHODS, METRICS, ConfigError, Measure, Method, Metric, Traits, Unavailable
from harness.data.emoji import EmojiSet
from harness.engine.tokens import Keep
from harness.reporting.rows import Row, heading, title
from harness.storage import records
from harness.storage.measures import traits
from harness.storage.store import Store
from harness.sweep.search.checks import measured
from harness.trial import build
from harness.trial import job as trial_job
from harness.trial.images import prompts_of
from harness.trial.job import estimate, run_job

METRICS_ASKED = [{"name": "paired"}, {"name": "velocity", "num_images": 3}, {"name": "flops"}, {"name": "tokens"},
                 {"name": "latency", "rounds": 2, "retakes": 0}, {"name": "memory"}]


@pytest.fixture(autouse=True)
def _tiny_is_known(monkeypatch):
    BACKBONES.names(), METHODS.names()
    monkeypatch.setitem(BACKBONES._classes, "tiny", TinyInRegistry)
    yield
    build._held.clear()


def make_trial(method: dict, budget: dict | None = None, metrics: list | None = None, **changes) -> dict:
    trial = {"backbone": {"name": "tiny"}, "sampler": {"num_steps": 3, "guidance_scale": 4.0, "batch_size": 2},
             "data": {"name": "emoji", "split": "reference"}, "seeds": [5, 9], "method": method, "budget": budget, "train": None,
             "metrics": METRICS_ASKED if metrics is None else metrics, "threads": 1}
    return trial | changes


def run(job: str, trial: dict, tmp_path, seen: list | None = None) -> dict:
    part = run_job(job, trial, Store(tmp_path / "store"), lambda *state: (seen if seen is not None else []).append(state),
                   tmp_path / "sweep" / "artifacts" / "0123")
    return json.loads(json.dumps(part, allow_nan=False))


def says_what_its_names_meant(part: dict) -> None:
    """What the measures say of themselves is what results made before are taken to say, by their names."""
    for name, said in part["metrics"].items():
        before, now = (Row("x", "x", "done", {"metrics": {name: one}}) for one in ({"value": said["value"]}, said))
        assert (heading(before, name), title(before, name)) == (heading(now, name), title(now, name))
        old, new = before.traits(name), now.traits(name)
        assert (old.group, old.percent, old.lead, old.window) == (new.group, new.percent, new.lead, new.window), name


def test_two_entries_of_one_metric_stand_side_by_side_where_one_has_another_name(tmp_path):
    twice = [{"name": "velocity", "num_images": 2}, {"name": "velocity", "num_images": 3, "as": "three"}]
    part = run("score", make_trial({"name": "random_drop", "keep_ratio": 0.5}, metrics=twice), tmp_path)
    counts = {name: measure["n"] for name, measure in part["metrics"].items()}
    assert counts == {"dense/velocity_error": 2, "dense/velocity_error-three": 3}
    assert len(part["per_image"]["dense/velocity_error-three"]) == 3 and "dense/velocity_error-three" in part["series"]
    assert measured(make_trial({"name": "dense"}, metrics=twice)) == list(counts)
    with pytest.raises(RuntimeError, match="dense/velocity_error is measured.* by two metrics"):
        run("score", make_trial({"name": "random_drop", "keep_ratio": 0.5}, metrics=[{**one, "as": None} for one in twice]),
            tmp_path)


def test_a_score_job_reports_what_was_executed(tmp_path):
    seen = []
    part = run("score", make_trial({"name": "random_drop", "keep_ratio": 0.5}), tmp_path, seen)
    kept = np.asarray(part["executed"]["kept_attention"])
    assert kept.shape == (3, 4) and (kept[:, 0] == 1).all() and (kept[:, 1:] == 0.5).all()
    assert part["metrics"]["tokens/kept_ffn"]["value"] == pytest.approx(0.625)
    assert part["metrics"]["compute/flops_cut"]["value"] > 0.2
    assert len(part["per_image"]["dense/psnr_db"]) == 5 and len(part["series"]["dense/velocity_error"]) == 3
    assert not any(name.startswith("latency") for name in part["metrics"])
    says_what_its_names_meant(part)
    assert part["artifacts"] == {"images": "artifacts/0123/images.npz", "grid": "artifacts/0123/grid.png"}
    saved = np.load(tmp_path / "sweep" / part["artifacts"]["images"], allow_pickle=False)
    assert saved["images"].shape == (5, 32, 32, 3) and saved["images"].dtype == np.uint8
    assert list(saved["seeds"]) == [5, 6, 7, 8, 9]
    assert list(saved["prompts"]) == prompts_of({"name": "emoji", "split": "reference"}, range(5, 10))
    assert ("sample", 5, 5) in seen and part["environment"]["threads"] == 1 and part["stages"]["sample"] > 0


def test_what_a_plug_in_says_of_its_number_is_in_the_part_also_where_it_cannot_be_had(tmp_path, monkeypatch):
    class Odd(Metric):
        name, group, measures, here = "odd", "fidelity", ("likeness",), True

        def measure(self, subject):
            if not self.here:
                raise Unavailable("no camera")
            yield Measure("likeness", 1.0, "lower", heading="likeness", unit="points", percent=True, lead=4, window=None)
            yield Measure("pace", 2.0, "lower", group="latency")

    METRICS.names()
    monkeypatch.setitem(METRICS._classes, "odd", Odd)
    trial = make_trial({"name": "dense"}, metrics=[{"name": "odd", "as": "b"}])
    part = run("score", trial, tmp_path)
    records.PART({**part, "trial": trial, "code": "x"}, "")
    said = part["metrics"]["likeness-b"]
    assert traits("likeness-b", said) == Traits(group="fidelity", heading="likeness (b)", unit="points", percent=True, lead=4,
                                                window=None)
    assert part["metrics"]["pace-b"]["group"] == "latency"
    monkeypatch.setattr(Odd, "here", False)
    part = run("score", trial, tmp_path)
    assert part["metrics"]["likeness-b"]["unavailable"] == "no camera" and part["metrics"]["likeness-b"]["group"] == "fidelity"


def test_a_timing_job_measures_time_and_memory_only(tmp_path):
    part = run("timing", make_trial({"name": "random_drop", "keep_ratio": 0.5}), tmp_path)
    assert set(part["metrics"]) == {"latency/ratio_to_dense", "latency/ms_per_image", "latency/dense_ms_per_image",
                                    "memory/peak_mib"}
    says_what_its_names_meant(part)
    assert part["artifacts"] == {} and not (tmp_path / "store" / "dense").exists()
    assert isinstance(part["environment"]["latency/ratio_to_dense"]["contaminated"], bool)


def test_the_dense_images_are_sampled_once(tmp_path):
    first, second = [], []
    run("score", make_trial({"name": "dense"}, metrics=[{"name": "tokens"}]), tmp_path, first)
    run("score", make_trial({"name": "random_drop", "keep_ratio": 0.5}, metrics=[{"name": "paired"}]), tmp_path, second)
    assert any(stage == "sample dense" for stage, *_ in first) and not any(stage == "sample dense" for stage, *_ in second)


def test_the_dense_trial_reports_no_likeness_to_itself(tmp_path):
    part = run("score", make_trial({"name": "dense"}), tmp_path)
    assert not any(name.startswith("dense/") for name in part["metrics"])
    assert part["metrics"]["compute/flops_cut"]["value"] == 0
    assert part["metrics"]["compute/method_gflops_per_image"]["value"] == 0
    assert np.asarray(part["executed"]["kept_ffn"]).tolist() == [[1.0] * 4] * 3


def test_a_budget_is_met_as_asked_and_recorded(tmp_path):
    trial = make_trial({"name": "random_drop", "first_block": False}, {"flops_cut": 0.3}, [{"name": "flops"}])
    part = run("score", trial, tmp_path)
    assert part["metrics"]["compute/flops_cut"]["value"] == pytest.approx(0.3, abs=0.01)
    executed = part["executed"]
    assert executed["flops_cut_asked"] == 0.3 and executed["flops_cut"] == part["metrics"]["compute/flops_cut"]["value"]
    assert 0 < executed["keep_ratio_solved"] < 1
    assert np.asarray(executed["kept_ffn"])[:, 1:].mean() == pytest.approx(executed["keep_ratio_solved"], abs=1 / 64)


def test_a_method_that_changes_nothing_fails(tmp_path):
    with pytest.raises(RuntimeError, match="'random_drop' changed nothing"):
        run("score", make_trial({"name": "random_drop", "keep_ratio": 1.0}), tmp_path)


class Fickle(Method):
    """Promises half of the tokens on shapes, and keeps more of them once it sees values."""

    name = "fickle"

    def reduce(self, hidden_states: Tensor, site) -> Keep:
        num = 32 if hidden_states.device.type == "meta" else 40
        return Keep(site.rand(64).topk(num, dim=1).indices, 64)


def test_tokens_that_were_not_counted_fail_the_trial(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS._classes, "fickle", Fickle)
    with pytest.raises(RuntimeError, match="computed other tokens than were counted.*0.125"):
        run("score", make_trial({"name": "fickle"}, metrics=[{"name": "flops"}]), tmp_path)


def test_flops_counted_on_other_shapes_than_the_real_ones_fail_the_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyInRegistry, "__new__", lambda cls, config=None: cls.from_pipeline(tiny_pipeline(), text_length=9)
                        if config is not None else object.__new__(cls))
    with pytest.raises(RuntimeError, match=r"encoder_hidden_states of shape \(2, 9, 24\), but the model runs with \(2, 6, 24\)"):
        run("score", make_trial({"name": "random_drop", "keep_ratio": 0.5}, metrics=[]), tmp_path)


@pytest.fixture
def few_training_images(monkeypatch):
    original = data.load

    def load(name: str, split: str):
        images = original(name, split)
        small = images.images[:8, ::2, ::2].copy()  # as large as the tiny backbone's pictures
        return images if split == "reference" else EmojiSet(small, images.captions[:8], images.ids[:8])

    monkeypatch.setattr(data, "load", load)


TRAINING = {"steps": 8, "batch_size": 2, "warmup_steps": 1, "adapter_rank": 2, "distill_every": 2}


def test_a_trained_method_meets_its_budget_and_leaves_dense_alone(tmp_path, few_training_images):
    trial = make_trial({"name": "shiva"}, {"flops_cut": 0.25}, train=TRAINING)
    seen: list = []
    part = run("score", trial, tmp_path, seen)
    assert part["metrics"]["compute/flops_cut"]["value"] == pytest.approx(0.25, abs=0.01)
    assert part["metrics"]["compute/method_gflops_per_image"]["value"] > 0
    assert part["executed"]["flops_cut"] == pytest.approx(part["metrics"]["compute/flops_cut"]["value"])
    assert any(stage.startswith("train") for stage, *_ in seen) and "train/diffusion" in part["series"]
    timed: list = []
    part = run("timing", trial, tmp_path, timed)
    assert not any(stage.startswith("train ") for stage, *_ in timed)  # loaded, not repeated
    dense = run("score", make_trial({"name": "dense"}, metrics=[]), tmp_path)
    again = run("score", make_trial({"name": "dense"}, metrics=[]), tmp_path / "elsewhere")
    images = [np.load(folder / "sweep/artifacts/0123/images.npz")["images"] for folder in (tmp_path, tmp_path / "elsewhere")]
    assert np.array_equal(*images) and dense["executed"] == again["executed"]


def test_a_method_with_parameters_needs_a_training_section(tmp_path):
    with pytest.raises(ConfigError, match="train: method 'shiva' has parameters and must be trained"):
        run("score", make_trial({"name": "shiva"}), tmp_path)


def test_a_bad_metric_is_found_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_job, "subject_of", lambda trial: pytest.fail("the backbone was built"))
    with pytest.raises(ConfigError, match="metrics\\[0\\].*num_imags"):
        run("score", make_trial({"name": "dense"}, metrics=[{"name": "velocity", "num_imags": 3}]), tmp_path)
    with pytest.raises(ConfigError, match="unknown metric 'isc'"):
        run("score", make_trial({"name": "dense"}, metrics=[{"name": "isc"}]), tmp_path)


def test_a_prompt_depends_on_its_seed_alone():
    options = {"name": "emoji", "split": "reference"}
    many = prompts_of(options, range(0, 60))
    assert prompts_of(options, [17]) == [many[17]] and prompts_of(options, range(17, 20)) == many[17:20]
    assert len(set(many)) == 60 and len({text.split(" on ")[0] for text in many}) > 40


def test_images_of_a_trial_do_not_depend_on_which_others_it_has(tmp_path):
    few = make_trial({"name": "random_drop", "keep_ratio": 0.5}, metrics=[], seeds=[7, 8])
    many = make_trial({"name": "random_drop", "keep_ratio": 0.5}, metrics=[], seeds=[5, 9])
    run("score", few, tmp_path / "few")
    run("score", many, tmp_path / "many")
    images = {name: np.load(tmp_path / name / "sweep/artifacts/0123/images.npz")["images"] for name in ("few", "many")}
    assert np.abs(images["few"].astype(int) - images["many"][2:4].astype(int)).max() <= 1


def test_an_estimate_counts_all_images():
    one = estimate(make_trial({"name": "random_drop", "keep_ratio": 0.5}, seeds=[0, 0]))
    ten = estimate(make_trial({"name": "random_drop", "keep_ratio": 0.5}, seeds=[0, 9]))
    dense = estimate(make_trial({"name": "dense"}, seeds=[0, 9]))
    assert ten["gflops_sampling"] == pytest.approx(10 * one["gflops_sampling"])
    assert ten["gflops_sampling"] < dense["gflops_sampling"] == pytest.approx(10 * dense["dense_gflops_per_image"])


def test_the_shapes_of_a_fixed_schedule_are_known_before_it_runs():
    fixed = make_trial({"name": "random_drop", "keep_ratio": 0.5})
    assert estimate(fixed)["token_counts"] == [32, 64]  # the first block computes all 64
    asked = make_trial({"name": "random_drop"}, {"flops_cut": 0.2})
    (kept, whole) = estimate(asked)["token_counts"]
    assert whole == 64 and 32 < kept < 60
    assert estimate(make_trial({"name": "first_block_cache"}))["token_counts"] is None, "the images decide"


def test_every_metric_of_the_catalogue_says_which_job_it_is_for():
    assert {METRICS.get(name).job for name in METRICS.names()} == {"score", "timing"}
