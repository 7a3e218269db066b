"""Options are checked before torch is imported, and the early check never says other than the true one."""

import dataclasses
import typing

import pytest

import harness.backbones as backbones
import harness.metrics as metrics
import methods
from harness.api import BACKBONES, METHODS, METRICS, ConfigError, build_config
from harness.api.registry import Registry
from harness.engine.sampler import SamplerConfig
from harness.sweep.early import refuse
from harness.sweep.file import load
from harness.sweep.outline import Outlines, options_of, outline
from harness.sweep.resolve import resolve

assert backbones and metrics and methods
GROUPS = {"METHODS": METHODS, "BACKBONES": BACKBONES, "METRICS": METRICS}
CASES = [(group, name) for group, registry in GROUPS.items() for name in registry.names()]
FACTS = ("knob", "trainable", "dynamic", "needs_adapters", "presets", "needs_weights", "needs_reference", "name")
VALUES = (None, True, 0, 1, -1, 2, 99, 0.5, 1.5, -2.5, 1e9, "x", "", [], [1], [0.9, 0.5], [2, 1, 0], {}, {"a": 1})


def outlined(group: str, name: str) -> type:
    """The outline, also where the real class is registered."""
    return Outlines(group, Registry(GROUPS[group].kind)).get(name)


def told(check, *given) -> str | None:
    """The refusal of `check`; None without one. 'cannot tell' where it needs what was left out."""
    try:
        check(*given)
    except ConfigError as error:
        return str(error)
    except Exception:
        return "cannot tell"
    return None


@pytest.mark.parametrize("group", GROUPS)
def test_the_outlines_are_those_of_the_registered_classes(group):
    assert Outlines(group, Registry(GROUPS[group].kind)).names() == GROUPS[group].names()


@pytest.mark.parametrize("group,name", CASES)
def test_an_outline_has_the_options_and_the_facts_of_its_class(group, name):
    early, true = outlined(group, name), GROUPS[group].get(name)
    assert early is not true and early.__module__.startswith("_outline.")
    for fact in FACTS:
        assert getattr(early, fact, None) == getattr(true, fact, None), fact
    for one, other in zip(dataclasses.fields(early.Config), dataclasses.fields(true.Config), strict=True):
        assert (one.name, one.default, one.init) == (other.name, other.default, other.init)
    assert typing.get_type_hints(early.Config) == typing.get_type_hints(true.Config)


@pytest.mark.parametrize("group,name", CASES)
def test_what_is_refused_early_is_refused_in_truth_in_the_same_words(group, name):
    early, true = outlined(group, name).Config, GROUPS[group].get(name).Config
    keys, silent = [field.name for field in dataclasses.fields(true)], 0
    for key in [*keys, "no_such_option"]:
        for value in VALUES:
            said, meant = (told(build_config, cls, {key: value}, "w") for cls in (early, true))
            assert said in (meant, "cannot tell"), f"{key}: {value!r}"
            silent += said != meant
    assert group != "METHODS" or not silent, "the options of methods need nothing that is left out"


def test_the_sampler_is_outlined_too():
    early = options_of("harness.engine.sampler", "SamplerConfig")
    fields = [[(field.name, field.default) for field in dataclasses.fields(cls)] for cls in (early, SamplerConfig)]
    assert fields[0] == fields[1]
    for key in (field.name for field in dataclasses.fields(early)):
        for value in VALUES:
            said, meant = (told(build_config, cls, {key: value}, "w") for cls in (early, SamplerConfig))
            assert said == meant


def test_what_cannot_be_kept_is_left_out(tmp_path, monkeypatch):
    """A Config that needs torch has no outline; its neighbours have."""
    import harness.sweep.outline as module

    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "some.py").write_text(
        "import torch\nfrom dataclasses import dataclass\nDTYPE = torch.float32\nWORD = 'a'\n"
        "class A:\n    @dataclass\n    class Config:\n        dtype: object = DTYPE\n"
        "class B(torch.nn.Module):\n    knob = 'k'\n    @dataclass\n    class Config:\n        word: str = WORD\n"
        "    def forward(self): return torch.zeros(1)\n")
    made = outline("some")
    assert made.A.Config is None and made.B.Config().word == "a" and made.B.knob == "k" and made.B.__bases__ == (object,)
    assert not hasattr(made, "torch") and not hasattr(made, "DTYPE") and not hasattr(made.B, "forward")


BASE = "name: s\nseeds: 4\nbackbone: {name: sd3}\nsampler: {num_steps: 2}\nmetrics: [flops]\nmethods: [dense, tomesd]\n"
MISTAKES = {
    "method": ("tomesd", "tomes"), "option": ("tomesd", "{name: tomesd, keep_raito: 1}"),
    "range": ("tomesd", "{name: tomesd, keep_ratio: 1.5}"), "type": ("tomesd", "{name: tomesd, ffn: 1}"),
    "preset": ("tomesd", "{name: tomesd, preset: mine}"), "reserved": ("tomesd", "{name: tomesd, flops_cutt: 0.1}"),
    "budget and knob": ("tomesd", "{name: tomesd, keep_ratio: 0.5, flops_cut: 0.1}"),
    "budget of dense": ("dense", "{name: dense, flops_cut: 0.1}"), "train": ("tomesd", "{name: tomesd, train: {steps: 1}}"),
    "train option": ("[dense, tomesd]", "[{name: shiva, train: {step: 1}}]"), "backbone": ("sd3", "sd4"),
    "backbone option": ("sd3", "sd3, dtype: float8"), "sampler": ("num_steps", "steps"), "metric": ("flops", "flop"),
    "metric option": ("flops", "{name: latency, rounds: 1}"), "data": ("metrics", "data: {name: emojy}\nmetrics"),
    "data option": ("metrics", "data: {split: test}\nmetrics"),
    "space": ("methods", "search: {algorithm: grid, space: {method.name: tomesd, method.stride: {choice: [2, 1]}}}\nmethods")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_early_as_it_would_be_told_late(mistake, tmp_path):
    old, new = MISTAKES[mistake]
    (tmp_path / "s.yaml").write_text(BASE.replace(old, new, 1))
    sweep = load(tmp_path / "s.yaml")
    early, late = told(refuse, sweep), told(resolve, sweep)
    assert early is not None and early == late
