"""What the interactive parts of report.html draw: the rows, their keep ratios and their pictures, as plain JSON. No torch."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from harness.reporting.front import tolerances_of
from harness.reporting.grid import alike
from harness.reporting.pictures import Pictures, picks
from harness.reporting.plots import colours, kept_map
from harness.reporting.rows import CUT, DENSE, Row, SweepResults, comparable, title, traits_in
from harness.reporting.tables import QUALITY, ordered

LOSSLESS_SIDE_PX, THUMBNAIL_SIDE_PX, JPEG_QUALITY = 128, 256, 85
SAMPLE = 8
"""Pictures that are encoded to foresee how many will fit."""


def rows_data(sweep: SweepResults) -> dict[str, Any]:
    """Metrics, styles and rows of the sweep; numbers digit for digit as in the rows, null where they are not finite."""
    rows = [row for row in ordered(sweep) if row.status in ("done", "partial")]
    names = [name for name in sweep.metrics if any(_finite(row.value(name)) is not None for row in rows)]
    sets = {name: {row.trial_id: index for index, group in enumerate(comparable(rows, name)) for row in group} for name in names}
    shapes = {method: index for index, method in enumerate(m for m in sweep.methods if m != DENSE)}
    slack = dict(zip(names, tolerances_of(sweep, names), strict=True))
    return {"metrics": {name: {"title": title(sweep, name), **_metric(rows, name), "tolerance": slack[name]} for name in names},
            "x": CUT if CUT in names else None, "y": sweep.quality,
            "styles": {m: {"colour": None if m == DENSE else c, "shape": shapes.get(m, -1)} for m, c in colours(sweep).items()},
            "rows": [_row(row, {name: sets[name].get(row.trial_id) for name in names}) for row in rows]}


def _metric(rows: Sequence[Row], name: str) -> dict[str, Any]:
    said = traits_in(rows, name)
    measure = next(row.measure(name) for row in rows if row.measure(name))
    return {"better": measure.get("better", "none"), "percent": said.percent, "timing": said.group == "latency",
            "group": "images" if said.group in QUALITY else "cost"}


def _row(row: Row, sets: dict[str, int | None]) -> dict[str, Any]:
    kept = kept_map(row)
    return {"id": row.trial_id, "label": row.label, "method": row.method, "dense": row.is_dense, "disturbed": row.contaminated,
            "kept": None if kept is None else np.round(kept, 3).tolist(),
            "values": {name: {"value": _finite(row.value(name)), "interval": _ends(row.interval(name)),
                              "spread": _ends(row.spread(name)), "n": row.measure(name).get("n"), "set": number}
                       for name, number in sets.items() if number is not None}}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _ends(ends: tuple[float, float] | None) -> list[float] | None:
    return list(ends) if ends and all(map(math.isfinite, ends)) else None


# ---------------------------------------------------------------------------------------------- pictures


def pictures_data(sweep: SweepResults, cap: int) -> dict[str, Any] | None:
    """Pictures of the same seeds for every row as data URIs that take at most `cap` characters together; None without any.

    When not all fit, the images are evenly spaced over the seeds and the same for every row: nobody picked them. Small images
    are stored without loss if they all fit so; others as JPEG of at most THUMBNAIL_SIDE_PX.
    """
    for lossless in (True, False):
        first, chosen, rows = _thumbnails(sweep, cap, lossless)
        if first is None:
            return None
        if len(chosen) == len(first.seeds) and _characters(rows) <= cap:
            break
    while (total := _characters(rows)) > cap:
        fewer = picks(len(chosen), min(len(chosen) - 1, len(chosen) * cap // total))
        chosen, rows = chosen[fewer], {key: [uris[i] for i in fewer] for key, uris in rows.items()}
    side = max(first.images.shape[1:3])
    return {"rows": rows, "seeds": [first.seeds[i] for i in chosen], "prompts": [first.captions[i] for i in chosen],
            "of": len(first.seeds), "lossless": lossless, "side": side if lossless else min(side, THUMBNAIL_SIDE_PX)}


def _characters(rows: Mapping[str, Sequence[str]]) -> int:
    return sum(len(uri) for uris in rows.values() for uri in uris)


def _thumbnails(sweep: SweepResults, cap: int, lossless: bool) -> tuple[Pictures | None, np.ndarray, dict[str, list[str]]]:
    """(pictures of the first row, indices that are likely to fit, {trial_id: URIs}); none where not all could be lossless."""
    num_rows = sum(1 for row in sweep.rows if (row.result.get("artifacts") or {}).get("images"))
    first, chosen, rows = None, np.arange(0), {}
    for row, pictures in alike(sweep):
        if first is None:
            first, count = pictures, len(pictures.seeds)
            if lossless and max(pictures.images.shape[1:3]) > LOSSLESS_SIDE_PX:
                break
            sample = [len(_encoded(pictures.images[i], lossless)) for i in picks(count, SAMPLE)]
            chosen = picks(count, min(count, cap * len(sample) // (sum(sample) * num_rows)))
            if lossless and len(chosen) < count:
                break
        rows[row.trial_id] = [_encoded(pictures.images[i], lossless) for i in chosen]
    return first, chosen, rows


def _encoded(image: np.ndarray, lossless: bool) -> str:
    picture, stream = Image.fromarray(image), io.BytesIO()
    if lossless:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.thumbnail((THUMBNAIL_SIDE_PX, THUMBNAIL_SIDE_PX), Image.Resampling.LANCZOS)
        picture.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return data_uri(stream.getvalue(), "png" if lossless else "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """An image file as a URI that needs no network."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
