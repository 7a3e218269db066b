"""Names of trials for people: in which options the trials of a sweep differ, and a short label for each."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

from harness.api import METHODS, Method, Trial, brief
from harness.sweep.file import Draft, budget_words


def varied_of(trials: list[Trial]) -> list[dict[str, Any]]:
    """Per trial its values of the keys in which the trials differ."""
    flat = [_flat(trial) for trial in trials]
    known: dict[tuple[str, str], bool] = {}  # the answer is one for all trials of a method: a grid of 1000 is not 1000 x 1000

    def differs(key: str, one: dict[str, Any]) -> bool:
        which = (key, one["method.name"])
        if which not in known:
            known[which] = _differs(key, one, flat)
        return known[which]

    return [{key: value for key, value in one.items() if differs(key, one)} for one in flat]


def _differs(key: str, one: dict[str, Any], trials: list[dict[str, Any]]) -> bool:
    """Options of a method are compared within the method, those of the training among trials that train."""
    if key.startswith("method.") and key != "method.name":
        trials = [other for other in trials if other["method.name"] == one["method.name"]]
    elif key.startswith("train."):
        trials = [other for other in trials if key in other]
    return any(other.get(key) != one[key] for other in trials)


def _flat(trial: Trial) -> dict[str, Any]:
    """Dotted keys; a list is a value. A trial without budget counts as flops_cut None, so that the column is complete."""
    flat: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk({"method": trial["method"], "budget": trial["budget"] or {"flops_cut": None}}, "")
    walk({key: value for key, value in trial.items() if key not in ("method", "budget", "train")}, "")
    walk({"train": trial["train"] or {}}, "")
    return {key: value for key, value in flat.items() if not key.endswith(".fingerprint")}  # it follows from another option


def labels_of(rows: list[tuple[Trial, Draft]], varied: list[dict[str, Any]]) -> list[str]:
    """Short and unique: the entry's label or the method and preset, its budget, and what differs from the method's defaults."""
    short = [_label(trial, draft, keys, defaults=True) for (trial, draft), keys in zip(rows, varied, strict=True)]
    times = Counter(short)
    return [text if times[text] == 1 else _label(trial, draft, keys, defaults=False)
            for text, (trial, draft), keys in zip(short, rows, varied, strict=True)]


def _label(trial: Trial, draft: Draft, varied: dict[str, Any], defaults: bool) -> str:
    method, own = trial["method"], draft.label
    words = [own] if own else [method["name"], draft.preset] if draft.preset else [method["name"]]
    if own and not defaults:
        words.append(method["name"])
    if trial["budget"] and (not own or not defaults):
        words.append(budget_words(trial["budget"]))
    cls = METHODS.get(method["name"])
    usual = _defaults(cls) | {f"method.{key}": value for key, value in draft.preset_options(cls).items()}
    for key, value in varied.items():
        group, _, option = key.partition(".")
        if key == "method.name" or group == "budget" or (own and defaults):
            continue
        if not (defaults and key in usual and usual[key] == value):
            words.append(f"{option.rpartition('.')[2] or group}={brief(value)}")
    return " ".join(words)


def _defaults(cls: type[Method]) -> dict[str, Any]:
    """Dotted key -> default, of the method's options and of the training."""
    from harness.training.config import TrainConfig

    groups = {"method": cls.Config, "train": TrainConfig}
    return {f"{group}.{f.name}": f.default for group, config in groups.items() for f in dataclasses.fields(config)
            if f.default is not dataclasses.MISSING}


def varied_defaults(method: str, varied: list[dict[str, Any]]) -> dict[str, Any]:
    """Dotted key -> default of every option that varies over the sweep and has one, as it is read back from JSON."""
    from harness.engine.sampler import SamplerConfig

    sampler = {f"sampler.{f.name}": f.default for f in dataclasses.fields(SamplerConfig) if f.default is not dataclasses.MISSING}
    usual = _defaults(METHODS.get(method)) | sampler
    return json.loads(json.dumps({key: usual[key] for keys in varied for key in keys if key in usual}))
