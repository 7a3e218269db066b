"""sha256 of image files, computed once: a file of the same path, size and times of change is not read again.

Each is decoded to its end when it is read, so that a damaged one is found before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from harness import strict_json
from harness.data.images import CHECK, StoredImage, check
from harness.durable import put_text

log = logging.getLogger(__name__)

_HASH = re.compile("[0-9a-f]{64}")
MANY = 1000
"""From so many unread files on, the wait is announced."""


def cache_folder() -> Path:
    """Where known hashes are kept: the user's cache, for a data set may lie where we must not write."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-harness" / "hashes"


def content_hashes(images: Sequence[StoredImage], key: str) -> list[str]:
    """sha256 of the bytes of each image. key: names the data set in the cache.

    Raises ConfigError for bytes that are no image, which is so found before anything is computed.
    """
    path = cache_folder() / f"{hashlib.sha256(f'{CHECK} {key}'.encode()).hexdigest()[:16]}.json"
    known, stamps = _read(path), [image.stamp for image in images]
    unread = [(image, stamp) for image, stamp in zip(images, stamps, strict=True) if stamp not in known]
    if len(unread) >= MANY:
        log.info("data: reading and decoding %d images of %s, once", len(unread), key)
    for image, stamp in unread:
        encoded = image.read()
        check(encoded, image.name)
        known[stamp] = hashlib.sha256(encoded).hexdigest()
    if unread:
        _write(path, known)
    return [known[stamp] for stamp in stamps]


def _read(path: Path) -> dict[str, str]:
    """What is known; nothing where the file is absent or another program's: reading the images again costs time only."""
    try:
        known = strict_json.read(path)
    except (FileNotFoundError, strict_json.Unreadable):
        return {}
    fits = isinstance(known, dict) and all(isinstance(value, str) and _HASH.fullmatch(value) for value in known.values())
    return known if fits else {}


def _write(path: Path, known: dict[str, str]) -> None:
    try:
        put_text(path, json.dumps(known))
    except OSError as error:
        log.warning("data: hashes cannot be kept in %s (%s); every start reads all files again", path.parent, error)
