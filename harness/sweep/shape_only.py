"""A sweep on random weights: the same trials on a backbone of the same shapes; latency, memory and FLOPs without a download."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from harness.api import BACKBONES, METHODS, METRICS, did_you_mean, require
from harness.sweep.file import Draft, Sweep

SUFFIX = "_shape_only"
KEPT = ("name", "dtype", "device", "text_length")
"""Options of a backbone that mean the same with random weights."""


@dataclass(frozen=True)
class Shapes:
    """How large. resolution: pixels of a side; steps: of sampling; None: as the file or the model says. blocks: so many of the
    architecture's blocks, for machines that the whole does not fit; None: all.
    """

    resolution: int | None = None
    steps: int | None = None
    blocks: int | None = None


def as_shape_only(sweep: Sweep, shapes: Shapes) -> tuple[Sweep, list[str]]:
    """The sweep under another name, one image a trial, and what was left out, in words.

    Metrics that judge images go, and rows that are nothing but trained weights; with fewer blocks also options that tell blocks
    by number. Prompts are those of the embedded data, for text is encoded by chance here. Trained methods run as they begin:
    their schedules are those of the budget.
    """
    import harness.backbones  # noqa: F401  (these fill the registries)
    import harness.metrics  # noqa: F401
    import methods  # noqa: F401

    left_out: dict[str, None] = {}
    file = str(sweep.path)
    drafts = [draft for draft in sweep.drafts if _has_shapes(draft, left_out)]
    drafts = [dataclasses.replace(draft, shared=_shared(draft.shared, shapes, left_out, file),
                                  method=_method(draft, left_out) if shapes.blocks else draft.method) for draft in drafts]
    shared = _shared(sweep.shared, shapes, left_out, file) if sweep.shared else {}
    resources = sweep.resources if _has_gpu() else dataclasses.replace(sweep.resources, gpu=0)
    changed = dataclasses.replace(sweep, name=sweep.name + SUFFIX, drafts=drafts, shared=shared, resources=resources)
    return changed, list(left_out)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_shapes(draft: Draft, left_out: dict[str, None]) -> bool:
    cls = METHODS.get(draft.method["name"], draft.where)
    if cls.trainable and cls.needs_adapters:
        left_out[f"method {cls.name}, which is the dense model but for its weights"] = None
        return False
    return True


def _method(draft: Draft, left_out: dict[str, None]) -> dict[str, Any]:
    """The options of a row, without those that only fit all the blocks of the published model."""
    cls = METHODS.get(draft.method["name"], draft.where)
    written = {**cls.presets.get(draft.preset or "", {}), **draft.method}
    changed = {key: None for key in cls.of_depth if written.get(key) is not None}
    for key in changed:
        left_out[f"option {cls.name}.{key}, which is of the whole model's blocks: the method's own rule instead"] = None
    return {**draft.method, **changed}


def _shared(shared: dict[str, Any], shapes: Shapes, left_out: dict[str, None], file: str) -> dict[str, Any]:
    from harness.backbones.shapes import SHAPE_ONLY, architecture_of

    shared = copy.deepcopy(shared)
    written = shared["backbone"] if isinstance(shared.get("backbone"), dict) else {"name": shared.get("backbone")}
    name = str(written.get("name"))
    require(name in BACKBONES.names(), f"{file}: backbone: unknown backbone '{name}'.{did_you_mean(name, BACKBONES.names())}")
    blocks = f"@{shapes.blocks}" if shapes.blocks else ""
    shared["backbone"] = {key: written[key] for key in KEPT if key in written} | {
        "weights": SHAPE_ONLY, "architecture": architecture_of(written) + blocks}
    if str(written.get("device", "cpu")) != "cpu" and not _has_gpu():
        shared["backbone"] |= {"device": "cpu", "dtype": "float32"}
        left_out[f"device {written['device']}, which torch does not see: on the CPU, in float32"] = None
    if size := shapes.resolution or written.get("resolution"):
        shared["backbone"]["resolution"] = size
    shared["sampler"] = {**(shared.get("sampler") or {}), "batch_size": 1} | ({"num_steps": shapes.steps} if shapes.steps else {})
    metrics = []
    for metric in shared.get("metrics") or []:
        named = metric if isinstance(metric, str) else metric.get("name")
        if named in METRICS.names() and METRICS.get(named).needs_weights:
            left_out[f"metric {named}, which judges images"] = None
        else:
            metrics.append(metric)
    return {**shared, "metrics": metrics or ["flops", "latency"], "data": {"name": "emoji"}, "seeds": [0, 0]}
