"""A trial's model by its configs alone: what it is checked on, and counted on, where nothing may be loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness.api import BACKBONES, Backbone, NotHere, build_config, named
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig

Trial = Mapping[str, Any]
_known: dict[str, tuple[Backbone, Meter] | None] = {}


def sketch_of(trial: Trial) -> tuple[Backbone, Meter] | None:
    """The backbone on the meta device, and its meter; None where nothing is known of it before its weights are loaded.

    Raises ConfigError where the model could not be made, NotHere where a worker elsewhere may have it.
    """
    key = json.dumps([trial["backbone"], trial["sampler"]], sort_keys=True)
    if key not in _known:
        name, options = named(trial["backbone"])
        cls = BACKBONES.get(name)
        backbone = cls.sketch(build_config(cls.Config, options, "backbone"))  # type: ignore[attr-defined]
        _known[key] = None if backbone is None else (backbone, _meter(backbone, trial))
    return _known[key]


def known_sketch(trial: Trial) -> tuple[Backbone, Meter] | None:
    """The same, and None too where the model is not on this machine."""
    try:
        return sketch_of(trial)
    except NotHere:
        return None


def forget() -> None:
    """Read the configs anew at the next use: they may have changed."""
    _known.clear()


def _meter(backbone: Backbone, trial: Trial) -> Meter:
    meter = Meter(backbone, build_config(SamplerConfig, trial["sampler"], "sampler"))
    meter.device = "cpu"  # where a method makes what it needs: the meta device has no values for its tables
    return meter
