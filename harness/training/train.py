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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.api import Backbone, Stage, TrainableMethod, require
from harness.engine.adapters import add_adapters, check_adapters, load_adapters, merge_adapters
from harness.engine.finite import finite_rows
from harness.engine.sampler import Loop, SamplerConfig
from harness.storage.code_hash import code_hash
from harness.storage.store import Store
from harness.training.batches import TrainingSet as TrainingSet
from harness.training.config import TrainConfig as TrainConfig
from harness.training.ranks import Ranks
from harness.training.stage import StageTrainer

Progress = Callable[[str, int, int], None]
Series = dict[str, list[tuple[int, float]]]


@dataclass
class Trained:
    """backbone: the one to sample the method with (an adapted copy where adapters trained). series: name -> [(step, value)]."""

    backbone: Backbone
    series: Series
    info: dict[str, Any]


def training_set(backbone: Backbone, data: Any, store: Store,
                 progress: Progress = lambda stage, done, total: None) -> TrainingSet:
    """The images of `data` (see `harness.data.load`) through the backbone's image encoder, once per backbone and data set."""
    inputs = {"backbone": backbone.fingerprint, "data": data.fingerprint, "code": code_hash(type(backbone), type(data))}

    def make(folder: Path) -> None:
        parts, device = [], backbone.transformer.device
        for start in range(0, len(data.images), 64):
            images = torch.from_numpy(data.images[start:start + 64]).permute(0, 3, 1, 2).to(device).float() / 255
            parts.append(backbone.encode_images(images).float().cpu())
            whole = finite_rows(parts[-1])
            if not bool(whole.all()):
                raise FloatingPointError(f"backbone '{backbone.name}': the autoencoder's latents of training image "
                                         f"{start + int((~whole).nonzero()[0])} are NaN or infinite; check its weights and dtype")
            progress("encode data", start + len(images), len(data.images))
        save_file({"latents": torch.cat(parts).contiguous()}, folder / "latents.safetensors")

    folder = store.get_or_make("latents", inputs, make)
    return TrainingSet(load_file(folder / "latents.safetensors")["latents"], list(data.captions), data.fingerprint)


class Paused(Exception):
    """A stage was trained as far as it was asked for; its checkpoint is in the store. series: its curves so far."""

    def __init__(self, series: Series) -> None:
        super().__init__("paused")
        self.series = series


def train(backbone: Backbone, method: TrainableMethod, config: TrainConfig, data: TrainingSet, store: Store,
          progress: Progress = lambda stage, done, total: None) -> Trained:
    """Train `method` in its stages, or load what an equal training left in the store. `backbone` itself is not changed.

    A training that was killed goes on from its last checkpoint. With torch.distributed set up, every process calls this.
    """
    return Training(backbone, method, config, data).run(store, progress)


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and how."""

    backbone: Backbone
    method: TrainableMethod
    config: TrainConfig
    data: TrainingSet

    def curves(self, store: Store, steps: int, progress: Progress = lambda stage, done, total: None) -> Series:
        """The curves of the first `steps` steps; the training goes on from there and becomes what it would have become anyway.

        Where the store holds more than these steps, nothing is trained and the curves are cut. For one process only.
        """
        try:
            series = self.run(store, progress, steps).series
        except Paused as paused:
            series = paused.series
        return {name: kept for name, points in series.items() if (kept := [point for point in points if point[0] < steps])}

    def run(self, store: Store, progress: Progress, until: int | None = None) -> Trained:
        """See `train`. until: raise Paused after this many steps over all stages, unless the training is not longer."""
        backbone, method, config, data = self.backbone, self.method, self.config, self.data
        ranks = Ranks.current()
        require(config.batch_size % ranks.size == 0,
                f"train.batch_size: {config.batch_size} rows cannot be divided among {ranks.size} processes; make it a multiple")
        if any(stage.adapters for stage in method.stages):  # first: the stages that have them may come hours later
            check_adapters(backbone.transformer, config.adapter)
        run = Loop(backbone, SamplerConfig()).run
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            method.begin(run)
        past: dict[str, Any] = {"backbone": backbone.fingerprint, "data": data.fingerprint, "method": method.name,
                                "train": config.shaping(), "code": _code(method, backbone)}
        student, series, info, offset = backbone, {}, {"stages": {}}, 0
        for stage in method.stages:
            num_steps = max(1, round(config.steps * stage.share))
            inputs = {"past": past, "stage": asdict(stage), "num_steps": num_steps, "options": method.stage_key(stage.name),
                      "adapters": config.adapting() if stage.adapters else None}
            if until is not None and offset >= until:
                raise Paused(series)
            trainer = StageTrainer(backbone, student, method, config, data, run)
            try:
                folder = _get_or_train(trainer, stage, store, inputs, progress, None if until is None else until - offset)
            except Paused as paused:
                _extend(series, paused.series, offset)
                raise Paused(series) from None
            _load(method, load_file(folder / "method.safetensors"))
            student = _adapted(student, config, folder)
            record = json.loads((folder / "record.json").read_text())
            _extend(series, record["series"], offset)
            info["stages"][stage.name] = {"steps": num_steps, "store": folder.name, **record["info"]}
            offset += num_steps
            past = inputs
        info["num_parameters"] = method.num_parameters
        return Trained(student, series, info)


def _extend(series: Series, more: Mapping[str, Any], offset: int) -> None:
    for name, points in more.items():
        series.setdefault(name, []).extend((offset + step, value) for step, value in points)


def _get_or_train(trainer: StageTrainer, stage: Stage, store: Store, inputs: Mapping[str, Any], progress: Progress,
                  until: int | None) -> Path:
    """The stored stage of `inputs`. Of several processes, the first one looks it up and, if it is missing, all train it.

    until: raise Paused after this many steps of the stage, where it is longer and not stored.
    """
    ranks, num_steps, work, told = trainer.ranks, inputs["num_steps"], store.work_folder("trained", inputs), []
    target = store.path("trained", inputs)
    if ranks.tell(target.name) != target.name:
        raise RuntimeError(f"stage '{stage.name}': the processes were given different backbones, data, code or options")

    def run(progress: Callable[[int], None]) -> Any:
        state = trainer.train(stage, num_steps, work, progress, until)
        if state.step < num_steps:
            raise Paused(state.series)
        return state

    def make(folder: Path) -> None:
        told.append(ranks.tell("train"))
        trainer.save(run(lambda done: progress(f"train {stage.name}", done, num_steps)), folder)

    if ranks.rank == 0:
        store.get_or_make("trained", inputs, make)
        if not told:  # it was there, or another job made it while we waited
            ranks.tell("load")
    elif ranks.tell("") == "train":
        run(lambda done: None)
    ranks.tell("stored")
    return target


def _load(method: nn.Module, state: dict[str, Tensor]) -> None:
    unexpected = method.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"a stored training stage does not fit this method: unexpected {unexpected[:3]}; its `stage_key` "
                           "leaves out an option that shapes its parameters")


def _code(method: TrainableMethod, backbone: Backbone) -> str:
    """Hash of all code that shapes a training: this protocol, the backbone's own, and the method's."""
    return code_hash(__name__, type(backbone), type(method))


def _adapted(student: Backbone, config: TrainConfig, folder: Path) -> Backbone:
    """The backbone with the stage's adapters merged into a copy of its weights; `student` when the stage had none."""
    path = folder / "adapters.safetensors"
    if not path.exists():
        return student
    transformer = copy.deepcopy(student.transformer)
    add_adapters(transformer, config.adapter, config.adapter_rank)
    load_adapters(transformer, load_file(path))
    merge_adapters(transformer)
    return student.with_transformer(transformer.eval().requires_grad_(False), f"{student.fingerprint}+{folder.name}")
