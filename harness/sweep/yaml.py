"""YAML without its traps: text -> plain values that JSON can hold, or a ConfigError that names the file and the place."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from harness.api import ConfigError, require, show

MAX_BYTES, MAX_DEPTH, MAX_INT = 2**16, 20, 2**63 - 1
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f\\ud800-\\udfff]")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
"""How a number is written: 3, -0.5, 1e-3."""
_OTHER_NUMBER = re.compile(r"""
    [-+]?( \.?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9_]+)? | [0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?
           | 0[xX][0-9a-fA-F_]+ | 0[bB][01_]+ | 0[oO][0-7_]+ | \.(inf|Inf|INF) ) | \.(nan|NaN|NAN)""", re.X)
"""What else some YAML takes for a number: 010 is 8, 1:31 is 91, 1_000 is 1000."""
_WORD = re.compile("yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
_INT, _FLOAT, _REFUSED = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:dit-harness,2026:refused"


class _Refused(str):
    """What YAML may take for a number or a truth value, and nobody should have to know. line: where it stands, from 1."""

    line: int


class _Loader(yaml.SafeLoader):
    """SafeLoader of less: text, decimal numbers, true and false, null, lists, mappings.

    Refuses what YAML would accept silently or expand: a key written twice, anchors and aliases, tags, deep nesting, numbers that
    are not written in decimal, yes and no. Dates and `<<` are plain text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("bool", "null")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """The next node; anchors, tags and deep nesting raise."""
        event = self.peek_event()
        for refused, what in ((getattr(event, "anchor", None), "anchors and aliases"), (getattr(event, "tag", None), "tags")):
            if refused is not None:
                raise yaml.composer.ComposerError(None, None, f"'{refused}': {what} are not possible in a sweep file; write the "
                                                  "value itself, in quotes where it is text", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels; flatten it", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        """The tag of a node; what is too long for a number is text."""
        if kind is not yaml.ScalarNode or not implicit[0]:
            return super().resolve(kind, value, implicit)
        if len(value) > 64:
            return self.DEFAULT_SCALAR_TAG
        if found := _DECIMAL.fullmatch(value):
            return _FLOAT if found[2] or found[3] else _INT
        refused = _OTHER_NUMBER.fullmatch(value) or _WORD.fullmatch(value)
        return _REFUSED if refused else super().resolve(kind, value, implicit)

    def construct_refused(self, node: yaml.ScalarNode) -> _Refused:
        """Refused later, by `_check_plain`, which knows the key."""
        found = _Refused(node.value)
        found.line = node.start_mark.line + 1
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of `node`; a repeated key raises."""
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or isinstance(key, _Refused):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {str(key)[:80]!r} is no text; put it in quotes", key_node.start_mark)
            if not 0 < len(key) <= 80 or not key.isprintable():
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {show(key)} is no key: 1 to 80 printable characters", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is written twice; remove one",
                                                        key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor(_REFUSED, _Loader.construct_refused)


def _remedy(written: str) -> str:
    """What is to be written in place of a number that is not decimal, or of a word for true and false."""
    if _WORD.fullmatch(written):
        return f"write {'true' if written.lower() in ('yes', 'on') else 'false'}"
    if "inf" in written.lower() or "nan" in written.lower():
        return "expected a finite number"
    try:
        value = _meant(written.replace("_", ""))
    except ValueError:
        return "a number is written in decimal, such as 8 or 1e-3"
    return f"a number is written in decimal, and YAML may read this one as {value}; write {value} if that is meant"


def _meant(text: str) -> int | float:
    """The value of a number by YAML 1.1, a leading 0o included."""
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.removeprefix("+"))
    if ":" in digits:
        *high, last = digits.split(":")
        low = float(last) if "." in last else int(last)
        return sign * (sum(int(part) * 60 ** (len(high) - index) for index, part in enumerate(high)) + low)
    if digits[:2].lower() in ("0x", "0b", "0o"):
        return sign * int(digits, 0)
    if re.fullmatch("0[0-7]+", digits):
        return sign * int(digits, 8)
    return sign * (int(digits) if digits.isdigit() else float(digits))


def read(path: Path) -> str:
    """The text of the file at `path`. Raises ConfigError for what is no short text file in UTF-8."""
    try:
        require(path.exists(), f"{path}: no such sweep file")
        require(not path.is_dir(), f"{path}: is a folder; name a sweep file such as {path}/smoke.yaml")
        require(path.is_file(), f"{path}: is neither a file nor a folder; name a sweep file")
        require(path.stat().st_size <= MAX_BYTES, f"{path}: larger than {MAX_BYTES // 1024} KiB; a sweep file is a page of text")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a sweep file that you may read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None


def parse(text: str, where: str) -> Any:
    """The plain values that `text` means, None where it is empty. Raises ConfigError naming `where` and the line or the key."""
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        tab = " YAML is indented with spaces, never with tabs." if "\\t" in str(error.problem) else ""
        raise ConfigError(f"{where}{line}: {', '.join(filter(None, (error.context, error.problem)))}.{tab}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where}, line {line}: the character #x{ord(text[error.position]):04x} cannot stand in a YAML file; "
                          "remove it") from None
    if isinstance(tree, dict):
        _check_plain(tree, where)
    return tree


def _check_plain(value: Any, file: str, place: str = "") -> None:
    """Numbers are finite and fit in 64 bits, text holds no control characters: whatever JSON and a file name can hold."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(item, file, f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}" if place else key)
    elif isinstance(value, _Refused):
        raise ConfigError(f"{file}, line {value.line}: {place}: {value}: {_remedy(value)}; where it is text, put it in quotes")
    elif isinstance(value, float):
        require(math.isfinite(value), f"{file}: {place}: expected a finite number, got {value}")
    elif isinstance(value, int):
        require(abs(value) <= MAX_INT, f"{file}: {place}: expected a number of at most 64 bits, got {show(value)}")
    elif isinstance(value, str):
        require(_CONTROL.search(value) is None, f"{file}: {place}: the text {show(value)} holds control characters; remove them")
