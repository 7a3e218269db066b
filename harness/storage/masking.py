"""What must not be told or kept: logins, and where things lie on this machine. The one place for messages, parts, logs, MLflow.

`masked` is for what is shown at once and takes out logins; `storable` is for what stays, and takes out the machine's folders too.
"""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
_USER = re.compile(r"//[^/\s'\"<>]*@")
_QUERY = re.compile(r"([?&][^=&\s]*(?:pass|pwd|token|secret|key|signature|credential)[^=&\s]*=)[^&\s'\"]+", re.I)
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer)\s+)[^\s'\"]+", re.I)
_HUB = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SECRET = re.compile(r"(^|_)(PASSWORD|PASSWD|TOKEN|SECRET|SECRET_KEY|API_KEY|ACCESS_KEY)$")
"""Variables of the environment whose values are logins."""
_SHORT = 6
"""A shorter value is found by chance in any text."""
_HOMES = re.compile(r"(?:(?<![\w./~-])|(?<=//))/(?:home|Users)/[^/\s'\":,;()<>]+")


def masked(text: str) -> str:
    """`text` with who logs in to the addresses in it, and every login of the environment, shown as ***."""
    for name, value in os.environ.items():
        if len(value) >= _SHORT and _SECRET.search(name.upper()):
            text = text.replace(value, "***")
    for pattern in (_QUERY, _HEADER):
        text = pattern.sub(r"\1***", text)
    return _HUB.sub("***", _USER.sub("//***@", text))


def storable(text: str, results: Path | str = "") -> str:
    """`masked`, with folders of this machine by what they are: '.' is the project or where we are, '~' a home, and <results>,
    <python>, <temporary>. results: the folder of all results.
    """
    text = masked(text)
    if "/" not in text:
        return text
    for pattern, name in _places(os.getcwd(), os.environ.get("HOME", ""), tempfile.gettempdir(), str(results)):
        text = pattern.sub(name, text)
    return _HOMES.sub("~", text)


@functools.lru_cache(maxsize=8)
def _places(here: str, home: str, temporary: str, results: str) -> list[tuple[re.Pattern[str], str]]:
    """(where a folder is named, what it is called), the longest first: a project may lie in a home."""
    paths = sysconfig.get_paths()
    named = {temporary: "<temporary>", home: "~", sys.prefix: "<python>", sys.base_prefix: "<python>",
             paths["stdlib"]: "<python>", paths["purelib"]: "<python>", here: ".", str(PROJECT): "."}
    named[results] = "<results>"
    folders = {folder: name for path, name in named.items() if path for folder in (path, os.path.realpath(path))
               if os.path.isabs(folder) and len(Path(folder).parts) > 1 and folder not in ("/usr", "/usr/local")}
    return [(re.compile(rf"(?:(?<![\w./~-])|(?<=//)){re.escape(folder)}(?=[/\s'\":,;()<>\]]|$)"), folders[folder])
            for folder in sorted(folders, key=len, reverse=True)]


def storable_tree(value: Any, results: Path | str = "") -> Any:
    """A copy of a JSON value with every text in it made storable; keys stay."""
    if isinstance(value, str):
        return storable(value, results)
    if isinstance(value, Mapping):
        return {key: storable_tree(one, results) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [one if isinstance(one, int | float) else storable_tree(one, results) for one in value]
    return value


class Log(io.TextIOWrapper):
    """A log of storable lines. It drops what a full disk does not take: it must never cost a trial."""

    results: Path | str = ""
    """The folder of all results."""

    def write(self, text: str) -> int:
        """Write and flush; returns the length of `text`."""
        with suppress(OSError):
            super().write(storable(text, self.results))
        return len(text)

    def flush(self) -> None:
        """Write what is waiting, where there is room."""
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        """Close in any case."""
        with suppress(OSError):
            super().close()
