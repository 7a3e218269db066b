"""sha256 of image files, computed once: a file of the same path, size and times of change is not read again.

Each is decoded to its end when it is read, so that a damaged one is found before anything is computed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from harness.data.images import CHECK, StoredImage, check
from harness.storage.fingerprints import announce, cache_folder, read_cache, write_cache

_HASH = re.compile("[0-9a-f]{64}")
MANY = 1000
"""From so many unread files on, the wait is announced."""


def content_hashes(images: Sequence[StoredImage], key: str) -> list[str]:
    """sha256 of the bytes of each image. key: names the data set in the cache.

    Raises ConfigError for bytes that are no image, which is so found before anything is computed.
    """
    path = cache_folder() / f"{hashlib.sha256(f'{CHECK} {key}'.encode()).hexdigest()[:16]}.json"
    known, stamps = _hashes(read_cache(path)), [image.stamp for image in images]
    unread = [(image, stamp) for image, stamp in zip(images, stamps, strict=True) if stamp not in known]
    if len(unread) >= MANY:
        announce(f"data: reading and decoding {len(unread)} images of {key}, once")
    for image, stamp in unread:
        encoded = image.read()
        check(encoded, image.name)
        known[stamp] = hashlib.sha256(encoded).hexdigest()
    if unread:
        write_cache(path, known)
    return [known[stamp] for stamp in stamps]


def _hashes(known: dict[str, Any]) -> dict[str, str]:
    """What is known; nothing where the file is another program's: reading the images again costs time only."""
    fits = all(isinstance(value, str) and _HASH.fullmatch(value) for value in known.values())
    return known if fits else {}
