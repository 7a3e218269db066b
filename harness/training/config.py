"""The options of a training, as a sweep file writes them under `train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from harness.api import require


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """steps: optimiser steps over all stages. warmup_steps: linear warm-up of each stage, then a cosine to a tenth.

    batch_size: rows of a step over all processes. timesteps: a draw from each slice of the noise levels (Eq. 15), or
    independent ones. strata: slices of stages whose batches share one timestep, taken in turn over successive batches.
    adapter: what trains on the backbone in the stages that allow it, on all linear layers of attention and feed-forward.
    caption_drop: share of captions replaced by the empty prompt. distill_every: blocks between feature taps; distill_weight 0
    leaves the distillation out. precision: of the forward pass; trained parameters are float32. gradient_checkpointing:
    recompute each block in the backward pass, the selection apart: less memory, a forward pass more.
    validate_every: steps between points of the validation curve, 0 for none; then `validation_images` images are kept out of
    the training. checkpoint_every: steps between checkpoints, from which a killed training goes on; 0 for none.
    seed: initialisation, data order, noise: the training seed.
    """

    steps: int = 240
    batch_size: int = 8
    warmup_steps: int = 20
    timesteps: Literal["stratified", "uniform"] = "stratified"
    strata: int = 16
    adapter: Literal["dora", "lora", "none"] = "dora"
    adapter_rank: int = 32
    adapter_lr: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    caption_drop: float = 0.1
    distill_every: int = 4
    distill_weight: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    validate_every: int = 0
    validation_images: int = 64
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch_size": 1, "adapter_rank": 1, "distill_every": 1, "strata": 1,
                            "validation_images": 1, "validate_every": 0, "checkpoint_every": 0}.items():
            require(getattr(self, name) >= least, f"train.{name} must be at least {least}, got {getattr(self, name)}")
        require(0 <= self.caption_drop < 1, f"train.caption_drop must lie in [0, 1), got {self.caption_drop}")
        require(self.distill_weight >= 0, f"train.distill_weight must not be negative, got {self.distill_weight}")
        require(not self.validate_every or self.validation_images % self.batch_size == 0,
                f"train.validation_images: {self.validation_images} is not a multiple of batch_size {self.batch_size}, so the "
                "last batch would count for more than the others")

    @property
    def num_held_out(self) -> int:
        """Images that are kept out of the training."""
        return self.validation_images if self.validate_every else 0

    def shaping(self) -> dict[str, Any]:
        """The options that shape what a stage learns and records; number of steps and adapters apart, which vary by stage."""
        options = asdict(self)
        for name in ("steps", "adapter", "adapter_rank", "adapter_lr", "checkpoint_every"):
            options.pop(name)
        if not self.validate_every:
            options.pop("validation_images")
        return options

    def adapting(self) -> dict[str, Any]:
        """The options of the adapters."""
        return {"adapter": self.adapter, "adapter_rank": self.adapter_rank, "adapter_lr": self.adapter_lr}
