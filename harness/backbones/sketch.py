"""A diffusers pipeline from its configs alone: shapes, schedule and tokenizer length on the meta device, without a weight.

What can be refused of a model is refused on it, so that nobody waits for 24 GB to hear of a wrong scheduler.
"""

from __future__ import annotations

import inspect
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from harness.api import ConfigError, NotHere, require
from harness.backbones.model_folder import INDEX

TIMEOUT_S = 5.0
"""Of each question to the hub."""


def sketched(weights: str, source: Path, kinds: tuple[type[DiffusionPipeline], ...]) -> Any:
    """The pipeline at the folder `source`, or at the hub under the id `weights`, of one of `kinds`; its text parts are missing.

    Raises ConfigError where loading it would fail for what its files say, NotHere where there are none to read.
    """
    index = _json(weights, source, INDEX)
    require(index is not None, f"backbone.weights: '{weights}' holds no {INDEX}, so it is no pipeline; name the folder that "
            "save_pretrained wrote, or the hub id of a diffusers pipeline")
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    check_kind(weights, kind, kinds, str(index.get("_class_name")))
    parts = {name: _part(weights, source, name, value) for name, value in index.items() if isinstance(value, list)}
    missing = [name for name in ("transformer", "scheduler", "vae") if parts.get(name) is None]
    require(not missing, f"backbone.weights: '{weights}' has no {' and no '.join(missing)}; save the whole pipeline there")
    taken = set(inspect.signature(kind.__init__).parameters)
    facts = {key: value for key, value in index.items() if not isinstance(value, list) and key in taken}
    with _quiet():
        pipe = kind(**{name: part for name, part in {**dict.fromkeys(taken & index.keys()), **parts, **facts}.items()
                       if name in taken})
    if "tokenizer" in index:
        vars(pipe)["tokenizer"] = _tokenizer(weights, source, index["tokenizer"])
    return pipe


def check_kind(weights: str, kind: type | None, kinds: tuple[type[DiffusionPipeline], ...], name: str) -> None:
    """ConfigError unless the class of a pipeline is one that the backbone runs."""
    require(isinstance(kind, type) and issubclass(kind, kinds), f"backbone.weights: '{weights}' is a {name}, and this backbone "
            f"runs {' or '.join(one.__name__ for one in kinds)}; take the backbone of its family")


def _part(weights: str, source: Path, name: str, value: list[Any]) -> Any:
    """A scheduler, or a module on the meta device; None for the parts that a sketch does without."""
    if value[0] != "diffusers" or name not in ("transformer", "scheduler", "vae"):
        return None
    kind = getattr(diffusers, str(value[1]), None)
    require(isinstance(kind, type), f"backbone.weights: the {name} of '{weights}' is a {value[1]}, which the installed diffusers "
            f"{diffusers.__version__} does not know; save the pipeline with another, or install a diffusers that has it")
    file = "scheduler/scheduler_config.json" if name == "scheduler" else f"{name}/config.json"
    config = _json(weights, source, file)
    require(config is not None, f"backbone.weights: '{weights}' has no {file}; save the pipeline there again")
    try:
        with torch.device("cpu" if name == "scheduler" else "meta"), _quiet():
            made = kind.from_config(config)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"backbone.weights: {file} of '{weights}' describes no {value[1]} ({error}); save the pipeline there "
                          "again") from None
    return made.eval() if isinstance(made, nn.Module) else made


def _tokenizer(weights: str, source: Path, value: Any) -> SimpleNamespace | None:
    """What is asked of it: its length."""
    if not isinstance(value, list) or value[0] is None:
        return None
    config = _json(weights, source, "tokenizer/tokenizer_config.json") or {}
    return SimpleNamespace(model_max_length=int(config.get("model_max_length", 77)))


def _json(weights: str, source: Path, name: str) -> dict[str, Any] | None:
    """A file of the pipeline; None where it has no such file."""
    if source.exists():
        return _read(weights, source / name) if (source / name).is_file() else None
    path = _fetched(weights, name)
    return None if path is None else _read(weights, path)


def _read(weights: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone.weights: {path.name} of '{weights}' cannot be read ({error}); fetch or save the pipeline "
                          "again") from None
    require(isinstance(found, dict), f"backbone.weights: {path.name} of '{weights}' is no JSON object; fetch or save it again")
    return found


def _fetched(weights: str, name: str) -> Path | None:
    """A small file of the hub, from its cache or fetched into it; None where the model has no such file."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    known = try_to_load_from_cache(weights, name)
    if isinstance(known, str):
        return Path(known)
    try:
        _ask(f"{weights}/resolve/main/{name}")
        return Path(hf_hub_download(weights, name, etag_timeout=TIMEOUT_S))
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, and means that nobody answered
        raise _not_here(weights, error) from None
    except (EntryNotFoundError, FileNotFoundError):
        return None
    except (HfHubHTTPError, OSError) as error:
        raise _not_here(weights, error) from None


def _ask(file: str) -> None:
    """Whether the hub has a file that we may read: its client would try for half a minute where nobody answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    request = urllib.request.Request(f"{constants.ENDPOINT}/{file}", method="HEAD", headers=build_hf_headers())
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code == 404 and not file.endswith(INDEX):
            raise FileNotFoundError(file) from None
        raise


def _not_here(weights: str, error: Exception) -> NotHere:
    reason = str(getattr(error, "reason", None) or error).splitlines()[0]
    return NotHere(f"backbone.weights: '{weights}' is no folder under {Path.cwd()}, it is not in the hub's cache, and the hub "
                   f"does not give it ({reason}); correct the path or the id, log in where it is gated, or fetch it first")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks on parts that are missing here on purpose."""
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(before)
