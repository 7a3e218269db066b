"""The staged training that every trained method uses with its own objective: one loop, one teacher, one data order.

Per step: a batch of the training split is noised, the frozen dense model (the teacher) and the routed model predict, and
  L = L_diffusion + distill_weight * L_distill + the method's own terms.
L_distill compares image features after every `distill_every`-th block, each after a layer norm without parameters, and the
prediction (Shiva-DiT, arXiv:2602.05605, Eq. 14, 31; means instead of sums). Timesteps are stratified (Eq. 15).
Each stage is cached by content: stages with the same inputs and the same past are trained once and shared between trials.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from harness import adapters, injection, tokens
from harness.adapters import adapter_state, add_adapters, load_adapters, merge_adapters
from harness.api import Backbone, Call, Run, Stage, TrainableMethod, require
from harness.injection import Injection, attach
from harness.sampler import Loop, SamplerConfig
from harness.store import Store, code_hash, code_version

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """steps: optimiser steps over all stages. warmup_steps: linear warm-up of each stage, then a cosine to a tenth.

    adapter: what trains on the backbone in the stages that allow it, on all linear layers of attention and feed-forward.
    caption_drop: share of captions replaced by the empty prompt. distill_every: blocks between feature taps.
    strata: timestep strata of stages whose batches share one timestep. precision: of the forward pass; parameters are float32.
    seed: initialisation, data order, noise: the training seed.
    """

    steps: int = 240
    batch_size: int = 8
    warmup_steps: int = 20
    adapter: Literal["dora", "lora", "none"] = "dora"
    adapter_rank: int = 32
    adapter_lr: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    caption_drop: float = 0.1
    distill_every: int = 4
    distill_weight: float = 1.0
    strata: int = 16
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "adapter_rank", "distill_every", "strata"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        require(0 <= self.caption_drop < 1, f"train.caption_drop must lie in [0, 1), got {self.caption_drop}")


@dataclass
class Trained:
    """backbone: the one to sample the method with (an adapted copy where adapters trained). series: name -> [(step, value)]."""

    backbone: Backbone
    series: dict[str, list[tuple[int, float]]]
    info: dict[str, Any]


@dataclass(frozen=True)
class TrainingSet:
    """latents: (n, C, H, W) float32 on the CPU, as the transformer sees them. captions: n. fingerprint: of the images."""

    latents: Tensor
    captions: list[str]
    fingerprint: str


def training_set(backbone: Backbone, data: Any, store: Store,
                 progress: Progress = lambda stage, done, total: None) -> TrainingSet:
    """The images of `data` (see `harness.data.load`) through the backbone's image encoder, once per backbone and data set."""
    inputs = {"backbone": backbone.fingerprint, "data": data.fingerprint}

    def make(folder: Path) -> None:
        parts, device = [], backbone.transformer.device
        for start in range(0, len(data.images), 64):
            images = torch.from_numpy(data.images[start:start + 64]).permute(0, 3, 1, 2).to(device).float() / 255
            parts.append(backbone.encode_images(images).float().cpu())
            progress("encode data", start + len(images), len(data.images))
        save_file({"latents": torch.cat(parts).contiguous()}, folder / "latents.safetensors")

    folder = store.get_or_make("latents", inputs, make)
    return TrainingSet(load_file(folder / "latents.safetensors")["latents"], list(data.captions), data.fingerprint)


def train(backbone: Backbone, method: TrainableMethod, config: TrainConfig, data: TrainingSet, store: Store,
          progress: Progress = lambda stage, done, total: None) -> Trained:
    """Train `method` in its stages, or load what an equal training left in the store. `backbone` itself is not changed."""
    run = Loop(backbone, SamplerConfig()).run
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method.begin(run)
    options = asdict(config)
    adapting = {key: options.pop(key) for key in ("adapter", "adapter_rank", "adapter_lr")}
    options.pop("steps")  # each stage's own number of steps counts
    past: dict[str, Any] = {"backbone": backbone.fingerprint, "data": data.fingerprint, "method": method.name,
                            "train": options, "code": _code(method)}
    student, series, info, offset = backbone, {}, {"stages": {}}, 0
    for stage in method.stages:
        num_steps = max(1, round(config.steps * stage.share))
        inputs = {"past": past, "stage": asdict(stage), "num_steps": num_steps, "options": method.stage_key(stage.name),
                  "adapters": adapting if stage.adapters else None}
        trainer = _Trainer(backbone, student, method, config, data, run)

        def make(folder: Path, stage: Stage = stage, num_steps: int = num_steps, trainer: _Trainer = trainer) -> None:
            trainer.run_stage(stage, num_steps, folder, lambda done: progress(f"train {stage.name}", done, num_steps))

        folder = store.get_or_make("trained", inputs, make)
        _load(method, load_file(folder / "method.safetensors"))
        student = _adapted(backbone, student, config, folder)
        record = json.loads((folder / "record.json").read_text())
        for name, points in record["series"].items():
            series.setdefault(name, []).extend((offset + step, value) for step, value in points)
        info["stages"][stage.name] = {"steps": num_steps, "store": folder.name, **record["info"]}
        offset += num_steps
        past = inputs
    info["num_parameters"] = sum(p.numel() for p in method.parameters())
    return Trained(student, series, info)


def _load(method: nn.Module, state: dict[str, Tensor]) -> None:
    unexpected = method.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"a stored training stage does not fit this method: unexpected {unexpected[:3]}; its `stage_key` "
                           "leaves out an option that shapes its parameters")


def _code(method: TrainableMethod) -> list[str]:
    """Version of all code that shapes a training: this protocol and every file of the method."""
    return [code_version(Path(__file__), adapters, injection, tokens), code_hash(type(method))]


def _adapted(backbone: Backbone, student: Backbone, config: TrainConfig, folder: Path) -> Backbone:
    """The backbone with the stage's adapters merged into a copy of its weights; `student` when the stage had none."""
    path = folder / "adapters.safetensors"
    if not path.exists():
        return student
    transformer = copy.deepcopy(backbone.transformer)
    add_adapters(transformer, config.adapter, config.adapter_rank)
    load_adapters(transformer, load_file(path))
    merge_adapters(transformer)
    return backbone.with_transformer(transformer.eval().requires_grad_(False), f"{backbone.fingerprint}+{folder.name}")


class _Trainer:
    """One stage of training: the loop over steps and its losses."""

    def __init__(self, teacher: Backbone, student: Backbone, method: TrainableMethod, config: TrainConfig, data: TrainingSet,
                 run: Run) -> None:
        self.teacher, self.student, self.method, self.config, self.data, self.run = teacher, student, method, config, data, run

    def run_stage(self, stage: Stage, num_steps: int, folder: Path, progress: Callable[[int], None]) -> None:
        """Train `num_steps` steps and leave method.safetensors, adapters.safetensors (if any) and record.json in `folder`."""
        config, index = self.config, self.method.stages.index(stage)
        generator = torch.Generator().manual_seed(config.seed * 1009 + index)
        groups = self.method.start_stage(stage.name, generator)
        adapting = stage.adapters and config.adapter != "none"
        if adapting:
            transformer = copy.deepcopy(self.teacher.transformer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                add_adapters(transformer, config.adapter, config.adapter_rank)
            self.student = self.teacher.with_transformer(transformer, "in training")
            groups.append({"params": [p for p in transformer.parameters() if p.requires_grad], "lr": config.adapter_lr,
                           "name": "adapters"})
        parameters = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, num_steps, config.warmup_steps))
        series: dict[str, list[tuple[int, float]]] = {}
        with ExitStack() as stack:
            teach = stack.enter_context(attach(self.teacher, self.method, self.run))
            learn = stack.enter_context(attach(self.student, self.method, self.run)) if adapting else teach
            for step, batch in enumerate(self._batches(stage, num_steps, generator)):
                losses = self._losses(batch, step / num_steps, teach, learn)
                total = sum(losses.values())
                if not torch.isfinite(total):
                    values = {name: float(value.detach()) for name, value in losses.items()}
                    raise FloatingPointError(f"training of '{self.method.name}' diverged in stage '{stage.name}' at step {step}: "
                                             f"{values}; lower the learning rates")
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                schedule.step()
                for name, value in {**losses, "grad_norm": norm}.items():
                    series.setdefault(f"train/{name}", []).append((step, round(float(value.detach()), 6)))
                progress(step + 1)
        chosen = {id(p) for p in parameters}
        state = {name: p.detach().cpu().contiguous() for name, p in self.method.named_parameters() if id(p) in chosen}
        save_file(state, folder / "method.safetensors")  # what this stage trained, no more: variants share early stages
        if adapting:
            save_file(adapter_state(self.student.transformer), folder / "adapters.safetensors")
        info = {"trained_parameters": sum(p.numel() for p in parameters)}
        (folder / "record.json").write_text(json.dumps({"series": series, "info": info}))

    def _batches(self, stage: Stage, num_steps: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Noised latents, timesteps, targets and conditioning of each step; the draws depend on `generator` alone."""
        config, backbone = self.config, self.teacher
        latents, size, order = self.data.latents, config.batch_size, torch.empty(0, dtype=torch.int64)
        for step in range(num_steps):
            if step % config.strata == 0:
                order = torch.randperm(config.strata, generator=generator)
            picks = torch.randint(len(self.data.captions), (size,), generator=generator)
            if stage.one_timestep:
                level = ((order[step % config.strata] + torch.rand((), generator=generator)) / config.strata).expand(size)
            else:
                level = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size  # Eq. 15
            level = level.clamp(1e-3, 1 - 1e-3)
            dropped = torch.rand(size, generator=generator) < config.caption_drop
            clean = latents[picks]
            noise = torch.randn(clean.shape, generator=generator)
            seeds = torch.randint(2**62, (size,), generator=generator)
            device, dtype = backbone.transformer.device, backbone.transformer.dtype
            noisy, timestep, target = backbone.noised(clean.to(device, dtype), noise.to(device, dtype), level.to(device))
            captions = ["" if drop else self.data.captions[i] for i, drop in zip(picks.tolist(), dropped.tolist(), strict=True)]
            yield {"noisy": noisy, "timestep": timestep, "target": target, "level": level.to(device), "seeds": seeds.to(device),
                   "conditioning": backbone.encode(captions)}

    def _losses(self, batch: dict[str, Any], progress: float, teach: Injection, learn: Injection) -> dict[str, Tensor]:
        method, config = self.method, self.config
        with torch.autocast(batch["noisy"].device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            with torch.no_grad(), teach.suspend(), teach.recording() as wanted:
                teach.begin_call(self._call(batch))
                dense = self.teacher.denoise(batch["noisy"], batch["timestep"], batch["conditioning"])
            method.teacher_features = wanted
            method.start_step(progress, batch["level"])
            with learn.recording() as found:
                learn.begin_call(self._call(batch))
                prediction = self.student.denoise(batch["noisy"], batch["timestep"], batch["conditioning"])
        method.teacher_features = []
        taps = range(config.distill_every - 1, len(wanted), config.distill_every)
        features = [_normalised_error(found[tap][1], wanted[tap][1]) for tap in taps]
        distill = F.mse_loss(prediction.float(), dense.float()) + (sum(features) / len(features) if features else 0.0)
        return {"diffusion": F.mse_loss(prediction.float(), batch["target"].float()),
                "distill": config.distill_weight * distill, **method.losses()}

    def _call(self, batch: dict[str, Any]) -> Call:
        return Call(step=-1, timestep=batch["level"], seeds=batch["seeds"], guidance_halves=1, training=True)


def _normalised_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of features (B, N, D) after a layer norm without parameters (Eq. 31, as a mean)."""
    width = found.shape[-1:]
    return F.mse_loss(F.layer_norm(found.float(), width), F.layer_norm(wanted.float(), width))


def _lr_factor(step: int, num_steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
