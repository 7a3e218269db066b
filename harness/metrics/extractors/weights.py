"""Weights of the fidelity metrics: a file or folder that is checked before anything runs, or a fetch that fails soon.

Nothing is fetched where the weights are given or already in the caches of torch hub and of the Hugging Face hub. A fetch that
fails makes the metric unavailable; a file that is not what it should be is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from harness.api import ConfigError, Unavailable, require
from harness.storage.fingerprints import file_hashes

TIMEOUT_S = 5.0
"""Of connecting and of each wait for data: without a network a metric must fail in seconds."""
HUB_FILES = ("*.json", "*.txt", "*.safetensors")
_failed: dict[str, str] = {}
"""What could not be fetched by this process, and why: not tried again for each trial."""


# ---------------------------------------------------------------------------------------------- files


def check_file(where: str, written: str) -> Path:
    """The file `written` names; ConfigError naming the option `where` when there is none."""
    path = Path(written).expanduser()
    require(path.is_file(), f"{where}: there is no file '{written}'; correct the path, or leave the option out to have the "
            "weights fetched once")
    return path


def state_dict(where: str, path: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of `expected` (name -> shape) in a file that torch.save wrote; ConfigError when one is missing or other."""
    try:
        # files of before 2020 are no archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, UnpicklingError, EOFError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: '{path}' is no state dict that torch.save wrote ({type(error).__name__}); give the "
                          "published file") from None
    require(isinstance(state, dict), f"{where}: '{path}' holds a {type(state).__name__}, not a state dict")
    for name, shape in expected.items():
        require(isinstance(state.get(name), Tensor), f"{where}: '{path}' has no tensor '{name}'; it is of another network")
        require(state[name].shape == shape, f"{where}: in '{path}' {name} is {tuple(state[name].shape)}, but this network has "
                f"{tuple(shape)}")
    return {name: state[name] for name in expected}


def file_id(*paths: Path, recipe: str = "") -> str:
    """12 hex digits over the content of files and a recipe: what features and scores are keyed by."""
    digest = hashlib.sha256(recipe.encode())
    for path in paths:
        digest.update(file_hashes([path])[0].encode())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------- models of transformers


def check_model(where: str, written: str, kind: str) -> None:
    """ConfigError unless `written` is a folder with a model of `kind` ('clip', 'dinov2'), or may be an id on the hub."""
    path = Path(written).expanduser()
    if not path.exists():
        looks_local = written.startswith(("/", ".", "~")) or written.count("/") != 1
        require(not looks_local, f"{where}: there is no folder '{written}'; give a folder that save_pretrained wrote, or an id "
                "of the Hugging Face hub such as owner/name")
        return
    config = path / "config.json"
    require(config.is_file(), f"{where}: '{written}' holds no config.json; give a folder that save_pretrained wrote")
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        found = None
    require(found == kind, f"{where}: '{written}' holds a model of type {found!r}; this metric needs '{kind}'")
    require(any(path.glob("*.safetensors")), f"{where}: '{written}' holds no *.safetensors; save the model there again")


def model_folder(written: str) -> Path:
    """The folder of a checked model: itself, or the hub's cache, filled once. Raises Unavailable when it cannot be had."""
    path = Path(written).expanduser()
    if path.exists():
        return path
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(written, local_files_only=True))
        if (cached / "config.json").exists() and any(cached.glob("*.safetensors")):
            return cached
    except LocalEntryNotFoundError:
        pass
    with _fetching(written):
        address = f"{constants.ENDPOINT}/{written}/resolve/main/config.json"  # the hub's client would try for half a minute
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S).close()
        try:
            return Path(snapshot_download(written, allow_patterns=list(HUB_FILES), etag_timeout=TIMEOUT_S))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise OSError(str(error).splitlines()[0]) from None


def model_id(folder: Path, recipe: str) -> str:
    """12 hex digits over a model's weights, its settings and vocabulary, and a recipe."""
    return file_id(*sorted(file for pattern in HUB_FILES for file in folder.glob(pattern)), recipe=recipe)


# ---------------------------------------------------------------------------------------------- fetching


def fetched(url: str, sha256_prefix: str = "") -> Path:
    """The file at `url`, from torch hub's cache or fetched into it once. Raises Unavailable when it cannot be fetched.

    A file there with another hash is a ConfigError: without the option `weights` a number is by the published file.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _fetching(path.name):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix or None, progress=False)
    found = file_hashes([path])[0]
    require(found.startswith(sha256_prefix), f"{path}: its sha256 begins with {found[:12]}, that of the published file with "
            f"{sha256_prefix}; remove it, or name it as the metric's weights")
    return path


@contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Fetch under a short time-out; Unavailable when it fails, at once when it failed before in this process."""
    if what in _failed:
        raise Unavailable(_failed[what])
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("HF_HUB_OFFLINE is set")
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: torch hub's word for a file with another hash
        reason = getattr(error, "reason", None) or error
        _failed[what] = f"{what} could not be fetched ({reason})"
        raise Unavailable(_failed[what]) from None
    finally:
        socket.setdefaulttimeout(before)
