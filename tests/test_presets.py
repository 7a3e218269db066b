"""Named options of methods: what a preset gives, what overrides it, and that every one can be built."""

import pytest
import torch
from conftest import PROMPTS

from harness.api import METHODS, ConfigError
from harness.engine.sampler import SamplerConfig, sample
from harness.sweep.file import load
from harness.sweep.resolve import resolve

HEAD = "name: s\nseeds: 4\nbackbone: sd3\nmetrics: [tokens]\n"
PRESETS = [(name, preset) for name in METHODS.names() for preset in METHODS.get(name).presets]


@pytest.fixture
def read(tmp_path):
    """Lines of the methods list -> the resolved sweep."""

    def read(*lines: str, top: str = ""):
        path = tmp_path / "s.yaml"
        path.write_text(HEAD + top + "methods:\n" + "".join(f"  - {line}\n" for line in lines))
        return resolve(load(path))

    return read


def test_a_preset_gives_options_and_the_trial_stores_them_resolved(read):
    method = read("{name: toma, preset: official}").trials[0]["method"]
    assert (method["keep_ratio"], method["merge_every"], method["exact"], method["tile"]) == (0.5, 3, False, 4)
    assert "preset" not in method
    spelled = "{name: toma, keep_ratio: 0.5, dense_blocks: 5, merge_every: 3, exact: false}"
    assert read("{name: toma, preset: official}").trial_ids == read(spelled).trial_ids


def test_an_option_of_the_entry_overrides_its_preset(read):
    method = read("{name: toma, preset: official, merge_every: 1, keep_ratio: 0.75}").trials[0]["method"]
    assert (method["keep_ratio"], method["merge_every"], method["dense_blocks"]) == (0.75, 1, 5)


@pytest.mark.parametrize("top", ["", "budget: {flops_cut: 0.24}\n"])
def test_a_budget_solves_for_the_knob_whatever_the_preset_says(read, top):
    entry = "{name: sdtm, preset: table1}" if top else "{name: sdtm, preset: table1, flops_cut: 0.24}"
    trial = read(entry, top=top).trials[0]
    assert trial["budget"] == {"flops_cut": 0.24} and "keep_ratio" not in trial["method"] and trial["method"]["delta"] == 0.2
    with pytest.raises(ConfigError, match="contradicts flops_cut"):
        read("{name: sdtm, preset: table1, flops_cut: 0.24, keep_ratio: 0.5}")


def test_presets_may_be_an_axis_and_name_their_rows(read):
    sweep = read("dense", "{name: sdtm, preset: {grid_search: [official, table1]}}", "sdtm",
                 "{name: sdtm, preset: table1, window: 4}", "{name: sdtm, preset: table1, flops_cut: 0.24}")
    assert [entry.label for entry in sweep.entries] == [
        "dense", "sdtm official", "sdtm table1", "sdtm", "sdtm table1 window=4", "sdtm table1 -24%"]


@pytest.mark.parametrize(("entry", "fragments"), [
    ("{name: toma, preset: offical}", ["methods[0].preset", "'toma' has no preset 'offical'", "Did you mean 'official'"]),
    ("{name: random_drop, preset: official}", ["'random_drop' has no preset", "Known: none"]),
    ("{name: toma, preset: 3}", ["methods[0].preset", "expected a name", "int 3"]),
])
def test_an_unknown_preset_is_refused(read, entry, fragments):
    with pytest.raises(ConfigError) as caught:
        read(entry)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name, preset in PRESETS if METHODS.get(name).knob])
def test_every_preset_is_the_dense_model_when_it_computes_everything(tiny_backbone, name, preset):
    cls = METHODS.get(name)
    METHODS.build(name, cls.presets[preset])
    changes = {"blocks": None} if "blocks" in cls.presets[preset] else {}
    changes |= {"dense_blocks": 1} if "dense_blocks" in cls.presets[preset] else {}
    changes |= {"layout": None} if "layout" in cls.presets[preset] else {}  # these name the blocks of deeper models
    config = SamplerConfig(num_steps=2, guidance_scale=4.0, batch_size=2)

    def final(method):
        return next(sample(tiny_backbone, method, config, PROMPTS[:2], [3, 1])).latents

    whole = METHODS.build(name, {**cls.presets[preset], **changes, cls.knob: 1.0})
    assert torch.equal(final(whole), final(METHODS.build("dense", {})))
