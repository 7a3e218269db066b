"""From a point of a space to what a sweep file would have said, and from a search to what its report must know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from harness.api import brief
from harness.sweep.search.config import Asha, Search
from harness.sweep.search.space import Point

LABEL_CHARACTERS = 80


def as_entry(point: Point, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(an entry of `methods`, options to lay over `sampler`) that mean trial `number` of a search."""
    entry: dict[str, Any] = {"name": point["method.name"], "label": label(point, number)}
    sampler: dict[str, Any] = {}
    for name, value in point.items():
        group, _, option = name.partition(".")
        if group in ("method", "budget"):
            entry[option] = value
        else:
            (sampler if group == "sampler" else entry.setdefault("train", {}))[option] = value
    return entry, sampler


def label(point: Point, number: int) -> str:
    """'#3 tomesd keep_ratio=0.62': the same whatever else a search tries later."""
    words = [f"#{number}", point["method.name"]]
    for name, value in point.items():
        if name != "method.name":
            words.append(f"{name.partition('.')[2]}={brief(value, digits=3)}")
    text = " ".join(words)
    return text if len(text) <= LABEL_CHARACTERS else text[:LABEL_CHARACTERS - 1] + "…"


def header(search: Search | None, asha: Asha | None, numbers: Mapping[str, int]) -> dict[str, Any]:
    """What a report must know: the options as checked, the space in words, {trial_id: number}; empty without a search."""
    told: dict[str, Any] = {}
    if search:
        space = {name: "; ".join(map(str, cases)) for name, cases in search.space.parameters.items()}
        told["search"] = {**dataclasses.asdict(search.options), "space": space, "numbers": dict(numbers)}
    if asha:
        told["asha"] = dataclasses.asdict(asha)
    return told
