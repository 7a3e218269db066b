"""Points of a space without any model behind them: seeded random draws, the whole grid, and probes that check its options."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

from harness.api import require
from harness.sweep.search.space import Domain, Point, Space

PATIENCE = 200
"""Draws in a row without a new point before a space counts as exhausted."""
MAX_PROBES = 400


def random_points(space: Space, count: int, seed: int, where: str) -> list[Point]:
    """`count` different points. Raises ConfigError when the space does not hold as many.

    Draw i of a parameter depends on the seed, i and its name alone: more points leave the first ones as they are, and so does
    another parameter.
    """
    found: dict[str, Point] = {}
    index = misses = 0
    while len(found) < count:
        point = space.assign(lambda domain, index=index: draw(domain, seed, index))
        known = found.setdefault(json.dumps(point, sort_keys=True), point) is not point
        index, misses = index + 1, misses + 1 if known else 0
        require(misses < PATIENCE, f"{where}.num_trials: {count} different trials were asked for, and after {len(found)} of them "
                f"{PATIENCE} draws found no other; lower num_trials, or take algorithm: grid")
    return list(found.values())


def draw(domain: Domain, seed: int, index: int) -> Any:
    """Draw `index` of a domain."""
    share = random.Random(f"{seed}/{index}/{domain.name}").random()  # this seeding and this draw are fixed by Python's documents
    if domain.kind == "choice":
        return domain.values[int(share * len(domain.values))]
    low, high = domain.values
    if domain.kind == "int":
        return low + int(share * (high - low + 1))
    value = math.exp(math.log(low) + share * (math.log(high) - math.log(low))) if domain.kind == "log_uniform" \
        else low + share * (high - low)
    return domain.rounded(value)


def grid_points(space: Space, most: int, where: str) -> list[Point]:
    """Every point of a space of choices. Raises ConfigError for other operators, and beyond `most` points."""
    for name, cases in space.parameters.items():
        for domain in cases:
            require(domain.kind in ("choice", "value"), f"{where}.space: {name}: {domain.kind} has no grid; write choice with a "
                    "list, or take algorithm: random")
    points = list(itertools.islice(space.points(lambda domain: domain.values), most + 1))
    require(len(points) <= most, f"{where}.space: its grid has more than {most} points; shorten a choice, or take algorithm: "
            "random")
    return points


def probes(space: Space) -> Iterator[Point]:
    """Points that together hold every choice and both bounds of every parameter, under every condition: what checks a space.

    Parameters that conditions look at are taken in all combinations, the others at their first value, then each changed alone;
    at most MAX_PROBES points.
    """
    return itertools.islice(_probes(space), MAX_PROBES)


def _probes(space: Space) -> Iterator[Point]:
    decisive = space.conditions | {"method.name"}

    def first(domain: Domain) -> tuple[Any, ...]:
        return domain.values if domain.name in decisive else domain.values[:1]

    skeletons = list(itertools.islice(space.points(first), MAX_PROBES))
    yield from skeletons
    for base in skeletons:
        for name in (name for name in base if name not in decisive):
            def one(domain: Domain, name: str = name, base: Point = base) -> tuple[Any, ...]:
                return domain.values[1:] if domain.name == name else (base[domain.name],)
            yield from space.points(one)
