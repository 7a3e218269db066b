"""sha256 of image files, computed once: a file of the same path, size and times of change is not read again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from harness.data.images import StoredImage, check
from harness.fingerprints import announce, cache_folder, read_cache, write_cache

MANY = 1000
"""From so many unread files on, the wait is announced."""


def content_hashes(images: Sequence[StoredImage], key: str) -> list[str]:
    """sha256 of the bytes of each image. key: names the data set in the cache.

    Raises ConfigError for bytes that are no image, which is so found before anything is computed.
    """
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known, stamps = read_cache(path), [image.stamp for image in images]
    unread = [(image, stamp) for image, stamp in zip(images, stamps, strict=True) if stamp not in known]
    if len(unread) >= MANY:
        announce(f"data: reading {len(unread)} files of {key} for their hashes, once")
    for image, stamp in unread:
        encoded = image.read()
        check(encoded, image.name)
        known[stamp] = hashlib.sha256(encoded).hexdigest()
    if unread:
        write_cache(path, known)
    return [known[stamp] for stamp in stamps]
