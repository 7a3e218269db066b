"""The ends of a compute budget: what a method saves at both ends of its knob, counted once on shapes and kept in the store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from harness.api import METHODS, Trial, named
from harness.cost import budget
from harness.cost.budget import reach_of
from harness.cost.flops import Meter
from harness.storage.code_hash import code_hash
from harness.storage.store import Store

End = tuple[int, float]
"""(position of the knob, executed cut)."""
_counted: dict[str, tuple[End, End]] = {}


def ends_of(trial: Trial, meter: Meter, store: Store | None, counting: bool) -> tuple[End, End] | None:
    """Both ends for the method of a trial on the sketch that `meter` counts; None where they are not known and not `counting`."""
    inputs = _inputs(trial, meter)
    key = json.dumps(inputs, sort_keys=True)
    if key not in _counted:
        if not counting and (store is None or not store.has("ends", inputs)):
            return None
        name, options = named(trial["method"])

        def make(folder: Path) -> None:
            (folder / "ends.json").write_text(json.dumps(reach_of(meter, name, options)), encoding="utf-8")

        if store is None:
            _counted[key] = reach_of(meter, name, options)
        else:
            low, high = json.loads((store.get_or_make("ends", inputs, make) / "ends.json").read_text(encoding="utf-8"))
            _counted[key] = (low[0], low[1]), (high[0], high[1])
    return _counted[key]


def _inputs(trial: Trial, meter: Meter) -> dict[str, Any]:
    """What the ends depend on: shapes and schedule, not the weights."""
    backbone = meter.backbone
    facts = [sorted(part.config.items(), key=str) for part in (backbone.transformer, backbone.scheduler)]
    model = hashlib.sha256(repr([facts, backbone.latent_shape]).encode()).hexdigest()[:16]
    code = code_hash(budget, type(backbone), METHODS.get(trial["method"]["name"]))
    return {"model": model, **{key: trial[key] for key in ("backbone", "sampler", "method")}, "code": code}
