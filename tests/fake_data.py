"""Small data sets in the layouts of the published ones; the pictures are noise."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from harness import data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the user's own for each test, and data sets read anew; for the modules that import it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.forget()
    yield
    data.forget()


def picture(path, seed=0, size=(20, 14), mode="RGB"):
    """A file of noise; size as (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return pixels


def make_folder(folder, count=24, caption="picture {}"):
    for index in range(count):
        picture(folder / "in" / f"{index:02d}.png", index)
    write_csv(folder / "captions.csv", [(f"in/{index:02d}.png", caption.format(index)) for index in range(count)])
    return folder


def write_csv(path, rows, heads=("file", "caption")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *rows])


def make_mjhq(folder):
    meta = {}
    for index, category in enumerate(("animals", "food", "animals")):
        picture(folder / "mjhq30k_imgs" / category / f"{index:04x}.jpg", index)
        meta[f"{index:04x}"] = {"category": category, "prompt": f"prompt {index}"}
    (folder / "meta_data.json").write_text(json.dumps(meta))
    return folder


def make_coco(folder, part="val2014", count=6):
    images = [{"id": 40 + index, "file_name": f"COCO_{part}_{40 + index:012d}.jpg", "height": 14, "width": 20, "license": 3}
              for index in range(count)]
    for image in images:
        picture(folder / part / image["file_name"], image["id"])
    captions = [{"image_id": image["id"], "id": 900 - 10 * image["id"] + k, "caption": f"{word} of {image['id']}.\n"}
                for image in images for k, word in ((2, "Third"), (0, "First"), (1, "Second"))]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(
        {"info": {}, "licenses": [], "images": images, "annotations": captions}))
    return folder


def options_of(name, path, **changes):
    sized = {} if name == "prompts" else {"resolution": 16}
    return data.resolve({"name": name, "path": str(path), **sized, **changes}, "data", None)


def pairs_of(options, split):
    found = data.load(options, split)
    return dict(zip(found.ids, found.captions, strict=True))
