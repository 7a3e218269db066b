"""The contract between the harness and everything that plugs into it. One sitting to read.

Letters used in every shape of this project: B rows of a batch (with classifier-free guidance both halves of an image are
rows), N image tokens before and M after a reduction, D width, T text tokens, P width of the pooled prompt.
Words: `keep_ratio` is the fraction of tokens *computed*, in (0, 1]; `timestep` is the noise level, 1 = pure noise; `step` is
the 0-based index of the sampling loop; `site` is a place where a method may reduce tokens.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from harness.registry import ConfigError as ConfigError
from harness.registry import Registry
from harness.registry import build_config as build_config
from harness.registry import did_you_mean as did_you_mean
from harness.registry import require as require

if typing.TYPE_CHECKING:  # names only: reading a sweep or a report must not cost an import of torch
    import torch
    from torch import Tensor

SiteKind = Literal["block", "attention", "ffn"]


# ---------------------------------------------------------------------------------------------- tokens at a site


class Reduction:
    """A plan at one site: which tokens the module computes and how the full sequence comes back.

    Stateless apart from the plan itself, so it can be applied to any tensor of the site (B, N, *).
    """

    num_tokens: int
    """M, tokens the module computes per row."""
    wants_dense: bool = False
    """The module is first run on every token, without gradients, and its result shown to `take_dense` (training only)."""

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        raise NotImplementedError

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D).

        `bypass` (B, N, D) is what a token that was not computed keeps: the block's input at a block site; None at a branch
        site, where the residual is added by the block itself and a missing token contributes zero.
        """
        raise NotImplementedError

    def take_dense(self, output: Tensor) -> None:
        """output (B, N, D): what the module gives when it computes every token."""

    def positions(self) -> Tensor:
        """(M,) or (B, M) index into the site's N tokens of each computed token, for rotary tables."""
        raise ConfigError(f"{type(self).__name__} has no token positions, so it cannot run on a backbone with rotary positions")


@dataclass
class Call:
    """One call of the transformer, as the sampler or the trainer describes it; nothing here is guessed.

    seeds: (B,) int64, the seed of the image that a row belongs to; both guided halves carry the same seed.
    guidance_halves: 2 when the rows are [unconditional; conditional], else 1.
    time_embedding (B, D) and pooled_prompt (B, P) are filled by the backbone's own modules before the first block.
    """

    step: int
    timestep: Tensor
    seeds: Tensor
    guidance_halves: int = 1
    training: bool = False
    time_embedding: Tensor | None = None
    pooled_prompt: Tensor | None = None


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
        from harness.tokens import hashed_uniform

        return hashed_uniform(self.call.seeds, self.step, self.block, num)

    def generator(self) -> torch.Generator:
        """A CPU generator that depends on (step, block) only: for patterns that all images of a batch share."""
        import torch

        return torch.Generator().manual_seed((self.step + 1) * 1_000_003 + self.block)


@dataclass(frozen=True)
class Run:
    """What stays fixed over a run, known before sampling starts.

    timesteps: noise level of each sampling step, in (0, 1]. grid: (height, width) in tokens. width: D. pooled_width: P.
    """

    backbone: str
    num_blocks: int
    grid: tuple[int, int]
    width: int
    pooled_width: int
    timesteps: tuple[float, ...]
    guidance_halves: int
    device: str = "cpu"

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def num_steps(self) -> int:
        """Steps of the sampling loop."""
        return len(self.timesteps)


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
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named options: 'official' (the authors' own defaults), 'table1' (what reproduces the rows of Shiva-DiT's Table 1)."""

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def begin(self, run: Run) -> None:
        """Prepare for a run: build look-up tables, check that the backbone suits. Raises ConfigError where it does not."""

    def reset(self) -> None:
        """Forget everything learned from the previous batch of images."""

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """hidden_states: (B, N, D), the input of the module at `site`. None computes every token."""
        raise NotImplementedError

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


class TrainableMethod(Method):
    """What `harness.train` asks of a method with parameters; the class is an `nn.Module` too and never owns the loop.

    `begin(run)` builds the parameters at its first call. In training, `site.call.training` is set, rows carry fresh seeds, and
    `teacher_features` holds the frozen dense model's (input, output) image tokens (B, N, D) of every block for this batch.
    """

    trainable = True
    stages: ClassVar[tuple[Stage, ...]]
    teacher_features: list[tuple[Tensor, Tensor]]
    rank: int = 0
    num_ranks: int = 1
    """Processes of the training and this one's place: its rows of a step are the `rank`-th equal part of the global batch.
    `generator` draws alike in all of them, so draws per row are made for the global batch and this part of them is used."""

    def stage_key(self, stage: str) -> dict[str, Any]:
        """Options that shape the result of `stage`: stages with equal keys (and equal past) are trained once and shared."""
        raise NotImplementedError

    def start_stage(self, stage: str, generator: torch.Generator) -> list[dict[str, Any]]:
        """Parameter groups (params, lr, name) that train in `stage`. All randomness of the stage comes from `generator`."""
        raise NotImplementedError

    def start_step(self, progress: float, level: Tensor, validating: bool = False) -> None:
        """Before a step: `progress` of the stage in [0, 1), `level` (B,) noise levels of the batch.

        validating: the step only measures; decide as in training but without noise. Draws and state of such a step are undone.
        """

    def losses(self) -> dict[str, Tensor]:
        """The method's own loss terms after the forward pass, already weighted. Not asked for when validating."""
        return {}

    @property
    def needs_teacher(self) -> bool:
        """Whether `teacher_features` is read. Where it is not and nothing is distilled, the dense model does not run."""
        return True

    def training_state(self) -> dict[str, Any]:
        """What a stage carries from step to step besides parameters and buffers, JSON-able, for its checkpoints."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state` returned, after `start_stage`."""

    def synchronise(self, value: Tensor) -> Tensor:
        """Mean of a detached `value` over the processes of a training; the trainer replaces it where there are several."""
        return value


class Backbone:
    """A diffusers pipeline seen as parts. Subclasses: `harness/backbones/*.py`.

    transformer: the unmodified diffusers module. scheduler: diffusers scheduler. port: how tokens enter and leave its blocks.
    latent_shape: (C, H, W) of one image. fingerprint: hash of everything that makes its numbers (weights, config, dtype).
    """

    name: ClassVar[str]
    transformer: torch.nn.Module
    scheduler: Any
    port: Any
    latent_shape: tuple[int, int, int]
    fingerprint: str
    default_num_steps: int
    default_guidance_scale: float

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of `prompts`, a row each, keyed as the transformer's arguments."""
        raise NotImplementedError

    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The transformer's prediction (B, C, H, W); `timestep` (B,) in the scheduler's unit."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [0, 1]."""
        raise NotImplementedError

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, H, W) of images (B, 3, height, width) in [0, 1]."""
        raise NotImplementedError

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, timestep in the scheduler's unit, target of the prediction) at noise level (B,) in (0, 1)."""
        raise NotImplementedError

    def with_transformer(self, transformer: torch.nn.Module, fingerprint: str) -> Backbone:
        """The same pipeline around another transformer of the same shape (an adapted copy)."""
        twin = copy.copy(self)
        twin.__dict__.pop("fingerprint", None)
        twin.transformer, twin.fingerprint = transformer, fingerprint
        return twin

    def set_timesteps(self, num_steps: int) -> Tensor:
        """Prepare the scheduler for `num_steps` and return its timesteps (num_steps,), in the scheduler's unit."""
        raise NotImplementedError

    def noise_level(self, timestep: Tensor) -> Tensor:
        """Scheduler unit -> noise level in [0, 1]."""
        raise NotImplementedError

    def run(self, timesteps: Tensor, guidance_halves: int) -> Run:
        """The description handed to `Method.begin`."""
        raise NotImplementedError

    def on_meta(self) -> Backbone:
        """The same architecture without weights on the meta device, for counting."""
        raise NotImplementedError


@dataclass
class Batch:
    """What the sampler yields. indices: position of each image in the trial's list. images: (B, 3, H, W) in [0, 1]."""

    indices: list[int]
    prompts: list[str]
    seeds: list[int]
    images: Tensor
    latents: Tensor


@dataclass
class Subject:
    """A trial as a metric sees it: built, trained, its budget solved, and (in the score job) sampled.

    backbone is the dense model; `student` is the one the method runs on, the same object unless training adapted its weights.
    sampler: harness.sampler.SamplerConfig. meter: harness.flops.Meter of this backbone and sampler.
    images and dense_images: (n, height, width, 3) uint8, the pictures as they are saved, of `seeds` in order; None in the timing
    job, and dense_images is None for the dense trial itself. kept: fraction of image tokens as executed, {'attention' | 'ffn':
    [step][block]}. progress: (stage, done, total). store: harness.store.Store. out_dir: folder of the files that belong to the
    trial.
    """

    trial: Mapping[str, Any]
    backbone: Backbone
    student: Backbone
    method: Method
    sampler: Any
    meter: Any
    prompts: list[str]
    seeds: list[int]
    store: Any
    progress: Callable[[str, int, int], None]
    images: Any = None
    dense_images: Any = None
    kept: dict[str, list[list[float]]] = field(default_factory=dict)
    out_dir: Any = None

    @property
    def is_dense(self) -> bool:
        """Whether this is the reference row itself."""
        return self.method.name == "dense"


class Metric:
    """One file in `harness/metrics/`. Building it checks whatever can be checked before anything is computed."""

    name: ClassVar[str]
    job: ClassVar[Literal["score", "timing"]] = "score"
    """Timing jobs have the machine to themselves; score jobs share it."""
    against_dense: ClassVar[bool] = False
    """Compares with the dense model's images, so it is left out for the dense trial itself."""

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Yield the measured values."""
        raise NotImplementedError


@dataclass(frozen=True)
class Measure:
    """One number with its unit and sample count in the name, its direction, and its uncertainty where it has one.

    interval: (low, high), 95 %. n: how many values stand behind it. per_image: those values, in the order of the trial's images.
    series: (x, value) pairs, as over steps. notes: JSON-able facts that belong to the number, such as a warning.
    artifact: a file that the metric left in `subject.out_dir`, for the report.
    """

    name: str
    value: float
    better: Literal["lower", "higher", "none"]
    interval: tuple[float, float] | None = None
    n: int | None = None
    per_image: tuple[float, ...] | None = None
    series: tuple[tuple[float, float], ...] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    artifact: Any = None


METHODS: Registry[Method] = Registry("method")
BACKBONES: Registry[Backbone] = Registry("backbone")
METRICS: Registry[Metric] = Registry("metric")
