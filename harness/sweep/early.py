"""Mistakes in options, told before torch is imported: what `harness.sweep.resolve` would refuse too, some seconds later.

Its own functions run on outlines of the classes (see `harness.sweep.outline`). Where an outline cannot tell, nothing is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness.api import BACKBONES, DATASETS, METHODS, METRICS, build_config
from harness.sweep import resolve
from harness.sweep.file import Draft, Sweep
from harness.sweep.outline import CannotTell, Outlines, options_of
from harness.sweep.search.draws import probes


def refuse(sweep: Sweep) -> None:
    """Raise ConfigError for the first option of the sweep that cannot be right; nothing heavy is imported."""
    known = {real.kind: Outlines(group, real) for group, real in (
        ("METHODS", METHODS), ("BACKBONES", BACKBONES), ("METRICS", METRICS))}
    asked: set[str] = set()
    for draft in _drafts(sweep):
        for parts, question in _questions(draft, sweep, known):
            if repr(parts) not in asked:
                asked.add(repr(parts))
                with contextlib.suppress(CannotTell):
                    question()


def _drafts(sweep: Sweep) -> Iterator[Draft]:
    """The trials as written, and those at the ends of a search's space."""
    yield from sweep.drafts
    if sweep.search:
        yield from (sweep.draft(point, 1) for point in probes(sweep.search.space))


def _questions(draft: Draft, sweep: Sweep, known: Mapping[str, Outlines]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """(what it is about, a check of it) for every part of a trial, in the order of `harness.sweep.resolve`."""
    shared, file = draft.shared, draft.file
    random = isinstance(shared["backbone"], Mapping) and shared["backbone"].get("weights") == "shape_only"

    def check_method() -> None:
        cls = resolve._method(draft, sweep.resources, known["method"])[2]
        if not random:
            resolve._train(draft, cls)

    def check_sampler() -> None:
        build_config(options_of("harness.engine.sampler", "SamplerConfig"), shared["sampler"] or {}, f"{file}: sampler")

    def check_data() -> None:
        options = resolve._named(shared["data"] or {}, f"{file}: data")
        name = options.pop("name", "emoji")
        if isinstance(name, str) and not DATASETS.has_plugins():
            DATASETS.config(name, options, f"{file}: data")

    yield (draft.place, draft.method, draft.budget, draft.train, draft.preset, draft.own), check_method
    yield shared["backbone"], lambda: resolve._component(known["backbone"], shared["backbone"], f"{file}: backbone")
    yield ("sampler", shared["sampler"]), check_sampler
    yield ("data", shared["data"]), check_data
    yield (shared["metrics"], shared["backbone"]), lambda: resolve._metrics(shared, f"{file}: metrics", known["metric"])
