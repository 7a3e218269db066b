"""Text of users in our markdown: it is shown as it stands and is never markup, whoever writes the sentence around it.

`mark` puts a stand-in for every character that could mean something, before a section is written; `as_markdown` and `as_html` put
the character back, each in the way its language escapes it. So a section may set a label in code, bold, a cell or a sentence.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.reporting.rows import Row, SweepResults

_SPECIAL = "<>&`*[]\\~"
_FIRST = 0xE000  # a private corner of Unicode: in no text that means anything
_STAND_INS = {ord(letter): chr(_FIRST + index) for index, letter in enumerate(_SPECIAL)}
_CORNER = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + len(_SPECIAL) - 1)}]")
_SPACES = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def mark(text: str) -> str:
    """`text` in one line, with stand-ins for what could be markup."""
    return _SPACES.sub(" ", _CORNER.sub("\ufffd", text)).translate(_STAND_INS)


def marked(sweep: SweepResults) -> SweepResults:
    """The sweep with every text of its rows marked: for what is written in markdown."""
    return replace(sweep, name=mark(sweep.name), question=mark(sweep.question), rows=tuple(map(_marked_row, sweep.rows)),
                   search=_deep(sweep.search), asha=_deep(sweep.asha))


def _marked_row(row: Row) -> Row:
    return replace(row, label=mark(row.label), note=mark(row.note), result=_deep(row.result),
                   members=tuple(map(_marked_row, row.members)))


def _deep(value: Any) -> Any:
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, dict):
        return {mark(key): _deep(item) for key, item in value.items()}
    if isinstance(value, list):
        return value if not any(isinstance(item, str | dict | list) for item in value) else [_deep(item) for item in value]
    return value


def plain(text: str) -> str:
    """Marked text as it was."""
    return _put_back(text, str)


def as_markdown(text: str) -> str:
    """Markdown with the marked characters escaped; within code they stand as they are."""
    parts = text.split("`")
    for index, part in enumerate(parts):
        parts[index] = _in_code(part) if index % 2 else _put_back(part, lambda letter: _ENTITIES.get(letter, f"\\{letter}"))
    return "".join(parts)


def _in_code(part: str) -> str:
    text = plain(part)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def as_html(text: str) -> str:
    """HTML with the marked characters escaped."""
    return _put_back(text, html.escape)


def _put_back(text: str, escape: Callable[[str], str]) -> str:
    return _CORNER.sub(lambda match: escape(_SPECIAL[ord(match[0]) - _FIRST]), text)
