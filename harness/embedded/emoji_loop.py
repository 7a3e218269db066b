"""The training loop that all stages of the embedded backbone share.

A checkpoint is one file per stage, replaced as a whole, so a kill at any moment leaves the previous one. It
holds weights, averaged weights, optimiser, step, seconds, loss curve and the random state.
"""

import copy
import logging
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from harness.storage.durable import writing

SAVE_EVERY_S = 180
LOG_EVERY_STEPS = 100
WARMUP_STEPS = 200
EMA_EVERY_STEPS = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learning rate: warm-up, constant at `peak`, from the share `decay_from` on linear to `peak * floor`.

    ema_decay: of the averaged weights, per step.
    """

    peak: float
    decay_from: float
    floor: float
    ema_decay: float = 0.999

    def rate(self, step: int, done: float) -> float:
        """The rate of a step (0-based), when the share `done` of the stage in [0, 1] is over."""
        decay = max(0.0, (done - self.decay_from) / (1 - self.decay_from))
        return self.peak * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - (1 - self.floor) * min(1.0, decay))


class ModelTask(Protocol):
    """What a stage supplies: a module, the loss of its next batch, and a picture of what it can do."""

    name: str
    schedule: LearningRate
    module: nn.Module

    def loss(self, step: int) -> Tensor:
        """The loss of a fresh batch, a scalar with a gradient."""

    def begin(self) -> None:
        """Called once, after the weights of an earlier stage were loaded and before the first step."""

    def picture(self, averaged: nn.Module) -> Image.Image:
        """A grid of samples from the averaged weights."""


@dataclass
class Progressed:
    """How far a stage is: steps, seconds, and (step, seconds, mean loss) for every LOG_EVERY_STEPS."""

    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, int, float]] = field(default_factory=list)


class ModelTraining:
    """One stage in training: a task, its optimiser, its averaged weights and its checkpoint file."""

    def __init__(self, task: ModelTask, folder: Path, resume_from: Path | None = None) -> None:
        """Continue from folder/<stage>.pt if it exists, else from the weights of `resume_from` if given."""
        self.task, self.folder = task, folder
        self.path = folder / f"{task.name}.pt"
        self.at = Progressed()
        self.params = [p for p in task.module.parameters() if p.requires_grad]
        self.averaged = copy.deepcopy(task.module).eval().requires_grad_(False)
        both = zip(self.averaged.parameters(), task.module.parameters(), strict=True)
        self.averaged_params = [average for average, p in both if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        if self.path.exists():
            self._load(self.path, whole=True)
        elif resume_from is not None:
            self._load(resume_from, whole=False)
        if not self.at.step:
            task.begin()

    def _load(self, path: Path, *, whole: bool) -> None:
        saved = torch.load(path, weights_only=True)
        self.task.module.load_state_dict(saved["model"])
        self.averaged.load_state_dict(saved["ema"])
        if "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
        if whole:
            torch.set_rng_state(saved["rng"])
            self.at = Progressed(**saved["at"])

    def save(self) -> None:
        """Write the checkpoint and a sample grid, each in one move."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for average, buffer in zip(self.averaged.buffers(), self.task.module.buffers(), strict=True):
            average.copy_(buffer)
        with writing(self.path) as file:
            torch.save({"model": self.task.module.state_dict(), "ema": self.averaged.state_dict(),
                        "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state(), "at": vars(self.at)}, file)
        rng = torch.get_rng_state()
        self.task.picture(self.averaged).save(self.folder / f"{self.task.name}_{self.at.step:06d}.png")
        torch.set_rng_state(rng)

    def _advance(self, done: float) -> float:
        schedule = self.task.schedule
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(self.at.step, done)
        loss = self.task.loss(self.at.step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        if not math.isfinite(norm):
            raise FloatingPointError(f"{self.task.name}: at step {self.at.step + 1} the gradient is {norm:.0f}, the loss "
                                     f"{loss.item():.4f}; the last checkpoint is kept. Where compiled code does it: --no-compile")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at.step += 1
        if self.at.step % EMA_EVERY_STEPS == 0:
            decay = min(schedule.ema_decay, (1 + self.at.step) / (20 + self.at.step)) ** EMA_EVERY_STEPS
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged_params, self.params, 1 - decay)
        return loss.item()

    def _share(self, minutes: float, steps: int | None) -> float:
        by_time = self.at.seconds / (60 * minutes)
        return max(by_time, self.at.step / steps) if steps else by_time

    def run(self, minutes: float, steps: int | None) -> None:
        """Train until the stage has had so many minutes or steps in all, whichever comes first."""
        began = last_save = time.monotonic()
        losses: list[float] = []
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"),
                   TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not os.isatty(1)) as progress:
            bar = progress.add_task(self.task.name, total=1.0, loss="")
            while (done := self._share(minutes, steps)) < 1:
                losses.append(self._advance(done))
                now = time.monotonic()
                self.at.seconds += now - began
                began = now
                if self.at.step % LOG_EVERY_STEPS == 0:
                    self._note(sum(losses) / len(losses))
                    losses.clear()
                    progress.update(bar, loss=f"step {self.at.step}  loss {self.at.curve[-1][2]:.4f}")
                progress.update(bar, completed=done)
                if now - last_save > SAVE_EVERY_S:
                    self.save()
                    last_save = time.monotonic()
        self.save()

    def _note(self, loss: float) -> None:
        self.at.curve.append((self.at.step, round(self.at.seconds), round(loss, 4)))
        log.info("%s step %d, %.0f s, loss %.4f", self.task.name, *self.at.curve[-1])
