"""Counting hears every hook of the contract, and books what it takes as the method's; a new hook is covered as it stands."""

import inspect

import pytest
import torch
from sites import make_run, make_site
from tiny import TinyFlux, tiny_flux
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.api import ConfigError, Method, Reduction, TrainableMethod
from harness.cost.flops import Meter
from harness.cost.metering import MeteredMethod, Tally, metered_plan
from harness.engine.sampler import SamplerConfig
from harness.engine.tokens import Keep, Mixture, PerRow, Skip

TOKENS = torch.empty(2, 64, 16, device="meta")
PARTS = {"linear": nn.Linear(16, 16, device="meta")}
ARGUMENTS = {"hidden_states": TOKENS, "computed": TOKENS, "bypass": TOKENS, "output": TOKENS, "prediction": TOKENS,
             "level": TOKENS, "value": TOKENS, "module": PARTS["linear"], "forward": PARTS["linear"], "args": (TOKENS,),
             "kwargs": {}, "asked": 4, "run": make_run(), "site": make_site(make_run()), "call": make_site(make_run()).call,
             "cut": lambda: 0.5, "flops_cut": 0.5, "fitted": {}, "state": {}, "stage": "joint", "generator": torch.Generator(),
             "progress": 0.5, "validating": False, "index": 0, "transformer": PARTS["linear"], "config": None}
"""What hooks are asked with, by the names of their parameters; a new hook with another parameter is told here."""


def hooks_of(contract: type) -> list[str]:
    """Functions and properties of the contract."""
    return [key for key in dir(contract) if not key.startswith("_") and key != "Config"
            and not isinstance(inspect.getattr_static(contract, key), int | str | tuple | dict | frozenset | None)]


def every_hook(base: type, contract: type, log: list[str]) -> tuple[type, dict[str, int]]:
    """A subclass of `base` whose every hook of `contract` is noted and takes FLOPs of its own; and how many each takes."""
    prices = {name: 2 * (1000 + number) for number, name in enumerate(hooks_of(contract))}

    def note(name: str) -> None:
        log.append(name)
        half = prices[name] // 2
        torch.empty(1, half, device="meta") @ torch.empty(half, 1, device="meta")

    def noted(name: str, was):
        was = (lambda self, hidden_states, site: None) if was is Method.reduce else was  # it has no default

        def hook(self, *args, **kwargs):
            note(name)
            return was.__get__(self, type(self))(*args, **kwargs)

        if isinstance(was, property):
            return property(lambda self: note(name) or was.fget(self))
        return classmethod(lambda cls, *args: note(name) or was.__func__(cls, *args)) if isinstance(was, classmethod) else hook

    body = {name: noted(name, inspect.getattr_static(base, name)) for name in prices}
    made = type("Every", (base, nn.Module) if base is TrainableMethod else (base,), body)
    return made, prices


@pytest.mark.parametrize(("contract", "proxy"), [(Reduction, metered_plan), (Method, MeteredMethod),
                                                 (TrainableMethod, MeteredMethod)], ids=lambda one: one.__name__)
def test_every_hook_arrives_and_is_booked_as_the_methods(contract, proxy):
    log: list[str] = []
    made, prices = every_hook(contract, contract, log)
    assert len(prices) >= 6
    inner = made() if contract is Reduction else made(contract.Config())
    with FlopCounterMode(display=False) as counter:
        tally = Tally(counter)
        metered = proxy(inner, tally)
        for name in prices:
            log.clear()
            before = tally.closed()
            value = getattr(metered, name)
            if not isinstance(inspect.getattr_static(contract, name), property):
                value(*(ARGUMENTS[key] for key in inspect.signature(getattr(contract, name)).parameters if key != "self"))
            assert log[:1] == [name], f"{name} does not arrive"
            linear, attention, own = (after - earlier for after, earlier in zip(tally.closed(), before, strict=True))
            taken = sum(prices[one] for one in log)
            if name == "execute":  # what runs in place of the module is the model's work
                assert (own, attention) == (0, 0) and linear == taken + 2 * 2 * 64 * 16 * 16
            else:
                assert (linear, attention, own) == (0, 0, taken), f"{name} is not booked as the method's"


def test_what_is_no_hook_is_forwarded_and_the_plan_goes_by_its_own_name():
    plan = Keep(torch.arange(32), 64)
    plan.wants_dense, plan.kinds, plan.anything = True, frozenset({"ffn"}), "of its own"
    with FlopCounterMode(display=False) as counter:
        metered = metered_plan(plan, Tally(counter))
        for name in ("num_tokens", "kinds", "wants_dense", "indices", "anything"):
            assert getattr(metered, name) is getattr(plan, name)
        assert isinstance(metered, Keep) and metered.__class__ is Keep
        rows = metered_plan(PerRow([plan, None, Mixture([plan], [torch.ones(())], 64)], 64), Tally(counter))
    assert isinstance(rows, PerRow) and isinstance(rows.plans[2], Mixture) and rows.plans[1] is None
    assert type(rows.plans[0]) is type(rows.plans[2].plans[0]) is type(metered)


# ------------------------------------------------------------------------------------------ in a whole count


@pytest.fixture(scope="module")
def meter() -> Meter:
    """Of a tiny Flux: its rotary tables ask for positions."""
    return Meter(TinyFlux.from_pipeline(tiny_flux(), resolution=32), SamplerConfig(num_steps=2))


def keeping(plan) -> Method:
    """Half of the tokens of every block, by a plan of this class."""
    class Half(Method):
        name = "half"

        def reduce(self, hidden_states, site):
            return plan(torch.arange(32, device=hidden_states.device), 64)

    return Half(None)


NOT_ASKED = {"Reduction": set(), "Method": {"attach", "detach", "num_parameters", "sources"}}
"""Hooks that counting this method has no reason to ask; all others must arrive."""


@pytest.mark.parametrize("uncounted", ["", "the dense pass"])
def test_a_plan_and_a_method_with_every_hook_pay_for_each_of_them(meter, uncounted):
    of_plan: list[str] = []
    of_method: list[str] = []
    plan, plan_prices = every_hook(Keep, Reduction, of_plan)
    plan.wants_dense = True
    made, method_prices = every_hook(type(keeping(plan)), Method, of_method)
    made.uncounted = uncounted
    cost, plain = meter.count(made(None)), meter.count(keeping(Keep))
    assert set(of_plan) == set(plan_prices) - NOT_ASKED["Reduction"]
    assert set(of_method) == set(method_prices) - NOT_ASKED["Method"]
    executed = sum(plan_prices[name] for name in of_plan if name == "execute")
    asked = sum(plan_prices[name] for name in of_plan) - executed + sum(
        method_prices[name] for name in of_method if name not in ("begin", "num_steps"))  # before the counting begins
    skipping = type(keeping(Keep))(None)
    skipping.reduce = lambda hidden_states, site: Skip()
    dense_passes = meter.dense.total - meter.count(skipping).total
    assert cost.transformer == plain.transformer + executed and plain.method == 0
    assert cost.method == asked + (0 if uncounted else dense_passes)


def test_a_plan_that_is_refused_in_a_count_is_called_by_its_name(meter):
    class OnlyFfn(Keep):
        kinds = frozenset({"ffn"})

    with pytest.raises(ConfigError, match="the plan OnlyFfn of method 'half' can be used at ffn sites alone"):
        meter.count(keeping(OnlyFfn))


def test_a_step_that_is_noted_before_the_call_is_a_look_at_the_step(meter):
    class Alternating(Method):
        name = "alternating"

        def before(self, call):
            self._all = call.step == 0

        def reduce(self, hidden_states, site):
            return None if self._all else Keep(torch.arange(32, device=hidden_states.device), 64)

    cost, kept = meter.counted(Alternating(None))
    assert [row[0] for row in kept["ffn"]] == [1.0, 0.5]
    assert 2 * cost.total == meter.dense.total + meter.count(keeping(Keep)).total
