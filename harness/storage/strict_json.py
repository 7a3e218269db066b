"""JSON without its traps: a file -> plain values, or `Unreadable` with one line that says why not. Nothing else is raised.

What is refused beside bad syntax: a key written twice, NaN and Infinity (unless Python's way of writing them is asked for), whole
numbers beyond 64 bits, text with half characters, deep nesting, and files too large to be ours.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES, MAX_DEPTH, MAX_INT = 2**30, 60, 2**63 - 1


class Unreadable(ValueError):
    """A file that does not hold what it should; the message says what is wrong, without the file's name."""


def read(path: Path, nonfinite: bool = False) -> Any:
    """The value in a UTF-8 file. nonfinite: whether NaN and Infinity may stand for numbers, as Python writes them.

    Raises FileNotFoundError where there is no file, and Unreadable for anything else that stands in the way.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise Unreadable(f"larger than {MAX_BYTES // 2**20} MiB")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    return parse(text, nonfinite)


def parse(text: str, nonfinite: bool = False) -> Any:
    """The value that `text` means; see `read`."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_constant if nonfinite else _no_constant)
    except RecursionError:
        raise Unreadable(f"nested deeper than {MAX_DEPTH} levels") from None
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"not JSON: {error}") from None
    _check(value, nonfinite)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"the key {twice[:80]!r} is written twice")
    return found


def _constant(name: str) -> float:
    return math.nan if name == "NaN" else float(name)


def _no_constant(name: str) -> NoReturn:
    raise Unreadable(f"{name} is no number of JSON")


def _check(value: Any, nonfinite: bool, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise Unreadable(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_leaf(key, nonfinite)
            _check(item, nonfinite, depth + 1)
    elif isinstance(value, list):
        if set(map(type, value)) == {float}:  # long and many: values per image, series
            if not nonfinite and not all(map(math.isfinite, value)):
                raise Unreadable("a number is beyond what a float holds")
            return
        for item in value:
            _check(item, nonfinite, depth + 1)
    else:
        _check_leaf(value, nonfinite)


def _check_leaf(value: Any, nonfinite: bool) -> None:
    kind = type(value)
    if kind is int and abs(value) > MAX_INT:
        raise Unreadable("a whole number is beyond 64 bits")
    if kind is float and not nonfinite and not math.isfinite(value):
        raise Unreadable("a number is beyond what a float holds")
    if kind is str and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Unreadable(f"the text {value[:80]!r} holds half characters (surrogates)")
