"""The grid that an entry of a sweep file spans: its axes {grid_search: [...]}, and every point of it as a tree of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from harness.api import require, show

AXIS = "grid_search"


def axes_in(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """(path, marker) of every {grid_search: [...]} in a tree, in the order written."""
    if isinstance(tree, dict) and AXIS in tree:
        yield path, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from axes_in(value, (*path, key))


def size_of(tree: Any) -> int:
    """Values in a tree, mappings and lists counted too; a long text counts as several."""
    if isinstance(tree, dict | list):
        return 1 + sum(size_of(value) for value in (tree.values() if isinstance(tree, dict) else tree))
    return 1 + len(tree) // 64 if isinstance(tree, str) else 1


def size_of_point(tree: dict[str, Any], axes: list[tuple[tuple, dict]]) -> int:
    """Values in a point of the grid, at most."""
    return size_of(tree) + sum(max(map(size_of, marker[AXIS])) - size_of(marker) for _, marker in axes)


def checked_axes(tree: dict[str, Any], where: str, place: str) -> list[tuple[tuple, dict]]:
    """Those of `axes_in`; ConfigError names a wrong one by its place in the file."""
    axes = list(axes_in(tree))
    for path, marker in axes:
        _check_axis(path, marker[AXIS], len(marker), f"{where}: {_dotted(path, place)}")
    return axes


def expanded(tree: dict[str, Any], axes: list[tuple[tuple, dict]]) -> Iterator[dict[str, Any]]:
    """Every point of the grid, the last axis fastest."""
    known = {id(marker): None for _, marker in axes}  # each axis is a hole in the copies: no point holds what the others hold
    for values in itertools.product(*(marker[AXIS] for _, marker in axes)):
        point = copy.deepcopy(tree, dict(known))
        for (path, _), value in zip(axes, values, strict=True):
            leaf = point
            for key in path[:-1]:
                leaf = leaf[key]
            leaf[path[-1]] = copy.deepcopy(value)
        yield point


def _check_axis(path: tuple, values: Any, num_keys: int, where: str) -> None:
    require(num_keys == 1, f"{where}: {AXIS} stands alone in its braces; move the other keys out")
    require(isinstance(values, list) and bool(values), f"{where}: {AXIS} needs a list with at least one value, got "
            f"{show(values)}")
    require(next(axes_in(values), None) is None, f"{where}: {AXIS} inside {AXIS}; write one flat list")
    require(path != ("entry", "label"), f"{where}: a label names one entry; write an entry for each")


def _dotted(path: tuple, place: str) -> str:
    words = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in path[1:])
    return (place + words) if path[0] == "entry" else words.lstrip(".")
