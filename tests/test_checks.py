"""What trials are checked on: sketches of their models, and how little that costs the next time. Refusals: test_refusals."""

import os

import doomed
import pytest

from harness.api import BACKBONES, METHODS, ConfigError, NotHere
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig
from harness.execution import checks
from harness.execution.checks import check
from harness.execution.machine import Machine
from harness.storage.store import Store
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.trial import sketches

HERE = Machine(ray=False)


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Options of `doomed.sweep` -> the resolved sweep."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.cost.reach._counted", {})

    def swept(*args, **options):
        (tmp_path / "s.yaml").write_text(doomed.sweep(*args, **options))
        return resolve(load("s.yaml"))

    return swept


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart"])
def test_a_sketch_counts_as_the_model_does(family):
    config = BACKBONES.config(family, {"weights": "embedded", "dtype": "float32"})
    sketch, real = BACKBONES.get(family).sketch(config), BACKBONES.get(family)(config)
    counts = [Meter(backbone, SamplerConfig(num_steps=3)) for backbone in (sketch, real)]
    assert counts[0].run == counts[1].run and counts[0].dense == counts[1].dense
    assert (sketch.resolution, sketch.latent_shape) == (real.resolution, real.latent_shape)
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    assert counts[0].counted(method) == counts[1].counted(method)


def test_a_sketch_reads_no_weights(tmp_path, monkeypatch):
    folder = doomed.pipeline_folder(tmp_path, "sd3")
    for file in folder.rglob("*.safetensors"):  # their headers, and a hole where the weights would be
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:8 + int.from_bytes(content[:8], "little")])
        os.truncate(file, len(content))
    sketch = BACKBONES.get("sd3").sketch(BACKBONES.config("sd3", {"weights": str(folder)}))
    assert {weight.device.type for weight in sketch.transformer.parameters()} == {"meta"} and sketch.resolution == 64


def test_a_sweep_that_can_be_done_is_let_through(swept):
    assert check(swept("[dense, {name: tomesd, flops_cut: 0.1}, {name: random_drop, keep_ratio: 0.5}]"), HERE) == []


def test_what_was_counted_is_not_counted_again(swept, tmp_path, monkeypatch):
    sweep, store = swept("[{name: tomesd, flops_cut: {grid_search: [0.1, 0.2]}}]"), Store(tmp_path / "store")
    counts, cut = [], Meter.cut
    monkeypatch.setattr(Meter, "cut", lambda meter, method: counts.append(method.name) or cut(meter, method))
    check(sweep, HERE, store)
    assert counts == ["tomesd", "tomesd"], "both ends, once for both budgets"
    monkeypatch.setattr("harness.cost.reach._counted", {})
    check(sweep, HERE, store)
    assert len(counts) == 2 and len(list((tmp_path / "store" / "ends").glob("[0-9a-f]*"))) == 1


def test_there_is_an_end_to_counting_and_what_was_left_is_told(swept, monkeypatch):
    monkeypatch.setattr(checks, "PATIENCE_S", 0.0)
    assert check(swept("[dense, {name: random_drop, flops_cut: 0.99}]"), HERE) == ["random_drop -99%"]
    with pytest.raises(ConfigError, match=r"methods\[0\]: .*rotary"):  # whether it runs at all is found out in any case
        check(swept("[{name: tomesd, flops_cut: 0.1}]", doomed.FLUX), HERE)


def test_a_trial_that_is_over_is_not_checked(swept):
    sweep = swept("[dense, {name: random_drop, keep_ratio: 1.0}]")
    check(sweep, HERE, only=sweep.trial_ids[:1])
    with pytest.raises(ConfigError, match="computes everything"):
        check(sweep, HERE, only=sweep.trial_ids)


@pytest.mark.parametrize("backbone", ["{name: sd3, weights: /elsewhere/sd35}", "{name: sd3, device: 'cuda:7'}"])
def test_what_another_machine_may_have_is_not_refused_for_a_cluster(swept, backbone):
    sweep = swept(backbone=backbone)
    with pytest.raises(NotHere):
        check(sweep, HERE)
    check(sweep, Machine(elsewhere=True))


def test_a_backbone_without_a_sketch_is_left_to_its_job(swept, monkeypatch):
    monkeypatch.setattr(BACKBONES.get("sd3"), "sketch", classmethod(lambda cls, config: None))
    sketches.forget()
    check(swept("[{name: random_drop, flops_cut: 0.99}]"), HERE)
    sketches.forget()


def test_the_remedy_of_a_budget_out_of_reach_is_in_reach(swept):
    """What the message says to ask for is granted; a hundredth more is not."""
    with pytest.raises(ConfigError) as error:
        check(swept("[{name: tomesd, flops_cut: 0.9}]"), HERE)
    most = float(str(error.value).rpartition(" ")[2])
    check(swept(f"[{{name: tomesd, flops_cut: {most}}}]"), HERE)
    with pytest.raises(ConfigError, match="at most"):
        check(swept(f"[{{name: tomesd, flops_cut: {most + 0.02}}}]"), HERE)
