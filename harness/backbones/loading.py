"""Loading a diffusers pipeline: from the package, a folder or the hub; its weights checked, and its identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from harness.api import ConfigError, NotHere, require
from harness.backbones.model_folder import check_folder, check_source
from harness.backbones.shapes import SHAPE_ONLY, ShapesOnly
from harness.backbones.sketch import check_kind, sketched
from harness.storage import fingerprints
from harness.storage.fingerprints import cached_commit

META = "meta"
"""torch's device of shapes without values: what is loaded there is a sketch."""
EMBEDDED = "embedded"
"""The value of `backbone.weights` that asks for the small model in this package."""
EMBEDDED_RESOLUTION, EMBEDDED_TEXT_LENGTH, EMBEDDED_STEPS, EMBEDDED_GUIDANCE = 64, 16, 20, 2.0
"""What the embedded models are made for; their READMEs state it."""


def check_device(device: str) -> None:
    """ConfigError for what is no device of torch's, or a CUDA device that is not there."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"backbone.device: '{device}' is no device that torch knows; write cpu, cuda, or cuda:1") from None
    if found.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise NotHere(f"backbone.device: '{device}' asked for, but torch sees no CUDA device; write device: cpu, or run it where "
                      "there is one")
    if (found.index or 0) >= torch.cuda.device_count():
        raise NotHere(f"backbone.device: '{device}' asked for, but torch sees {torch.cuda.device_count()} CUDA devices, from "
                      "cuda:0 on; write one of them")


def load(config: Any, kinds: tuple[type[DiffusionPipeline], ...], family: str = "") -> Any:
    """The pipeline of a backbone's options weights, architecture, dtype and device; of one of `kinds`, or ConfigError.

    On the meta device it is made of its configs alone. family: whose small model on emoji is meant by weights 'embedded'.
    """
    check_device(config.device)
    dtype = getattr(torch, config.dtype)
    if config.weights == SHAPE_ONLY:
        return ShapesOnly(config.architecture, config.device, dtype)
    source = source_of(config.weights, family)
    if config.weights == EMBEDDED:
        require((Path(source) / "model_index.json").exists(), f"backbone.weights: there is no embedded model at {source}; "
                "reinstall the package, or take a hub id or a local folder")
    else:
        check_source(config.weights)
    if Path(source).exists():
        check_folder(config.weights, Path(source), kinds)
    if config.device == META and not config.offload:
        return sketched(config.weights, Path(source), kinds)
    pipe = _loaded(config.weights, source, dtype)
    pipe.content = fingerprints.fingerprint([source])  # tokenizers, class names and the like are no tensors
    check_kind(config.weights, type(pipe), kinds, type(pipe).__name__)
    if config.offload:
        pipe.transformer.to(config.device)
    else:
        pipe.to(config.device)
    check_weights(pipe, config.weights)
    return pipe


def _loaded(weights: str, source: Path | str, dtype: torch.dtype) -> Any:
    """The pipeline at a folder or at the hub."""
    try:
        return DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype, revision=cached_commit(str(source)),
                                                 **_absent_parts(Path(source)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"backbone.weights: '{weights}' cannot be loaded ({type(error).__name__}: {reason}); check the path "
                          "or the hub id, or save the pipeline there again, with safe_serialization=True") from error


def check_weights(pipe: Any, weights: str) -> None:
    """ConfigError for a weight that is NaN or infinite, named with its part; one sum each, read together."""
    named = [(f"{name}.{key}", value) for name, part in pipe.components.items() if isinstance(part, nn.Module)
             for key, value in part.state_dict().items() if value.is_floating_point() and value.device.type != "meta"]
    sums: dict[torch.device, list[Tensor]] = {}
    for _, value in named:
        sums.setdefault(value.device, []).append(value.sum(dtype=torch.float32))
    if all(bool(torch.stack(group).isfinite().all()) for group in sums.values()):
        return
    broken = [name for name, value in named if not bool(value.isfinite().all())]
    require(not broken, f"backbone.weights: '{weights}': {broken[0] if broken else ''} holds NaN or infinity, as do "
            f"{len(broken) - 1} more of {len(named)} tensors; the file is damaged, its training diverged, or backbone.dtype is "
            "too coarse for it: take a sound copy, or another dtype")


def source_of(weights: str, family: str) -> Path | str:
    """The folder that `weights` names: the embedded model's or a local one; else the hub id as it is."""
    if weights == EMBEDDED:
        return Path(__file__).parent.parent / "embedded" / f"emoji_{family}"
    return Path(weights) if Path(weights).exists() else weights


def _absent_parts(folder: Path) -> dict[str, None]:
    """Parts that a local pipeline was saved without (such as T5): diffusers loads such a folder only when told so."""
    index = folder / "model_index.json"
    if not index.exists():
        return {}
    parts = json.loads(index.read_text(encoding="utf-8"))
    return {name: None for name, value in parts.items() if value == [None, None]}


def fingerprint(pipe: Any, facts: str) -> str:
    """sha256 over every weight and config of a pipeline, its files, and `facts`, such as the dtype; 16 hex digits.

    Random weights are named and not read: they follow from their architecture, and some are tens of gigabytes.
    """
    digest = hashlib.sha256(f"{facts} {getattr(pipe, 'content', '')}".encode())
    named = isinstance(pipe, ShapesOnly)
    if named:
        digest.update(pipe.identity.encode())
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and not named:
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
            # private entries are the loader's own: the folder's path, and a list in an order that differs by process
            public = sorted((key, value) for key, value in config.items() if not key.startswith("_"))
            digest.update(f"{name} {public}".encode())
            for key, value in sorted(part.state_dict().items()):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(str(sorted(item for item in pipe.scheduler.config.items() if not item[0].startswith("_"))).encode())
    return digest.hexdigest()[:16]
