"""What a method is: the class of every file in `methods/`, and what a trained one has besides."""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.api.registry import sources_of
from harness.api.sites import Call, Reduction, Run, Site

if typing.TYPE_CHECKING:  # names only: reading a sweep or a report must not cost an import of torch
    import torch
    from torch import Tensor


class Method:
    """Decides which tokens are computed. Contains no block, no sampler and no loop over steps.

    A subclass is one file in `methods/`: a frozen `Config`, `reduce`, and the registration. `sites` says where it is asked.
    Life: `begin(run)` once before sampling, `reset()` before each batch of images, `reduce` at each site, `observe` after each
    step. State that a method carries between steps is dropped in `reset`.
    """

    name: ClassVar[str]
    sites: frozenset[str] = frozenset({"block"})
    knob: ClassVar[str | None] = "keep_ratio"
    """The Config field that a compute budget may solve for; None when there is nothing to turn."""
    trainable: ClassVar[bool] = False
    dynamic: ClassVar[bool] = False
    """Which steps are computed depends on values: each image notes its own in `patterns`, and FLOPs are counted from them."""
    patterns: Mapping[int, tuple[bool, ...]] = {}
    """Of a dynamic method, seed -> which steps were computed, of the images sampled since `begin`."""
    pattern: tuple[bool, ...] | None = None
    """Set on a copy of a dynamic method that shall follow it instead of deciding, so that it can be counted without values."""
    hooks_model: ClassVar[bool] = False
    """It acts through another library's hooks on the transformer, with `attach` and `detach`; what the modules then really run is
    watched from inside them."""
    uncounted: ClassVar[str] = ""
    """What the FLOPs of this method leave out, for controls whose scores are meant to cost nothing; printed beside its row."""
    of_depth: ClassVar[tuple[str, ...]] = ()
    """Config fields that tell the backbone's blocks by number, and where None fits any depth."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named options: 'official' (the authors' own defaults), 'table1' (what reproduces the rows of Shiva-DiT's Table 1)."""

    @classmethod
    def sources(cls, config: Any) -> Sequence[Any]:
        """Files and folders that the options name: what is in them becomes part of the trial. See `Backbone.sources`."""
        return sources_of(config)

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def num_parameters(self) -> int:
        """Parameters that it adds to the backbone's: none, but for a trained one."""
        return 0

    def num_steps(self, asked: int) -> int:
        """Steps of the sampling loop, where the sampler asks for `asked`; other than that only for a method about steps."""
        return asked

    def begin(self, run: Run) -> None:
        """Prepare for a run: build look-up tables, check that the backbone suits. Raises ConfigError where it does not."""

    def reset(self) -> None:
        """Forget everything learned from the previous batch of images."""

    def attach(self, transformer: Any) -> None:
        """Where `hooks_model`: put the hooks on. Raises ConfigError where the transformer does not suit."""

    def detach(self) -> None:
        """Where `hooks_model`: leave the transformer as it was."""

    def before(self, call: Call) -> None:
        """Before each call of the transformer."""

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D), the input of the module at `site`. None computes every token."""
        raise NotImplementedError(f"method '{self.name}' is asked at {site.kind} sites and has no `reduce`")

    def observe(self, call: Call, prediction: Tensor) -> None:
        """After each step: `prediction` (B, C, H, W), both guided halves when there are two."""


@dataclass(frozen=True)
class Stage:
    """One stage of the training of a method.

    share: fraction of the training steps. adapters: the backbone's adapters train too. one_timestep: all rows of a batch share
    their timestep (for methods whose k depends on it); timesteps are then stratified over successive batches.
    """

    name: str
    share: float
    adapters: bool = False
    one_timestep: bool = False


class TrainableMethod(Method, ABC):
    """What `harness.training.train` asks of a method with parameters; the class is an `nn.Module` too and never owns the loop.

    `begin(run)` builds the parameters at its first call. In training, `site.call.training` is set, rows carry fresh seeds, and
    `teacher_features` holds the frozen dense model's (input, output) image tokens (B, N, D) of every block for this batch.
    """

    trainable = True
    stages: ClassVar[tuple[Stage, ...]]
    teacher_features: list[tuple[Tensor, Tensor]]
    needs_adapters: ClassVar[bool] = False
    """Whether it has nothing to train but the backbone's adapters."""
    distils: bool = True
    """Whether the protocol's distillation (`train.distill_weight`) is part of the objective; an official one may have none."""
    num_passes: int = 1
    """Forward passes of the routed model per step; the diffusion losses of all are added."""
    rank: int = 0
    num_ranks: int = 1
    """Processes of the training and this one's place: its rows of a step are the `rank`-th equal part of the global batch.
    `generator` draws alike in all of them, so draws per row are made for the global batch and this part of them is used."""

    @property
    def num_parameters(self) -> int:
        """All of the module's own, once `begin` has built them: routers, policies, gates. Adapters are merged and add none."""
        return sum(parameter.numel() for parameter in typing.cast("torch.nn.Module", self).parameters())

    def settle(self, run: Run) -> None:
        """Put parameters that `begin` has built on the run's device, in float32 whatever torch's default is: scores are taken in
        float32 so that ties of a coarser format do not decide which tokens are kept, and small updates are not lost.
        """
        import torch

        self.to(run.device if run.device != "meta" else "cpu", torch.float32)

    @abstractmethod
    def stage_key(self, stage: str) -> dict[str, Any]:
        """Options that shape the result of `stage`: stages with equal keys (and equal past) are trained once and shared."""

    @abstractmethod
    def start_stage(self, stage: str, generator: torch.Generator) -> list[dict[str, Any]]:
        """Parameter groups (params, lr, name) that train in `stage`. All randomness of the stage comes from `generator`."""

    def start_step(self, progress: float, level: Tensor, validating: bool = False) -> None:
        """Before a step: `progress` of the stage in [0, 1), `level` (B,) noise levels of the batch.

        validating: the step only measures; decide as in training but without noise. Draws and state of such a step are undone.
        """

    def start_pass(self, index: int) -> None:
        """Before forward pass `index` of `num_passes` of a step. Features are distilled, and validation runs, in pass 0."""

    def losses(self) -> dict[str, Tensor]:
        """The method's own loss terms after the forward pass, already weighted. Not asked for when validating."""
        return {}

    @property
    def needs_teacher(self) -> bool:
        """Whether `teacher_features` is read. Where it is not and nothing is distilled, the dense model does not run."""
        return True

    def stage_buffers(self) -> dict[str, Tensor]:
        """Buffers that a stage fills and its result must hold beside the trained parameters, named as in the state dict."""
        return {}

    def training_state(self) -> dict[str, Any]:
        """What a stage carries from step to step besides parameters and buffers, JSON-able, for its checkpoints."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state` returned, after `start_stage`."""

    def synchronise(self, value: Tensor) -> Tensor:
        """Mean of a detached `value` over the processes of a training; the trainer replaces it where there are several."""
        return value
