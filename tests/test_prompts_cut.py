"""What a tokenizer cuts off a prompt is counted, recorded and said: no model has seen it."""

import copy

import pytest
from conftest import TinySD3, tiny_pipeline
from fake_results import make_sweep
from test_trial import make_trial, run
from tiny import tiny_dit

from harness import data
from harness.api import BACKBONES
from harness.backbones.dit import DiT
from harness.backbones.pixart import PixArt
from harness.reporting.protocol import protocol_section
from harness.reporting.rows import load_sweep
from harness.trial import build

ENCODERS = {"sd3": ("tokenizer", "tokenizer_2", "tokenizer_3"), "flux": ("tokenizer", "tokenizer_2"), "pixart": ("tokenizer",)}
ENDS = {"CLIPTokenizer": 2, "T5Tokenizer": 1}
"""Tokens around a prompt: CLIP's begin and end, T5's end. 'heart' is one token of each embedded model."""


@pytest.fixture(scope="module", params=ENCODERS)
def backbone(request):
    return BACKBONES.build(request.param, {"weights": "embedded", "dtype": "float32"})


def test_a_prompt_of_the_last_token_that_fits_is_whole_and_one_more_is_cut(backbone):
    assert set(backbone.text_limits()) == set(ENCODERS[backbone.name]) and set(backbone.text_limits().values()) == {16}
    for name in ENCODERS[backbone.name]:
        fits = 16 - ENDS[type(getattr(backbone.pipe, name)).__name__]
        prompts = [" ".join(["heart"] * count) for count in (1, fits, fits + 1, 3 * fits)]
        assert backbone.cut_prompts(["", *prompts])[name] == {"cut": 2, "of": 5, "tokens": 16}


def test_what_is_counted_as_cut_changes_nothing_and_what_is_whole_does(backbone):
    """Words after the limit are not seen, by any encoder; words before it are."""
    long = " ".join(["red heart on a white background"] * 8)
    assert {found["cut"] for found in backbone.cut_prompts([long, f"{long} and a cat"]).values()} == {2}
    one, other = backbone.encode([long]), backbone.encode([f"{long} and a cat"])
    assert all((one[key] == other[key]).all() for key in one)
    short = backbone.cut_prompts(["red heart", "blue heart"])
    assert {found["cut"] for found in short.values()} == {0}
    assert not all((value == backbone.encode(["blue heart"])[key]).all() for key, value in backbone.encode(["red heart"]).items())


def test_the_length_that_is_asked_for_is_the_limit():
    backbone = PixArt(PixArt.Config(weights="embedded", text_length=5))
    assert backbone.cut_prompts(["A RED heart ", "a red heart on white"]) == {"tokenizer": {"cut": 1, "of": 2, "tokens": 5}}


def test_where_there_is_no_tokenizer_nothing_is_counted():
    assert TinySD3.from_pipeline(tiny_pipeline()).cut_prompts(["a"] * 3) == {}
    assert DiT.from_pipeline(tiny_dit()).cut_prompts(["3"]) == {}
    shapes = BACKBONES.build("sd3", {"weights": "shape_only", "architecture": "sd3.5-medium@3", "device": "meta"})
    assert shapes.cut_prompts(["a"]) == {}


def test_a_trial_records_what_was_cut(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\n" + " ".join(["red heart"] * 12) + "\na cat\n")
    options = data.resolve({"name": "prompts", "path": str(prompts)}, "data", None)
    trial = make_trial({"name": "dense"}, metrics=[{"name": "tokens"}], seeds=[0, 2], data=options)
    trial["backbone"] = {"name": "pixart", "weights": "embedded"}
    trial["sampler"] = {"num_steps": 1, "guidance_scale": 1.0, "batch_size": 3}
    part = run("score", trial, tmp_path)
    assert part["environment"]["prompts_cut"] == {"tokenizer": {"cut": 1, "of": 3, "tokens": 16}}
    build._held.clear()


def test_the_protocol_says_it_once_or_of_which_rows_it_holds(tmp_path):
    folder = tmp_path / "ablation"
    make_sweep(folder, images=4)
    sweep = load_sweep(folder)
    assert "Prompts" not in protocol_section(sweep), "results of before tell nothing"

    def said(*cuts):
        changed = copy.deepcopy(sweep)
        for row, cut in zip(changed.rows, cuts * len(changed.rows), strict=False):
            if row.result:
                row.result["environment"]["score"]["prompts_cut"] = {"tokenizer_2": {"cut": cut, "of": 24, "tokens": 77}}
        return protocol_section(changed)

    assert "- Prompts: no tokenizer cut any of them." in said(0) and "prompts_cut" not in said(0)
    assert "**Prompts were cut** by their length" in said(3) and "has seen: tokenizer_2 3 of 24 beyond 77 tokens." in said(3)
    assert "tokenizer_2 3 of 24 beyond 77 tokens (dense" in said(3, 4)
