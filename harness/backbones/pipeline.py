"""What the backbones that are diffusers pipelines share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from harness.api import require


def check_device(device: str) -> None:
    """ConfigError where a CUDA device is asked for and there is none."""
    require(device == "cpu" or torch.cuda.is_available() or not device.startswith("cuda"),
            f"backbone.device: '{device}' asked for, but torch sees no CUDA device")


def freeze(pipe: Any) -> None:
    """No progress bar, no dropout, no gradients."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def fingerprint(components: Mapping[str, Any], scheduler: Any, facts: str) -> str:
    """sha256 over every weight and config of a pipeline and `facts`, such as the dtype; 16 hex digits."""
    digest = hashlib.sha256(facts.encode())
    for name, part in sorted(components.items()):
        if isinstance(part, nn.Module):
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
            # private entries are the loader's own: the folder's path, and a list in an order that differs by process
            public = sorted((key, value) for key, value in config.items() if not key.startswith("_"))
            digest.update(f"{name} {public}".encode())
            for key, value in sorted(part.state_dict().items()):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(str(sorted(item for item in scheduler.config.items() if not item[0].startswith("_"))).encode())
    return digest.hexdigest()[:16]
