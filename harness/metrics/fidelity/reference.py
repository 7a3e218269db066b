"""Features of the real images: shipped for the embedded data set, otherwise computed once into the store.

The shipped file is made by `python -m harness.embedded.build_reference`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import data
from harness.api import require
from harness.metrics.extractors.effnet import NAME, extractor_id, features_of
from harness.storage import arrays
from harness.storage.code_hash import code_hash
from harness.storage.store import Store

log = logging.getLogger(__name__)

SHIPPED = Path(data.__file__).parent / "emoji_reference_effnet.npz"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reference:
    """features: (m, 1280) float64, rounded to half precision so that shipped and computed ones agree. id: what they are of."""

    features: np.ndarray
    id: str


def load_reference(options: str | Mapping[str, Any], split: str, store: Store, progress: Progress) -> Reference:
    """Features of all real images of a split; see `harness.data.load` for `options`.

    The id is made of data set and split, preprocessing, fingerprint and extractor: features of different ids are of different
    things. A shipped file that belongs to other images or another extractor is not used.
    """
    images = data.load(options, split)
    require(images.images is not None, f"data: '{data.describe(options, split)}' is prompts without images; take a data set of "
            "images, or metrics that need no reference")
    key = {"data": images.fingerprint, "extractor": extractor_id()}
    reference_id = f"{data.describe(options, split)}-{key['data'][:8]}-{NAME}-{key['extractor'][:8]}"
    shipped = _read(SHIPPED) if SHIPPED.exists() else None
    if shipped is not None and shipped[0] == key:
        return Reference(shipped[1], reference_id)
    if shipped is not None and shipped[0]["data"] == key["data"]:
        log.warning("the shipped reference features are of another extractor than %s; they are computed again", key["extractor"])

    def make(folder: Path) -> None:
        write_reference(folder / "reference.npz", images.images, key, lambda done, total: progress("reference", done, total))

    made = store.get_or_make("reference", {**key, "code": code_hash(__name__)}, make)
    return Reference(_read(made / "reference.npz")[1], reference_id)


def write_reference(path: Path, images: np.ndarray, key: dict[str, str], progress: Callable[[int, int], None]) -> None:
    """Compute the features of `images` (m, height, width, 3) uint8 and write them with their key."""
    features = features_of(images, progress).numpy().astype(np.float16)
    arrays.save(path, features=features, key=np.array(json.dumps(key, sort_keys=True)))


def _read(path: Path) -> tuple[dict[str, str], np.ndarray]:
    stored = arrays.load(path)
    return json.loads(str(stored["key"])), stored["features"].astype(np.float64)
