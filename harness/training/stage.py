"""One stage of training: the loop over steps, its losses, its validation curve."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.api import Backbone, Call, Run, Stage, TrainableMethod, require
from harness.engine.adapters import adapter_state, add_adapters
from harness.engine.injection import Injection, attach
from harness.training import losses
from harness.training.batches import Batches, TrainBatch, TrainingSet
from harness.training.checkpoint import StageState
from harness.training.config import TrainConfig
from harness.training.ranks import Ranks

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Predicted:
    """What a step's forward passes gave. dense: the teacher's prediction, None where it did not run.

    predictions: of each pass of the student, (B, C, H, W).
    found, wanted: (input, output) image tokens (B, N, D) of each block of the student and of the teacher, where asked for.
    """

    predictions: list[Tensor]
    dense: Tensor | None
    found: list[tuple[Tensor, Tensor]]
    wanted: list[tuple[Tensor, Tensor]]


class StageTrainer:
    """Trains `method` through one stage; `student` is the backbone as the stages before left it."""

    def __init__(self, teacher: Backbone, student: Backbone, method: TrainableMethod, config: TrainConfig, data: TrainingSet,
                 run: Run) -> None:
        self.teacher, self.student, self.method, self.config, self.data, self.run = teacher, student, method, config, data, run
        self.ranks = Ranks.current()

    @property
    def _distils(self) -> bool:
        return self.method.distils and self.config.distill_weight > 0

    def train(self, stage: Stage, num_steps: int, work: Path, progress: Callable[[int], None],
              until: int | None = None) -> StageState:
        """Train `num_steps` steps, going on from the checkpoint in `work` where there is one.

        until: pause after this many of them, with a checkpoint there; None trains to the end.
        """
        end = num_steps if until is None else min(until, num_steps)
        self.method.rank, self.method.num_ranks = self.ranks.rank, self.ranks.size
        if self.ranks.size > 1:
            self.method.synchronise = self.ranks.mean
        state, parameters = self._begin(stage)
        state.load(work / CHECKPOINT)
        with ExitStack() as stack:
            teach = stack.enter_context(attach(self.teacher, self.method, self.run))
            learn = teach if self.student is self.teacher else stack.enter_context(attach(self.student, self.method, self.run))
            learn.checkpoint_blocks = self.config.gradient_checkpointing
            while state.step < end:
                self._set_rates(state, num_steps)
                points = self._step(stage, state, parameters, state.step / num_steps, (teach, learn))
                if self._is_due(state.step + 1, self.config.validate_every, num_steps):
                    points |= self._validate(state, (state.step + 1) / num_steps, (teach, learn))
                for name, value in points.items():
                    state.series.setdefault(name, []).append((state.step, round(value, 6)))
                state.step += 1
                due = self._is_due(state.step, self.config.checkpoint_every, num_steps) or state.step == end
                if self.ranks.rank == 0 and state.step < num_steps and due:
                    state.save(work / CHECKPOINT)
                progress(state.step)
        return state

    def save(self, state: StageState, folder: Path) -> None:
        """Leave method.safetensors, adapters.safetensors (if any) and record.json of a finished stage in `folder`."""
        trained = {id(p): p for group in state.optimizer.param_groups for p in group["params"]}
        own = {name: p.detach().cpu().contiguous() for name, p in self.method.named_parameters() if id(p) in trained}
        own |= {name: buffer.detach().cpu().contiguous() for name, buffer in self.method.stage_buffers().items()}
        save_file(own, folder / "method.safetensors")  # what this stage trained, no more: variants share early stages
        if state.adapters:
            save_file(adapter_state(self.student.transformer), folder / "adapters.safetensors")
        info = {"trained_parameters": sum(p.numel() for p in trained.values())}
        (folder / "record.json").write_text(json.dumps({"series": state.series, "info": info}))

    def _begin(self, stage: Stage) -> tuple[StageState, list[nn.Parameter]]:
        config, seed = self.config, self.config.seed * 1009 + self.method.stages.index(stage)
        # apart from the method's draws, so that all methods and options of a seed see the same batches
        batches = Batches(self.teacher, self.data, config, stage, seed + 500)
        generator, adapters = torch.Generator().manual_seed(seed), {}
        groups = self.method.start_stage(stage.name, generator)
        if stage.adapters and config.adapter != "none":
            transformer = copy.deepcopy(self.student.transformer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                add_adapters(transformer, config.adapter, config.adapter_rank)
            self.student = self.student.with_transformer(transformer, "in training")
            adapters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
            groups.append({"params": list(adapters.values()), "lr": config.adapter_lr, "name": "adapters"})
        require(any(group["params"] for group in groups), f"train.adapter: '{config.adapter}' leaves nothing to train in stage "
                f"'{stage.name}' of method '{self.method.name}'; take dora or lora")
        groups = [{**group, "peak_lr": group["lr"]} for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        parameters = [p for group in groups for p in group["params"]]
        return StageState(self.method, adapters, optimizer, batches, generator), parameters

    def _set_rates(self, state: StageState, num_steps: int) -> None:
        # from the step alone, so that a resumed stage needs no schedule of its own
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * _lr_factor(state.step, num_steps, self.config.warmup_steps)

    def _step(self, stage: Stage, state: StageState, parameters: list[nn.Parameter], progress: float,
              injections: tuple[Injection, Injection]) -> dict[str, float]:
        """One optimiser step; returns the points of the training curves."""
        batch = state.batches.draw(state.step)
        terms = self._losses(batch, self._predict(batch, progress, injections))
        values = self.ranks.mean(torch.stack([value.detach().float() for value in terms.values()])).tolist()
        points = {f"train/{name}": value for name, value in zip(terms, values, strict=True)}
        if not math.isfinite(sum(values)):
            raise self._diverged(stage, state.step, f"{points}")
        state.optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        self.ranks.average_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):  # the optimiser must never see it: the loss of the next step would be too late for the last
            raise self._diverged(stage, state.step, f"the gradient is {norm}, the losses are finite: {points}")
        state.optimizer.step()
        return {**points, "train/grad_norm": norm}

    def _diverged(self, stage: Stage, step: int, what: str) -> FloatingPointError:
        remedy = "lower the learning rates" if step else ("no step was taken in this stage yet, so it is not the learning rates: "
                                                          "check the weights, the training images, and train.precision")
        return FloatingPointError(f"training of '{self.method.name}' diverged in stage '{stage.name}' at step {step}: {what}; "
                                  f"{remedy}")

    def _predict(self, batch: TrainBatch, progress: float, injections: tuple[Injection, Injection],
                 validating: bool = False) -> Predicted:
        method, config, (teach, learn) = self.method, self.config, injections
        dense, wanted = None, []
        inputs = (batch.noisy, batch.timestep, batch.conditioning)
        with torch.autocast(batch.noisy.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            if self._distils or method.needs_teacher or validating:
                with torch.no_grad(), teach.suspend(), teach.recording() as wanted:
                    teach.begin_call(_call(batch))
                    dense = self.teacher.denoise(*inputs)
            method.teacher_features = wanted
            method.start_step(progress, batch.level, **({"validating": True} if validating else {}))
            predictions, found = [], []
            for index in range(1 if validating else method.num_passes):
                method.start_pass(index)
                distilling = self._distils and not validating and index == 0
                with learn.recording() if distilling else nullcontext([]) as features:
                    learn.begin_call(_call(batch))
                    predictions.append(self.student.denoise(*inputs).float())
                if index == 0:
                    found = features
        method.teacher_features = []
        return Predicted(predictions, None if dense is None else dense.float(), found, wanted)

    def _losses(self, batch: TrainBatch, made: Predicted) -> dict[str, Tensor]:
        """Eq. 14, and 31 as means: diffusion, distillation of features and prediction, the method's own."""
        config = self.config
        terms = {"diffusion": losses.diffusion(made.predictions, batch.target)}
        if self._distils:
            terms["distill"] = config.distill_weight * losses.distillation(
                (made.predictions[0], made.dense), (made.found, made.wanted), config.distill_every)
        return {**terms, **self.method.losses()}

    @torch.no_grad()
    def _validate(self, state: StageState, progress: float, injections: tuple[Injection, Injection]) -> dict[str, float]:
        """The held-out images: errors to the target and to the dense prediction, and the share of tokens computed.

        The share is a mean over all blocks, as executed. What the method drew or remembers is put back.
        """
        before, random, rows = self.method.training_state(), state.generator.get_state(), []
        for batch in state.batches.validation():
            token_count = injections[1].token_count
            token_count.tokens.clear()
            made = self._predict(batch, min(progress, 1.0), injections, validating=True)
            kept = [computed / total for computed, total in token_count.tokens.values()]
            prediction = made.predictions[0]
            rows.append([float(losses.squared_error(prediction, wanted)) for wanted in (batch.target, made.dense)] + [
                         sum(kept) / len(kept) if kept else 1.0])
        self.method.load_training_state(before)
        state.generator.set_state(random)
        means = self.ranks.mean(torch.tensor(rows, dtype=torch.float64).mean(0)).tolist()
        return dict(zip(("val/diffusion_mse", "val/dense_mse", "val/keep_ratio"), means, strict=True))

    @staticmethod
    def _is_due(steps_done: int, every: int, num_steps: int) -> bool:
        return every > 0 and (steps_done % every == 0 or steps_done == num_steps)


def _call(batch: TrainBatch) -> Call:
    return Call(step=-1, timestep=batch.level, seeds=batch.seeds, guidance_halves=1, training=True)


def _lr_factor(step: int, num_steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
