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


class _Loader(yaml.SafeLoader):
    """SafeLoader of less: text, numbers, true and false, null, lists, mappings.

    Refuses what YAML would accept silently or expand: a key written twice, anchors and aliases, tags, deep nesting. Dates and
    `<<` are plain text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("bool", "int", "float", "null")]
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
        long = kind is yaml.ScalarNode and len(value) > 64
        return self.DEFAULT_SCALAR_TAG if long else super().resolve(kind, value, implicit)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; what YAML takes for a number and Python does not, such as 0x_, raises."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, f"this number cannot be read ({error}); put text in "
                                                    "quotes", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of `node`; a repeated key raises."""
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {show(key)} is not text; put it in quotes", key_node.start_mark)
            if not 0 < len(key) <= 80 or not key.isprintable():
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {show(key)} is no key: 1 to 80 printable characters", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is written twice; remove one",
                                                        key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read(path: Path) -> str:
    """The text of the file at `path`. Raises ConfigError for what is no short text file in UTF-8."""
    require(path.exists(), f"{path}: no such sweep file")
    require(path.is_file(), f"{path}: is a folder; name a sweep file such as {path}/smoke.yaml")
    require(path.stat().st_size <= MAX_BYTES, f"{path}: larger than {MAX_BYTES // 1024} KiB; a sweep file is a page of text")
    try:
        return path.read_text(encoding="utf-8")
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
    elif isinstance(value, float):
        require(math.isfinite(value), f"{file}: {place}: expected a finite number, got {value}")
    elif isinstance(value, int):
        require(abs(value) <= MAX_INT, f"{file}: {place}: expected a number of at most 64 bits, got {show(value)}")
    elif isinstance(value, str):
        require(_CONTROL.search(value) is None, f"{file}: {place}: the text {show(value)} holds control characters; remove them")
