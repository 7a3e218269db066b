"""SDTM with dense steps in between: the authors' demo. See the package for source and deviations."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.api import METHODS, Reduction, Site, require
from harness.engine.tokens import Fold
from methods.sdtm.stages import SDTM


@METHODS.register("sdtm_cache")
class SDTMCache(SDTM):
    """SDTM with dense steps in between, whose branch outputs are blended into what folded tokens get."""

    presets: ClassVar = {"official": {"keep_ratio": 0.7, "delta": 0.2, "multiple": 16}}

    @dataclass(frozen=True, kw_only=True)
    class Config(SDTM.Config):
        """Options of `sdtm`, and: cache_every: steps 0, f, 2f, ... are dense. fresh: weight of what is computed (omega)."""

        cache_every: int = 3
        fresh: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.cache_every >= 2, f"sdtm_cache.cache_every must be at least 2, got {self.cache_every}")
            require(0 <= self.fresh <= 1, f"sdtm_cache.fresh must lie in [0, 1], got {self.fresh}")

    def reset(self) -> None:
        """Nothing is cached yet."""
        super().reset()
        self._cache: dict[Any, Tensor] = {}

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D)."""
        if self.config.keep_ratio == 1:
            return None
        place = (site.block, site.module)
        if site.step % self.config.cache_every == 0:
            return _Record(self._cache, place)
        plan = super().reduce(hidden_states, site)
        if plan is None or place not in self._cache:
            return plan
        return _Blend(plan, self._cache[place], site.memory["busy"], self.config.fresh)


class _Record(Reduction):
    """Computes every token and notes the output."""

    def __init__(self, cache: dict[Any, Tensor], place: Any) -> None:
        self._cache, self._place = cache, place

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        self._cache[self._place] = computed
        return computed


class _Blend(Reduction):
    """A fold whose destinations and folded tokens `busy` (B, N) get fresh * computed + (1 - fresh) * cached."""

    def __init__(self, fold: Fold, cached: Tensor, busy: Tensor, fresh: float) -> None:
        self._fold, self._cached, self.num_tokens = fold, cached, fold.num_tokens
        self._old = ((1 - fresh) * busy).unsqueeze(-1)

    def reduce(self, hidden_states: Tensor) -> Tensor:
        return self._fold.reduce(hidden_states)

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        return torch.lerp(self._fold.restore(computed, bypass), self._cached, self._old.to(computed.dtype))

    def positions(self) -> Tensor:
        return self._fold.positions()
