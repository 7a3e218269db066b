"""What a method declares is what the harness knows, and what the harness asks of a method is what the contract says."""

import ast
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from toy import Number

from harness.api import METHODS, ConfigError, Method, Registry, Stage, TrainableMethod
from harness.api.declared import check_method
from harness.cost.budget import Solution
from harness.storage.store import Store
from harness.trial.build import _fit

ROOT = Path(__file__).parent.parent


def register(cls: type) -> type:
    """As a plug-in does."""
    return Registry("method", check_method).register("theirs")(cls)


def declaring(base=(Method,), **attributes) -> type:
    """A class with these attributes."""
    @dataclass(frozen=True)
    class Config:
        keep_ratio: float = 0.5
        depth: int | None = None

    return type("Theirs", base, {"Config": Config, **attributes})


TRAINED = (TrainableMethod, torch.nn.Module)
ONE = {"stages": (Stage("joint", share=1.0),), "start_stage": lambda self, stage, generator: []}


@pytest.mark.parametrize(("cls", "said"), [
    (declaring(site=frozenset({"ffn"})), "knows no 'site'. Did you mean 'sites'"),
    (declaring(hook_model=True), "knows no 'hook_model'. Did you mean 'hooks_model'"),
    (declaring(strength=3), "knows no 'strength'.*begins with an underscore, and an option belongs into its Config"),
    (declaring(observed=lambda self, call, prediction: None), "nothing calls 'observed'. Did you mean 'observe'"),
    (declaring(num_step=lambda self, asked: 1), "nothing calls 'num_step'. Did you mean 'num_steps'"),
    (declaring(needs_teacher=False), "'needs_teacher' is for methods that are trained; derive it from TrainableMethod"),
    (declaring(TRAINED, **ONE, need_teacher=False), "knows no 'need_teacher'. Did you mean 'needs_teacher'"),
    (declaring(TRAINED, **ONE, load_fitt=lambda self, fitted: None), "nothing calls 'load_fitt'. Did you mean 'load_fit'"),
    (declaring(TRAINED), "has no `stages`; write stages = "),
    (declaring(TRAINED[::-1], **ONE), r"`class Theirs\(TrainableMethod, nn.Module\)`, in this order"),
    (declaring(TRAINED[:1], **ONE), r"`class Theirs\(TrainableMethod, nn.Module\)`, in this order"),
    (declaring(sites=frozenset({"attention", "fnn"})), "sites: 'fnn' is no kind of site. Did you mean 'ffn'"),
    (declaring(knob="ratio"), "knob: 'ratio' is no option of its Config. Did you mean 'keep_ratio'.*knob = None"),
    (declaring(of_depth=("dept",)), "of_depth: 'dept' is no option of its Config. Did you mean 'depth'"),
    (declaring(presets={"official": {"keep": 1.0}}), r"presets\[official\]: 'keep' is no option of its Config"),
    (type("Theirs", (), {}), "derive it from harness.api.Method"),
])
def test_what_the_contract_does_not_know_is_refused_when_it_is_registered(cls, said):
    with pytest.raises(ConfigError, match=rf"method 'theirs' \(.*Theirs\): .*{said}"):
        register(cls)


def test_the_registry_of_methods_checks_and_keeps_out_what_it_refuses():
    with pytest.raises(ConfigError, match="method 'misspelt'.*knows no 'site'"):
        METHODS.register("misspelt")(declaring(site=frozenset({"ffn"})))
    assert "misspelt" not in METHODS.names()


def test_helpers_and_private_attributes_are_the_methods_own():
    helpers = {"note": lambda self: None, "Inner": type("Inner", (), {}), "_state": 3, "half": property(lambda self: 0.5)}
    register(declaring(**helpers, sites=frozenset({"ffn"}), of_depth=("depth",), presets={"official": {"keep_ratio": 1.0}}))
    register(declaring(TRAINED, **ONE, **helpers, needs_teacher=False))


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_of_ours_passes(name):
    check_method(METHODS.get(name))


def asked() -> dict[str, list[str]]:
    """What harness/ reads of anything called a method -> where. hasattr and getattr are asked too."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "harness").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            of = None
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                of, what = node.value, node.attr
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
                of, what = node.args[0], f"{node.func.id} {ast.unparse(node.args[1])}"
            if of is not None and ast.unparse(of).split(".")[-1] in ("method", "_method"):
                found.setdefault(what, []).append(f"{file.relative_to(ROOT)}:{node.lineno}")
    return found


def test_the_harness_asks_of_a_method_only_what_the_contract_says():
    annotated = {key for base in TrainableMethod.__mro__ for key in inspect.get_annotations(base)}
    known = {*dir(TrainableMethod), *annotated, *dir(torch.nn.Module), "config"}
    assert not {what: places for what, places in asked().items() if what not in known}
    assert {"fit_budget", "load_fit", "num_parameters"} <= set(asked()), "the search finds what it is looking for"


class Fitted(Number):
    """Can be moved to any budget."""

    def fit_budget(self, cut, flops_cut):
        """What was asked."""
        return {"asked": flops_cut, "was": cut()}


@pytest.mark.parametrize(("cls", "fitted", "cut"), [(Number, None, 0.25), (Fitted, {"asked": 0.3, "was": 0.5}, 0.5)])
def test_a_trained_method_fits_its_budget_once_more_or_keeps_what_was_solved(tmp_path, cls, fitted, cut):
    from sites import make_run

    meter = SimpleNamespace(run=make_run(), device="cpu", cut=lambda method: 0.5)
    for _ in range(2):  # the second time from the store
        method = cls()
        found = _fit(method, meter, Solution("keep_ratio", 0.7, 0.3, 0.25), Store(tmp_path), {"of": cls.__name__})
        assert found == {"knob": "keep_ratio", "knob_solved": 0.7, "keep_ratio_solved": 0.7, "flops_cut_asked": 0.3,
                         "flops_cut": cut}
        assert method.fitted == fitted


class Scorer(Method, torch.nn.Module):
    """Parameters that nothing trains: a router that somebody else has trained."""

    name = "scorer"

    def begin(self, run):
        self.router = torch.nn.Linear(run.width, 1)


def test_parameters_that_a_method_adds_are_counted_whether_they_train_or_not():
    backbone = TinySD3.from_pipeline(tiny_pipeline())
    method = Scorer(None)
    assert method.num_parameters == 0 and METHODS.build("random_drop", {}).num_parameters == 0
    method.begin(replace(backbone.run(torch.tensor([500.0]), 1)))
    assert method.num_parameters == 32 + 1


def test_parameters_are_built_once_and_tables_made_for_every_run():
    from sites import make_run

    class Counting(Number):
        def build(self, run):
            self.built = getattr(self, "built", 0) + 1

        def tabulate(self):
            self.tables = (*getattr(self, "tables", ()), (self.run.num_steps, self.fitted))

    method = Counting()
    method.begin(make_run(num_steps=10))
    method.begin(make_run(num_steps=4))
    method.load_fit({"shift": 1.0})
    method.to("meta")
    method.begin(make_run(num_steps=3))  # a counting twin keeps its table
    assert method.built == 1 and method.tables == ((10, None), (4, None), (4, {"shift": 1.0})) and method.run.num_steps == 3
    with pytest.raises(ConfigError, match="number was trained for 4 blocks of width 16, not for 5 of 16"):
        method.begin(make_run(num_blocks=5))
