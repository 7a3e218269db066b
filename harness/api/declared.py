"""What a class of methods may declare, checked when it is registered: a misspelt switch would silently be none."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Mapping
from typing import Any

from harness.api.method import Method, TrainableMethod
from harness.api.registry import ConfigError, did_you_mean, require
from harness.api.sites import SiteKind

ALIKE = 0.8
"""From which likeness on a function is taken for a misspelt hook."""


def check_method(cls: type) -> None:
    """Raise ConfigError where the class declares what `harness.api.method` does not know, or what cannot be."""
    where = f"method '{cls.name}' ({cls.__module__}.{cls.__qualname__})"
    require(issubclass(cls, Method), f"{where}: derive it from harness.api.Method, or from TrainableMethod and nn.Module")
    trained = issubclass(cls, TrainableMethod)
    known = _known(TrainableMethod if trained else Method)
    foreign = {key for base in cls.__mro__ if not issubclass(base, Method) for key in dir(base)}
    for base in cls.__mro__:
        if issubclass(base, Method) and base not in (Method, TrainableMethod):
            for key, value in vars(base).items():
                if not key.startswith("_") and key not in known | foreign:
                    _refuse_unknown(where, key, value, known)
    if trained:
        _check_trained(where, cls)
    _check_values(where, cls)


def _known(contract: type) -> set[str]:
    """Public names of the contract, those that it only annotates among them."""
    annotated = {key for base in contract.__mro__ for key in inspect.get_annotations(base)}
    return {key for key in (*dir(contract), *annotated) if not key.startswith("_")}


def _refuse_unknown(where: str, key: str, value: Any, known: set[str]) -> None:
    require(key not in _known(TrainableMethod), f"{where}: '{key}' is for methods that are trained; derive it from "
            "TrainableMethod and nn.Module, or remove it")
    if callable(value) or isinstance(value, property | classmethod | staticmethod):  # a helper of its own
        close = difflib.get_close_matches(key, known, n=1, cutoff=ALIKE)
        require(not close, f"{where}: nothing calls '{key}'. Did you mean '{close[0] if close else ''}'? A helper of its own "
                "needs a name less like it, or one that begins with an underscore")
        return
    raise ConfigError(f"{where}: the contract knows no '{key}'.{did_you_mean(key, sorted(known))} An attribute of its own begins "
                      "with an underscore, and an option belongs into its Config")


def _check_trained(where: str, cls: type) -> None:
    torch = sys.modules.get("torch")
    order = [base for base in cls.__mro__ if base is TrainableMethod or torch is not None and base is torch.nn.Module]
    require(len(order) == 2 and order[0] is TrainableMethod,
            f"{where}: a trained method is written `class {cls.__name__}(TrainableMethod, nn.Module)`, in this order")
    stages = inspect.getattr_static(cls, "stages", None)
    require(stages is not None, f"{where}: it is trained and has no `stages`; write stages = (Stage(\"joint\", share=1.0),)")


def _check_values(where: str, cls: type[Method]) -> None:
    require(cls.Config is None or dataclasses.is_dataclass(cls.Config), f"{where}: its Config must be a frozen dataclass")
    options = [field.name for field in dataclasses.fields(cls.Config)] if cls.Config is not None else []
    kinds = typing.get_args(SiteKind)
    sites = cls.sites if isinstance(cls.sites, set | frozenset) else ()
    for kind in sites:
        require(kind in kinds, f"{where}: sites: '{kind}' is no kind of site.{did_you_mean(kind, kinds)}")
    named = {"of_depth": cls.of_depth, **{f"presets[{key}]": value for key, value in _presets(cls).items()}}
    for what, keys in {**named, "knob": [cls.knob] if isinstance(cls.knob, str) else []}.items():
        for key in keys:
            remedy = "; write knob = None where there is nothing to turn" if what == "knob" else ""
            require(key in options, f"{where}: {what}: '{key}' is no option of its Config.{did_you_mean(key, options)}{remedy}")


def _presets(cls: type[Method]) -> Mapping[str, Mapping[str, Any]]:
    return cls.presets if isinstance(cls.presets, Mapping) else {}
