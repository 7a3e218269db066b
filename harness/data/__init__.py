"""Data sets by name: images with captions, or prompts alone, in splits that never share a pair.

`options` is everywhere what stands under `data` in a resolved trial: {"name": ..., every option of its Config, "fingerprint"}.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from harness.api import DATASETS, ConfigError, DataSet, did_you_mean, require, show
from harness.data import coco as coco
from harness.data import emoji as emoji
from harness.data import folder as folder
from harness.data import hub as hub
from harness.data import mjhq as mjhq
from harness.data import prompts as prompts
from harness.data import scenes as scenes
from harness.data.files import leaked

SPLITS = ("train", "reference")


def load(options: str | Mapping[str, Any], split: str) -> Any:
    """The split 'train' or 'reference': `images` (n, H, W, 3) uint8, `captions`, `ids`, `fingerprint`.

    options: of a resolved trial, or the name of a data set that needs none. Images may be read as they are sliced; they are None
    where there are prompts only. Raises ConfigError where the files are no longer what the trial was made for.
    """
    require(split in SPLITS, f"data.split: unknown split '{split}'.{did_you_mean(split, SPLITS)}")
    return opened({"name": options} if isinstance(options, str) else options).load(split)


def load_training(options: Mapping[str, Any]) -> Any:
    """What a trial trains on: the split 'train' of `options['train']` where that is given, else of the data set itself."""
    source = trained_on(options)
    leaks = _leaks(options)
    if not leaks:
        return load(source, "train")
    return opened(source).load("train", without=leaks)  # type: ignore[call-arg]  # only data sets from files may drop


def trained_on(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options of the data set that a trial trains on."""
    return options.get("train") or options


def can_train(options: Mapping[str, Any]) -> bool:
    """Whether there is a pair of image and caption to train on."""
    source = opened(trained_on(options))
    return source.has_images and source.has("train")


def has_images(options: Mapping[str, Any]) -> bool:
    """Whether there are real images to compare with."""
    return opened(options).has_images


def count(options: Mapping[str, Any], split: str) -> int:
    """Pairs of a split."""
    return len(opened(options).contents(split))


def check_resolution(options: Mapping[str, Any], drawn: int) -> None:
    """ConfigError where real images are brought to another size than the `drawn` pixels a side of the backbone's."""
    for where, one in (("data", options), ("data.train", options.get("train") or {})):
        side = one.get("resolution")
        require(side is None or side == drawn, f"{where}.resolution: {side}, but the backbone draws {drawn} pixels a side; write "
                f"{where}.resolution: {drawn}")


def describe(options: str | Mapping[str, Any], split: str) -> str:
    """'<name>-<split>' and how its images were prepared: the part of a reference id that people read."""
    if isinstance(options, str) or not options.get("resolution"):
        return f"{options if isinstance(options, str) else options['name']}-{split}"
    return f"{options['name']}-{split}-square{options['resolution']}"


def opened(options: Mapping[str, Any]) -> DataSet:
    """The data set of `options`, kept for the next call, so that its files are listed once."""
    return _opened(json.dumps(options, sort_keys=True))


def code_of(options: Mapping[str, Any]) -> list[type]:
    """The classes of the data sets that a trial takes pairs from."""
    return [DATASETS.get(one["name"]) for one in (options, options.get("train")) if one]


@lru_cache(maxsize=8)
def _opened(text: str) -> DataSet:
    options = json.loads(text)
    name, expected = options.pop("name"), options.pop("fingerprint", None)
    found = DATASETS.build(name, options, "data")
    require(expected is None or found.fingerprint == expected, f"data: the files of '{name}' have changed: their fingerprint is "
            f"{found.fingerprint}, and the trial was made for {expected}; run the sweep file again")
    return found


def forget() -> None:
    """List files anew at the next use: they may have changed."""
    _opened.cache_clear()


def resolve(written: Mapping[str, Any], where: str, resolution: int | None,
            native: Callable[[], int | None] = lambda: None) -> dict[str, Any]:
    """The options in full, from those `written` in a sweep file. resolution: of the backbone, None where the file leaves it open.

    native: what the backbone draws by itself, for messages; None where that is not known.

    Reads the files for their fingerprint. Raises ConfigError for options or files that are wrong and for leaks, naming `where`.
    """
    options = _complete({"name": "emoji", **written}, where, resolution, native)
    try:
        if options.get("train") is not None:
            options["train"] = _trainable(options["train"])
        options = _identified(options)
        leaks = _leaks(options)
        refused = trained_on(options).get("leaks", "refuse") == "refuse"
        require(not (leaks and refused), f"data: {len(leaks)} training pairs leak into the '{options['split']}' pairs that are "
                f"sampled and compared with: {next(iter(leaks.values()), '')}. Take them out of one, write `leaks: drop` to "
                "leave them out of training, or reference_share: 1 where nothing is trained")
    except ConfigError as error:
        raise ConfigError(f"{where}{str(error).removeprefix('data')}") from None
    return options


def _complete(written: Mapping[str, Any], where: str, resolution: int | None,
              native: Callable[[], int | None]) -> dict[str, Any]:
    """Defaults filled in, of the data set to train on too."""
    options = dict(written)
    name = options.pop("name", None)
    require(isinstance(name, str), f"{where}: a data set needs a name, such as {{name: folder, path: ...}}; got {show(written)}")
    options = {"name": name, **dataclasses.asdict(DATASETS.config(name, options, where))}
    if "resolution" in options and DATASETS.build(name, _without(options), where).has_images:
        options["resolution"] = options["resolution"] or resolution
        if options["resolution"] is None:
            drawn = native() or "its pixels a side, 64 for the embedded models"
            raise ConfigError(f"{where}.resolution is missing: real images are brought to the size that the backbone draws; "
                              f"write resolution: {drawn}, or say it in backbone.resolution")
    if options.get("train") is not None:
        share = {"reference_share": 0.0} if options["train"].get("name") not in ("emoji", "prompts") else {}
        options["train"] = _complete({**share, **options["train"]}, f"{where}.train", options.get("resolution") or resolution,
                                     native)
    return options


def _without(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "name"}


def _trainable(options: dict[str, Any]) -> dict[str, Any]:
    require(options.get("train") is None, "data.train.train: a data set to train on has no other to train on; remove it")
    require(has_images(options), f"data.train: '{options['name']}' has no images to train on; name another data set")
    return _identified(options)


def _identified(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "fingerprint": opened(options).fingerprint}


def _leaks(options: Mapping[str, Any]) -> dict[str, str]:
    """{id: why} of training pairs that are in the split of evaluation too."""
    source = trained_on(options)
    if source is options and (options["split"] == "train" or "leaks" not in options):
        return {}  # evaluation on 'train' is refused where something is trained; the embedded set is what it is
    return leaked(opened(source).contents("train"), opened(options).contents(options["split"]))
