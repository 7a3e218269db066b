"""The images that a trial left behind. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.api import Result
from harness.reporting.markup import mark
from harness.reporting.rows import SweepResults
from harness.storage import arrays

SHEET_COLUMNS, SHEET_IMAGES = 8, 16


@dataclass(frozen=True)
class Pictures:
    """images: (n, height, width, 3) uint8. captions: n. seeds: n."""

    images: np.ndarray
    captions: list[str]
    seeds: list[int]


def stored(folder: Path, result: Result) -> Pictures | None:
    """The images of a trial in the results folder `folder`; None when it left none or they cannot be read (see `flaw`)."""
    return _read(folder, result)[0]


def flaw(folder: Path, result: Result) -> str:
    """Why the images that a trial left cannot be read, in one line; '' where they can, or where it left none."""
    return _read(folder, result)[1] if (known := _flaws.get(_stamp(folder, result))) is None else known


_flaws: dict[tuple, str] = {}
"""What is known of files that stayed as they are, for large ones are not read once more to be told about."""


def _stamp(folder: Path, result: Result) -> tuple:
    path = Path(folder) / str((result.get("artifacts") or {}).get("images"))
    try:
        found = path.stat()
        return path, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    except OSError:
        return path, 0, 0, 0


def _read(folder: Path, result: Result) -> tuple[Pictures | None, str]:
    relative = (result.get("artifacts") or {}).get("images")
    if not relative:
        return None, ""
    path, stamp = Path(folder) / relative, _stamp(folder, result)
    pictures, why = None, ""
    try:
        pictures = _pictures(arrays.load(path), result)
    except FileNotFoundError:  # where the whole folder is gone, somebody made room
        return None, f"{relative} is not there" if path.parent.is_dir() else ""
    except (arrays.Unreadable, KeyError, TypeError, ValueError, IndexError) as error:
        why = f"{relative}: {error}"
    _flaws[stamp] = why
    return pictures, why


def _pictures(found: Mapping[str, np.ndarray], result: Result) -> Pictures:
    images = _as_uint8(found["images"])
    captions = next((found[name] for name in ("prompts", "captions") if name in found), np.array([""] * len(images)))
    seeds = found["seeds"] if "seeds" in found else np.arange(len(images)) + result["trial"]["seeds"][0]
    if {len(captions), len(seeds)} != {len(images)}:
        raise ValueError("not as many images as prompts and seeds")
    return Pictures(images, [str(text) for text in captions], [int(seed) for seed in seeds])


def _as_uint8(images: np.ndarray) -> np.ndarray:
    """(n, h, w, 3) uint8 from that, or from (n, 3, h, w), or from floats in [0, 1]. Raises ValueError for other arrays."""
    if images.ndim != 4 or images.dtype.kind not in "uf" or 3 not in (images.shape[1], images.shape[-1]) or not images.size:
        raise ValueError(f"no images, but {images.dtype} of shape {images.shape}")
    if images.shape[-1] != 3:
        images = images.transpose(0, 2, 3, 1)
    return images if images.dtype == np.uint8 else np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def picks(count: int, wanted: int) -> np.ndarray:
    """`wanted` indices evenly spaced over `count` images: nobody chooses."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int))


def sheet(pictures: Pictures) -> np.ndarray:
    """(height, width, 3) uint8: up to SHEET_IMAGES evenly spaced images, SHEET_COLUMNS in a line."""
    chosen = pictures.images[picks(len(pictures.images), SHEET_IMAGES)]
    side = chosen.shape[1]
    chosen = chosen.repeat(2, 1).repeat(2, 2) if side <= 128 else chosen  # small images are hard to see in a browser
    lines = -(-len(chosen) // SHEET_COLUMNS)
    canvas = np.full((lines * chosen.shape[1], min(SHEET_COLUMNS, len(chosen)) * chosen.shape[2], 3), 255, np.uint8)
    for index, image in enumerate(chosen):
        y, x = index // SHEET_COLUMNS * image.shape[0], index % SHEET_COLUMNS * image.shape[1]
        canvas[y:y + image.shape[0], x:x + image.shape[1]] = image
    return canvas


def lost(sweep: SweepResults) -> list[str]:
    """A line for each trial whose pictures or score maps are not what it says it left."""
    lines = []
    for row in sweep.rows:
        scores = (row.result.get("artifacts") or {}).get("scores")
        path = sweep.folder / scores if scores else None
        why = arrays.flaw(path) if path and path.parent.is_dir() else ""
        texts = (flaw(sweep.folder, row.result), f"{scores}: {why}" if why else "")
        lines += [f"- `{mark(row.label)}`: {mark(text)}" for text in texts if text]
    return lines
