"""Random weights of published sizes: the numbers that depend on shapes alone, and nothing that judges images."""

import io
import json

import pytest
import torch
from rich.console import Console

from harness.api import BACKBONES, ConfigError
from harness.backbones.shapes import ARCHITECTURES, find
from harness.execution.driver import Options, resolved, run_sweep
from harness.sweep.shape_only import Shapes

SWEEPS = ("table1_sd3m", "table1_sd35", "table5_flux", "table5_pixart")


@pytest.mark.parametrize("name", SWEEPS)
def test_the_papers_sweeps_have_a_shape_only_twin(name):
    said = Console(file=io.StringIO(), width=500)
    sweep = resolved(f"sweeps/{name}.yaml", Shapes(resolution=128, steps=4, blocks=6), said)
    assert sweep.name == f"{name}_shape_only"
    for trial in sweep.trials:
        backbone = trial["backbone"]
        assert backbone["weights"] == "shape_only" and backbone["architecture"].endswith("@6") and backbone["resolution"] == 128
        assert trial["train"] is None and trial["seeds"] == [0, 0] and trial["sampler"]["num_steps"] == 4
        assert {metric["name"] for metric in trial["metrics"]} == {"flops", "tokens", "latency", "memory"}
    assert all(word in said.file.getvalue() for word in ("finetuned", "fid", "image_reward", "clip_score", "cuda"))


def test_a_hub_id_finds_its_architecture():
    assert resolved("sweeps/table1_sd35.yaml", Shapes()).trials[0]["backbone"]["architecture"] == "sd3.5-medium"
    assert resolved("sweeps/table1_sd3m.yaml", Shapes()).trials[0]["backbone"]["architecture"] == "sd3-medium"
    assert resolved("sweeps/table5_flux.yaml", Shapes()).trials[0]["backbone"]["architecture"] == "flux-dev"


@pytest.mark.parametrize("blocks", [None, 4])
def test_options_that_tell_blocks_by_number_go_where_there_are_fewer(blocks):
    said = Console(file=io.StringIO(), width=500)
    sweep = resolved("sweeps/table1_sd35.yaml", Shapes(blocks=blocks), said)
    rows = {trial["method"]["name"]: trial["method"] for trial in sweep.trials}
    assert (rows["ibtm"]["blocks"] is None) == (rows["sparsedit"]["layout"] is None) == (blocks is not None)
    assert rows["ibtm"]["keep_ratio"] == 0.75 and rows["sparsedit"]["keep_ratio"] == 0.25, "the rest of the preset stays"
    assert ("ibtm.blocks, which is of the whole model's blocks" in said.file.getvalue()) == (blocks is not None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fewer_blocks_are_a_smaller_model_of_the_same_kind(name):
    kind, config = find(f"{name}@6").transformer
    with torch.device("meta"):
        model = kind(**config)
    whole = ARCHITECTURES[name].transformer[1]
    assert sum(len(blocks) for key, blocks in model.named_children() if key.endswith("transformer_blocks")) == 6
    assert {key: value for key, value in config.items() if "layers" not in key} == {
        key: value for key, value in whole.items() if "layers" not in key}


@pytest.mark.parametrize("wrong", ["flux-dev@", "flux-dev@2", "flux-dev@x", "flux-dav@6"])
def test_what_is_no_architecture_is_refused(wrong):
    with pytest.raises(ConfigError, match="backbone.architecture"):
        BACKBONES.build("flux", {"weights": "shape_only", "architecture": wrong, "resolution": 64})


def test_a_metric_that_judges_images_is_refused_in_a_file_that_says_shape_only(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("name: x\nseeds: 0-1\nbackbone: {name: pixart, weights: shape_only, architecture: pixart-sigma}\n"
                    "metrics: [fd]\nmethods: [{name: dense}]\n")
    with pytest.raises(ConfigError, match="'fd' judges what a model learned.*Valid there"):
        resolved(file)


def test_a_small_one_runs_end_to_end_and_a_trained_method_runs_untrained(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("name: x\nseeds: 0-4999\n"
                    "backbone: {name: pixart, weights: PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, device: cuda}\n"
                    "sampler: {guidance_scale: 4.5}\nmetrics: [fid, flops, tokens]\n"
                    "methods: [{name: dense}, {name: finetuned}, {name: shiva, flops_cut: 0.05}, "
                    "{name: random_drop, flops_cut: 0.05}]\n")
    options = Options(results=tmp_path / "results", local=True, publish=False, shapes=Shapes(resolution=64, steps=2, blocks=3))
    assert run_sweep(file, options, Console(file=io.StringIO())) == 0
    rows = [json.loads(path.read_text()) for path in sorted((tmp_path / "results" / "x_shape_only").glob("*.json"))
            if len(path.stem) == 12]
    cuts = {row["trial"]["method"]["name"]: row["executed"].get("flops_cut") for row in rows}
    assert set(cuts) == {"dense", "shiva", "random_drop"}
    assert cuts["shiva"] == pytest.approx(0.05, abs=0.01) and cuts["random_drop"] == pytest.approx(0.05, abs=0.01)
