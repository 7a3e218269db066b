"""Text of users as it stands in their files: read to the letter, or refused with the file and the line.

A line ends with LF or CRLF and with nothing else: U+2028, U+0085, form feeds and the like are characters of a prompt. A line of
nothing but spaces and tabs is no prompt. Nothing is trimmed, joined or unquoted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from harness.api import ConfigError, require

MAX_TEXT_BYTES = 2**30
MAX_CAPTION = 10_000
"""Characters of a caption: far beyond what any text encoder reads, and little enough to be kept beside every image."""
_ODD = re.compile(r"\0|\r(?!\n)")


def read_text(path: Path, where: str) -> str:
    """The text of a UTF-8 file, a byte order mark apart. where: the option that named the file."""
    require(is_file(path), f"{where}: no file at '{path}'")
    try:
        size = path.stat().st_size
        require(size <= MAX_TEXT_BYTES, f"{where}: '{path}' is larger than {MAX_TEXT_BYTES // 2**20} MiB; split it")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: '{path}' cannot be read ({error.strerror}); give yourself the right to read it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: '{path}' is not UTF-8 text ({error.reason} at byte {error.start}); save it as "
                          "UTF-8") from None
    odd = _ODD.search(text)
    if odd:
        what = "a NUL character; remove it" if odd[0] == "\0" else "a carriage return without a line feed; save the file with " \
            "LF or CRLF line ends"
        raise ConfigError(f"{where}: {path}, line {text.count(chr(10), 0, odd.start()) + 1}: holds {what}")
    return text


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of every line that is more than spaces and tabs."""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.strip(" \t"):
            yield number, line


def checked(caption: object, where: str) -> str:
    """The caption, or ConfigError where a model cannot be given it. where: file and place."""
    if not isinstance(caption, str):
        raise ConfigError(f"{where}: {str(caption)[:80]!r} is no text; put it in quotes")
    require(len(caption) <= MAX_CAPTION, f"{where}: a text of {len(caption)} characters; at most {MAX_CAPTION} are possible, so "
            f"shorten it (it begins with {caption[:40]!r})")
    require("\0" not in caption, f"{where}: the text {caption[:80]!r} holds a NUL character; remove it")
    require(not any("\ud800" <= letter <= "\udfff" for letter in caption), f"{where}: the text {caption[:80]!r} holds half a "
            "character (a lone surrogate); write the whole character")
    return caption


def same_text(text: str) -> str:
    """`text` in the one of its Unicode forms that stands for all of them (NFC): 'é' is 'é', however many code points it has."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def same_caption(text: str) -> str:
    """What two captions share that say the same but for case and Unicode form."""
    return same_text(same_text(text).casefold())


def is_file(path: Path) -> bool:
    """Whether a file is there; no name is too long or too odd to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
