"""What a method is: the class of every file in `methods/`, and what a trained one has besides."""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.api.registry import ConfigError, sources_of
from harness.api.sites import Call, Reduction, Run, Site

if typing.TYPE_CHECKING:  # names only: reading a sweep or a report must not cost an import of torch
    import torch
    from torch import Tensor


class Method:
    """Decides which tokens are computed. Contains no block, no sampler and no loop over steps.

    A subclass is one file in `methods/`: a frozen `Config`, `reduce`, and the registration. `sites` says where it is asked.
    Life: `begin(run)` once before sampling, `reset()` before each batch of images, `reduce` at each site, `observe` after each
    step. State that a method carries between steps is dropped in `reset`.

    What a class may declare is listed below, and in `TrainableMethod` for those with parameters. All else that is public in a
    subclass must be a function: registration refuses other attributes, so that a misspelt one is not silently ignored.
    """

    # ------------------------------------------------------------------------------------------ what a class declares

    name: ClassVar[str]
    """Given by the registration."""
    sites: frozenset[str] = frozenset({"block"})
    """Kinds of site at which `reduce` is asked: 'block', 'attention', 'ffn'. Set on the instance where options decide."""
    knob: ClassVar[str | None] = "keep_ratio"
    """The Config field that a compute budget may solve for; None when there is nothing to turn."""
    trainable: ClassVar[bool] = False
    """Whether it must be trained: of a `TrainableMethod`."""
    dynamic: ClassVar[bool] = False
    """Which steps are computed depends on values: each image notes its own in `patterns`, and FLOPs are counted from them."""
    hooks_model: ClassVar[bool] = False
    """It acts through another library's hooks on the transformer, with `attach` and `detach`; what the modules then really run is
    watched from inside them."""
    uncounted: ClassVar[str] = ""
    """What the FLOPs of this method leave out, for controls whose scores are meant to cost nothing; printed beside its row. Where
    it is empty, the dense passes of plans that ask for one (`Reduction.wants_dense`) are the method's own cost."""
    of_depth: ClassVar[tuple[str, ...]] = ()
    """Config fields that tell the backbone's blocks by number, and where None fits any depth."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named options: 'official' (the authors' own defaults), 'table1' (what reproduces the rows of Shiva-DiT's Table 1)."""

    @dataclass(frozen=True)
    class Config:
        """No options."""

    # ------------------------------------------------------------------------------------------ state of a dynamic method

    patterns: Mapping[int, tuple[bool, ...]] = {}
    """Of a dynamic method, seed -> which steps were computed, of the images sampled since `begin`."""
    pattern: tuple[bool, ...] | None = None
    """Set on a copy of a dynamic method that shall follow it instead of deciding, so that it can be counted without values."""

    # ------------------------------------------------------------------------------------------ hooks

    @classmethod
    def sources(cls, config: Any) -> Sequence[Any]:
        """Files and folders that the options name: what is in them becomes part of the trial. See `Backbone.sources`."""
        return sources_of(config)

    def __init__(self, config: Any) -> None:
        super().__init__()  # nn.Module's, of one with parameters
        self.config = config

    @property
    def num_parameters(self) -> int:
        """Parameters that it adds to the backbone's, once `begin` has built them: all of its own where it is an `nn.Module`.

        Routers, policies, gates, trained or not. Adapters are merged and add none.
        """
        import torch

        return sum(parameter.numel() for parameter in self.parameters()) if isinstance(self, torch.nn.Module) else 0

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
    """What `harness.training.train` asks of a method with parameters, which never owns the loop.

    Written `class Name(TrainableMethod, nn.Module)`. Needed are `stages` and `start_stage`; `build` where it has parameters of
    its own, `tabulate` where what is computed at each step follows from them, `fit_budget` where that table can be moved to meet
    a budget. In training, `site.call.training` is set, rows carry fresh seeds, and `teacher_features` is filled.
    """

    # ------------------------------------------------------------------------------------------ what a class declares

    trainable = True
    stages: ClassVar[tuple[Stage, ...]]
    """The stages of the training, in order."""
    needs_adapters: ClassVar[bool] = False
    """Whether it has nothing to train but the backbone's adapters."""
    needs_teacher: bool = True
    """Whether `teacher_features` is read. Where it is not and nothing is distilled, the dense model does not run."""
    distils: bool = True
    """Whether the protocol's distillation (`train.distill_weight`) is part of the objective; an official one may have none."""
    num_passes: int = 1
    """Forward passes of the routed model per step; the diffusion losses of all are added."""

    # ------------------------------------------------------------------------------------------ state, kept for it

    run: Run | None = None
    """The run that was begun last."""
    fitted: dict[str, Any] | None = None
    """What `fit_budget` found; `tabulate` follows it."""
    teacher_features: list[tuple[Tensor, Tensor]]
    """The frozen dense model's (input, output) image tokens (B, N, D) of every block for this batch of the training."""
    rank: int = 0
    num_ranks: int = 1
    """Processes of the training and this one's place: its rows of a step are the `rank`-th equal part of the global batch.
    `generator` draws alike in all of them, so draws per row are made for the global batch and this part of them is used."""

    # ------------------------------------------------------------------------------------------ hooks of a run

    def begin(self, run: Run) -> None:
        """Build the parameters at the first call, tabulate at each. Raises ConfigError for a backbone of another shape.

        A method that does not suit every backbone refuses, and then calls this one.
        """
        if self.run is None:
            self.build(run)
            self.settle(run)
        elif (run.num_blocks, run.width) != (self.run.num_blocks, self.run.width):
            raise ConfigError(f"{self.name} was trained for {self.run.num_blocks} blocks of width {self.run.width}, not for "
                              f"{run.num_blocks} of {run.width}")
        self.run = run
        module = typing.cast("torch.nn.Module", self)
        if not any(weight.is_meta for weight in (*module.parameters(), *module.buffers())):
            self.tabulate()

    def build(self, run: Run) -> None:
        """Make the parameters, for the shape of this run's backbone."""

    def settle(self, run: Run) -> None:
        """Put what `build` has made on the run's device, in float32 whatever torch's default is: scores are taken in
        float32 so that ties of a coarser format do not decide which tokens are kept, and small updates are not lost.
        """
        import torch

        self.to(run.device if run.device != "meta" else "cpu", torch.float32)

    def tabulate(self) -> None:
        """What each step of the schedule of `run` computes, from the parameters and from `fitted` where a budget was fitted.

        Not asked of a counting twin, whose parameters have no values: it keeps the table that it was copied with.
        """

    def fit_budget(self, cut: Callable[[], float], flops_cut: float) -> dict[str, Any] | None:
        """Once it is trained: what, handed to `load_fit`, brings `cut()` nearest to `flops_cut`; a JSON-able dictionary.

        `cut()` counts the fraction of FLOPs that the method saves as it stands, on a copy that is begun anew. None: training
        moved nothing, and the knob that was solved before it still meets the budget.
        """
        return None

    def load_fit(self, fitted: dict[str, Any]) -> None:
        """Take over what `fit_budget` returned for an equal method; runs that are begun later keep it."""
        self.fitted = fitted
        self.tabulate()

    # ------------------------------------------------------------------------------------------ hooks of the training

    def stage_key(self, stage: str) -> dict[str, Any]:
        """Options that shape the result of `stage`, by default all: stages with equal keys (and equal past) are trained once and
        shared.
        """
        return dict(vars(self.config))

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
