"""`training-cost`: a training step of Shiva against one of dense fine-tuning with the same adapters, batch and optimiser.

The setting of Shiva-DiT's Table 4 (dense 1.00x, Shiva 1.07x, DiffCR 1.65x), on the embedded backbone and on random SD3 blocks.
Arms: dense (diffusion loss, no teacher); Shiva without teacher (estimator output_gate, no distillation); Shiva with teacher
(teacher_contrast and distillation), both in the last stage, where adapters, router and policy train, at mean keep 0.6 with block
0 dense.
Bar: Shiva without teacher takes no longer than dense.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.api import METHODS, Backbone, Call
from harness.bench.measurements import Bar, Measurement
from harness.bench.options import BenchOptions
from harness.bench.shapes import embedded, shape_only
from harness.bench.timing import interleave
from harness.engine.adapters import add_adapters
from harness.engine.injection import Injection, attach
from harness.engine.sampler import Loop, SamplerConfig
from harness.training import losses

KEEP_RATIO = 0.6
BAR = Bar("<=", 1.0)
RANK, DISTILL_EVERY = 32, 4
PAPER = {"Shiva with teacher": 1.07}
ESTIMATORS = {"dense": None, "Shiva without teacher": "output_gate", "Shiva with teacher": "teacher_contrast"}


def run(options: BenchOptions) -> Iterator[Measurement]:
    """Per backbone: time of a step relative to dense."""
    yield from _one_backbone("embedded, batch 8", embedded(options), 8, options)
    blocks = shape_only(32, 4, options)
    yield from _one_backbone(f"random, 4 blocks of width {options.width}, batch 1", blocks, 1, options)


def _one_backbone(label: str, backbone: Backbone, batch_size: int, options: BenchOptions) -> Iterator[Measurement]:
    batch = _batch(backbone, batch_size)
    arms = {name: _Arm(backbone, estimator, batch) for name, estimator in ESTIMATORS.items()}
    times = interleave({name: arm.step for name, arm in arms.items()}, options.rounds or 6, options.device)
    for name, arm in list(arms.items())[1:]:
        ratio, interval = times.ratio(name, "dense")
        facts = {"ms_per_step": times.median_ms(name), "mean_keep_ratio": arm.mean_keep, "paper": PAPER.get(name),
                 **times.facts()}
        yield Measurement(f"{label}: {name} / dense", ratio, BAR if name == "Shiva without teacher" else None, interval,
                          times.cpu_ratio(name, "dense") if options.device == "cpu" else None, facts)


def _batch(backbone: Backbone, size: int) -> dict[str, Tensor]:
    """One noised batch; the rows share their timestep, as in the stages that train the policy."""
    generator = torch.Generator().manual_seed(0)
    device, dtype = backbone.transformer.device, backbone.transformer.dtype
    clean, noise = torch.randn(2, size, *backbone.latent_shape, generator=generator).to(device, dtype)
    level = torch.full((size,), 0.5, device=device)
    noisy, timestep, target = backbone.noised(clean, noise, level)
    return {"noisy": noisy, "timestep": timestep, "target": target, "level": level,
            "seeds": torch.arange(size, device=device), "conditioning": backbone.encode([""] * size)}


class _Arm:
    """A model with adapters of its own, trained on one batch again and again. estimator: None is dense fine-tuning."""

    def __init__(self, backbone: Backbone, estimator: str | None, batch: dict[str, Tensor]) -> None:
        self.teacher, self.batch, self.dense = backbone, batch, estimator is None
        transformer = copy.deepcopy(backbone.transformer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            add_adapters(transformer, "dora", RANK)
            self.method = METHODS.build("shiva", {"keep_ratio": KEEP_RATIO, "estimator": estimator or "output_gate"})
            self.run = Loop(backbone, SamplerConfig()).run
            self.method.begin(self.run)
        self.student = backbone.with_transformer(transformer, "in training")
        groups = [] if self.dense else self.method.start_stage("joint", torch.Generator().manual_seed(0))
        adapters = [p for p in transformer.parameters() if p.requires_grad]
        groups.append({"params": adapters, "name": "adapters"})
        # learning rate 0: the work is the same and the keep ratios stay where they are
        self.optimizer = torch.optim.AdamW([{**group, "lr": 0.0} for group in groups])
        self.parameters = [p for group in groups for p in group["params"]]
        self.mean_keep = 1.0

    def step(self) -> None:
        """Losses, gradients, clipping, optimiser."""
        loss = self._loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def _loss(self) -> Tensor:
        batch, method = self.batch, self.method
        with_teacher = method.needs_teacher and not self.dense
        wanted, dense_prediction = self._taught() if with_teacher else ([], None)
        method.teacher_features = wanted
        with attach(self.student, method, self.run) as learn, learn.recording() as found:
            learn.suspended = self.dense
            if not self.dense:
                method.start_step(0.5, batch["level"])
            prediction = self._predict(learn, self.student)
            loss = losses.diffusion([prediction], batch["target"])
            if not self.dense:
                kept = [computed / total for (_, block, _), (computed, total) in learn.token_count.tokens.items() if block > 0]
                self.mean_keep = sum(kept) / len(kept)
                loss = loss + sum(method.losses().values())
            if with_teacher:
                loss = loss + losses.distillation((prediction, dense_prediction), (found, wanted), DISTILL_EVERY)
        method.teacher_features = []
        return loss

    def _taught(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        with torch.no_grad(), attach(self.teacher, self.method, self.run) as teach, teach.suspend(), teach.recording() as wanted:
            return wanted, self._predict(teach, self.teacher)

    def _predict(self, injection: Injection, backbone: Backbone) -> Tensor:
        batch = self.batch
        injection.begin_call(Call(step=-1, timestep=batch["level"], seeds=batch["seeds"], training=True))
        return backbone.denoise(batch["noisy"], batch["timestep"], batch["conditioning"])
