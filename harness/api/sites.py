"""Tokens at a site: where a method may act, and the plan with which it does."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from harness.api.registry import ConfigError

if typing.TYPE_CHECKING:  # names only: reading a sweep or a report must not cost an import of torch
    import torch
    from torch import Tensor

SiteKind = Literal["block", "attention", "ffn"]


class Reduction:
    """A plan at one site: which tokens the module computes and how the full sequence comes back.

    As it stands it lets everything pass: all tokens, in their order. A plan overrides what it changes, and where it computes
    fewer tokens it says so in `num_tokens` and overrides `reduce` and `restore`.
    Stateless apart from the plan itself, so it can be applied to any tensor of the site (B, N, *).
    """

    num_tokens: int | None = None
    """M, tokens the module computes per row; None: all N that it is given."""
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"block", "attention", "ffn"})
    """Kinds of site at which it can be used; elsewhere the injection refuses it by name."""
    wants_dense: bool = False
    """The module is first run on every token, without gradients, and its result shown to `take_dense`."""

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D). Not asked when `num_tokens` is 0, nor of a plan that the injection takes apart."""
        return hidden_states

    def execute(self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What runs on the reduced tokens: by default the module's own forward. Not asked when `num_tokens` is 0.

        Overridden where the module must run otherwise: narrower, or with keys of its own. Returns what `forward` would.
        """
        return forward(*args, **kwargs)

    @property
    def mean_tokens(self) -> float | None:
        """Tokens computed per row, on average over rows; None: all."""
        return self.num_tokens

    def restore(self, computed: Tensor | None, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D). `computed` is None when `num_tokens` is 0.

        `bypass` (B, N, D) is what a token that was not computed keeps: the block's input at a block site; None at a branch
        site, where the residual is added by the block itself and a missing token contributes zero. Where a branch computes
        nothing at all, so that nothing else tells the shape, it is those zeros.
        """
        return computed

    def take_dense(self, output: Tensor) -> None:
        """output (B, N, D): what the module gives when it computes every token."""

    def positions(self) -> Tensor | None:
        """(M,) or (B, M) index into the site's N tokens of each computed token, for rotary tables; None: all, in their order."""
        if self.num_tokens is None:
            return None
        raise ConfigError(f"{type(self).__name__} has no token positions, so it cannot run on a backbone with rotary positions")


class _Fact:
    """A field of a call that may be set to a function, which is asked when the field is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = f"_{name}"

    def __get__(self, call: Any, owner: type | None = None) -> Any:
        if call is None:  # the field's default
            return None
        value = vars(call)[self._key]
        if callable(value):
            value = vars(call)[self._key] = value()
        return value

    def __set__(self, call: Any, value: Any) -> None:
        vars(call)[self._key] = value


@dataclass
class Call:
    """One call of the transformer, as the sampler or the trainer describes it; nothing here is guessed.

    seeds: (B,) int64, the seed of the image that a row belongs to; both guided halves carry the same seed.
    guidance_halves: 2 when the rows are [unconditional; conditional], else 1.
    time_embedding (B, D) and pooled_prompt (B, P) come from the backbone's own modules before the first block; where that takes
    work which the model itself does not do, it is done when a method first reads them, and is the method's.
    """

    step: int
    timestep: Tensor
    seeds: Tensor
    guidance_halves: int = 1
    training: bool = False
    time_embedding: Tensor | None = _Fact()  # type: ignore[assignment]
    pooled_prompt: Tensor | None = _Fact()  # type: ignore[assignment]


@dataclass
class Site:
    """A place where a method may reduce: one module of one block in one call of the transformer.

    block: index among all blocks. module: the submodule's name in the block ('' for the block itself).
    memory: one dictionary per block and call, shared by the sites of that block, so that a plan made at the attention can be
    reused at the feed-forward. A method that ranks tokens leaves its ranking there as 'scores' (B, N), for metrics to see.
    """

    call: Call
    run: Run
    block: int
    kind: SiteKind
    module: str
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """0-based index of the sampling step; -1 in training."""
        return self.call.step

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens, row-major."""
        return self.run.grid

    def rand(self, num: int) -> Tensor:
        """(B, num) uniform numbers in [0, 1) that depend on (seed, step, block) only, equal in both guided halves."""
        from harness.api.draws import hashed_uniform

        return hashed_uniform(self.call.seeds, self.step, self.block, num)

    def generator(self) -> torch.Generator:
        """A CPU generator that depends on (step, block) only: for patterns that all images of a batch share."""
        import torch

        return torch.Generator().manual_seed((self.step + 1) * 1_000_003 + self.block)


@dataclass(frozen=True)
class Run:
    """What stays fixed over a run, known before sampling starts.

    timesteps: noise level of each sampling step, in (0, 1]. grid: (height, width) in tokens. width: D. pooled_width: P.
    num_heads: of the blocks' attention; 0 where they differ. attention: what an attention site computes, for methods that compute
    it otherwise: 'joint', among image and text tokens; 'rotary', the same with rotary positions, and blocks without such a site;
    'self', among image tokens alone. compile: see `harness.engine.sampler.SamplerConfig`.
    """

    backbone: str
    num_blocks: int
    grid: tuple[int, int]
    width: int
    pooled_width: int
    timesteps: tuple[float, ...]
    guidance_halves: int
    device: str = "cpu"
    num_heads: int = 0
    attention: Literal["joint", "rotary", "self"] = "joint"
    compile: Literal["off", "dynamic", "static", "cuda_graphs"] = "off"

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def num_steps(self) -> int:
        """Steps of the sampling loop."""
        return len(self.timesteps)
