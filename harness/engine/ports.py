"""How image tokens enter and leave the modules of a transformer family: names and positions of arguments, nothing else.

Facts per family are in the backbone files; the mechanism that uses them is `harness/engine/injection.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from harness.api import SiteKind


@dataclass(frozen=True)
class ModulePort:
    """image: name of the argument with the image tokens (B, N, D), at `position` when the module is called positionally.

    output: where the image tokens sit in the result tuple; None when the result is the tensor itself.
    text: name of the argument with the text tokens, which a block that computes nothing hands on; None without a text stream.
    rotary: argument holding (cos, sin) tables whose rows are text tokens first, then image tokens; None without rotary.
    """

    image: str
    position: int
    output: int | None
    rotary: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class BlockView:
    """One transformer block and the submodules at which a method may act: name -> (kind, port)."""

    block: nn.Module
    port: ModulePort
    branches: dict[str, tuple[SiteKind, ModulePort]] = field(default_factory=dict)


@dataclass(frozen=True)
class Port:
    """blocks: the routed blocks of a transformer in order of execution.

    time_embedder: submodule whose output (B, D) embeds the timestep before the first block; where there is none, a function that
    computes it. pooled_prompt: the pooled prompt (B, P). Functions are given the transformer and its keyword arguments, and are
    asked only by methods that read what they compute.
    """

    blocks: Callable[[nn.Module], list[BlockView]]
    time_embedder: str | Callable[[nn.Module, dict[str, Any]], Tensor]
    pooled_prompt: Callable[[nn.Module, dict[str, Any]], Tensor]
