"""The step caches that diffusers ships, as diffusers runs them.

taylorseer: attention and feed-forward outputs are forecast between computed steps (Liu et al. 2025, arXiv:2503.06923).
pyramid_attention: attention outputs are used again (PAB, Zhao et al. 2024, arXiv:2408.12588).
fastercache: attention outputs are extrapolated (Lv et al. 2024, arXiv:2410.19355); its reuse of the unconditional half has no
place in a model with distilled guidance. magcache: whole steps are left out while an error estimate allows (Ma et al. 2025,
arXiv:2506.09045), from ratios that belong to a checkpoint and its schedule.
Differs from diffusers: nothing; the cache is emptied before each batch of images. Left out: its first-block cache and SeaCache,
which decide once for a whole batch, so that an image would depend on its neighbours; `first_block_cache` decides by image.
Only transformers with diffusers' cache mixin: of the backbones here, Flux. Its single blocks count as computed when their
feed-forward ran, also where their attention was not.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffusers import FasterCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.cache_utils import CacheMixin

from harness.api import METHODS, Call, Method, Run, require


@METHODS.register("diffusers_cache")
class DiffusersCache(Method):
    """One of diffusers' caches, switched on while the method is attached."""

    sites = frozenset()
    knob = None
    hooks_model = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": {"kind": "taylorseer", "interval": 5, "first_steps": 3}}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """interval: of the computed steps, for all kinds but magcache; 1 computes every step. first_steps: computed in any case,
        for taylorseer; of pyramid_attention and fastercache, the noise levels `range` (low, high), in (0, 1), outside which all
        is computed. threshold: magcache's on the estimated error; 0 computes every step.
        """

        kind: Literal["taylorseer", "pyramid_attention", "fastercache", "magcache"] = "taylorseer"
        interval: int = 3
        order: int = 1
        first_steps: int = 3
        range: tuple[float, float] = (0.1, 0.8)
        threshold: float = 0.06
        max_skipped: int = 3
        retention: float = 0.2

        def __post_init__(self) -> None:
            require(self.interval >= 1, f"diffusers_cache.interval must be at least 1, got {self.interval}")
            require(self.order >= 0, f"diffusers_cache.order must not be negative, got {self.order}")
            require(self.first_steps >= 0, f"diffusers_cache.first_steps must not be negative, got {self.first_steps}")
            low, high = self.range
            require(0 <= low < high <= 1, f"diffusers_cache.range must be two rising levels in [0, 1], got {list(self.range)}")
            require(self.threshold >= 0, f"diffusers_cache.threshold must not be negative, got {self.threshold}")
            require(self.max_skipped >= 1, f"diffusers_cache.max_skipped must be at least 1, got {self.max_skipped}")
            require(0 <= self.retention <= 1, f"diffusers_cache.retention must lie in [0, 1], got {self.retention}")

    def begin(self, run: Run) -> None:
        """Take the schedule: some caches ask for the timestep."""
        self._timesteps, self._step, self._attached = run.timesteps, 0, None

    def attach(self, transformer: Any) -> None:
        """Switch the cache on. ConfigError where diffusers has none for this transformer."""
        require(isinstance(transformer, CacheMixin),
                f"method 'diffusers_cache': diffusers gives {type(transformer).__name__} no cache (no CacheMixin); use "
                "taylor_forecast or first_block_cache on this backbone")
        self._attached, self._context = transformer, ExitStack()
        if not self._computes_all:
            transformer.enable_cache(self._cache())

    def detach(self) -> None:
        """Switch it off and forget the model."""
        self._context.close()
        if self._attached.is_cache_enabled:
            self._attached.disable_cache()
        for module in self._attached.modules():  # the hooks leave the class's own forward on each module they were on
            vars(module).pop("forward", None)
            vars(module).pop("_diffusers_hook", None)
        self._attached = None

    @property
    def _computes_all(self) -> bool:
        return self.config.threshold == 0 if self.config.kind == "magcache" else self.config.interval == 1

    def _cache(self) -> Any:
        options = self.config
        levels = tuple(round(1000 * level) for level in options.range)

        def timestep() -> int:
            return round(1000 * self._timesteps[self._step])

        if options.kind == "taylorseer":
            return TaylorSeerCacheConfig(cache_interval=options.interval, disable_cache_before_step=options.first_steps,
                                         max_order=options.order)
        if options.kind == "magcache":
            return MagCacheConfig(threshold=options.threshold, max_skip_steps=options.max_skipped,
                                  retention_ratio=options.retention, num_inference_steps=len(self._timesteps),
                                  mag_ratios=FLUX_MAG_RATIOS)
        if options.kind == "pyramid_attention":
            return PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=options.interval, spatial_attention_timestep_skip_range=levels,
                spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
                current_timestep_callback=timestep)
        return FasterCacheConfig(
            spatial_attention_block_skip_range=options.interval, spatial_attention_timestep_skip_range=levels,
            spatial_attention_block_identifiers=(r"transformer_blocks.*attn", r"single_transformer_blocks.*attn"),
            attention_weight_callback=lambda module: 0.5, current_timestep_callback=timestep, is_guidance_distilled=True)

    def reset(self) -> None:
        """Empty the cache: a batch of images begins."""
        if self._attached is not None and self._attached.is_cache_enabled:
            self._context.close()
            self._attached._reset_stateful_cache()
            self._context.enter_context(self._attached.cache_context("cond"))

    def before(self, call: Call) -> None:
        """The next call's step."""
        self._step = call.step
