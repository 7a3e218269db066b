"""torch.compile of the modules of a transformer, so that other numbers of tokens need no other graphs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from harness.api import require

COMPILE: dict[str, Any] = {"fullgraph": True}
"""Options of torch.compile. fullgraph: what cannot be compiled is an error, not a slower run that looks compiled."""
STATIC_GRAPHS = 1024
_compiled: WeakKeyDictionary[nn.Module, dict[tuple[type, str], Callable[..., Any]]] = WeakKeyDictionary()


def compiled(transformer: nn.Module, kind: type[nn.Module], mode: str) -> Callable[..., Any]:
    """The compiled forward of a class of modules of `transformer`, made once.

    Torch counts graphs, and stops at a limit, per code object: each transformer and class gets one of its own.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_graphs()))
    made = _compiled.setdefault(transformer, {})
    if (kind, mode) not in made:
        forward: Any = kind.forward
        code = forward.__code__.replace(co_name=f"{forward.__code__.co_name}_{kind.__name__}_{len(_compiled)}")
        own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        if mode != "dynamic":
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, STATIC_GRAPHS)
        graphs = {"mode": "reduce-overhead"} if mode == "cuda_graphs" else {}
        runs = torch.compile(own, dynamic=mode == "dynamic", **COMPILE, **graphs)
        made[kind, mode] = _kept(runs) if graphs else runs
    return made[kind, mode]


def _graphs() -> Path:
    """Where compiled code is kept, and run from: not torch's folder in /tmp, whose name others can foretell and occupy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-harness" / "inductor"


def check_graphs(mode: str, device: str, where: str) -> None:
    """ConfigError where CUDA graphs are asked for on another device: torch would run without them and say nothing."""
    require(mode != "cuda_graphs" or device.startswith("cuda"), f"{where}: 'cuda_graphs', but backbone.device is '{device}'; "
            "take device: cuda, or compile: static")


def _kept(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with results of its own: a replayed graph writes into the memory of its last results, and methods keep some."""
    def kept(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, torch.clone, forward(*args, **kwargs))

    return kept
