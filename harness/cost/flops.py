"""Counting compute: what one image costs, with a method and without.

FLOPs are counted by torch's dispatcher counter on the backbone's meta twin while it runs exactly the sampler's own step with the
method attached: one multiply-add counts two, per image, over the whole loop, all guided halves. (On the CPU that counter sees
no attention kernel, hence the meta device.) Autoencoder and text encoders are no part of the number.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.api import METHODS, Backbone, Method, Run
from harness.cost.metering import MeteredMethod, Remembered, Tally
from harness.engine.injection import Injection, attach
from harness.engine.sampler import Loop, SamplerConfig, sample

CALIBRATION_IMAGES, CALIBRATION_SEED = 8, 1_000_000
Kept = dict[str, list[list[float]]]
"""Fraction of image tokens computed, {'attention' | 'ffn': [step][block]}."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one image over the whole loop. A multiply-add counts two.

    linear: everything of the transformer but its attention core. attention: the two products QK' and PV.
    method: what the method and its plans add (matching, routers, facts of the call that the model had not computed, and the dense
    passes of plans that ask for one, unless the method's row says that they are left out); `begin` runs once per run and is not
    counted.
    """

    linear: int
    attention: int
    method: int

    @property
    def transformer(self) -> int:
        """The reduced transformer without the method's own cost."""
        return self.linear + self.attention

    @property
    def total(self) -> int:
        """What budgets and `compute/gflops_per_image` mean."""
        return self.linear + self.attention + self.method

    @property
    def paper_rule(self) -> float:
        """The rule behind Shiva-DiT's tables: linear layers as multiply-adds (x1), attention as FLOPs (4 N^2 D), method free.

        It reproduces the paper's dense SD3-Medium and FLUX.1-dev, and no single standard convention does; compare with the paper
        in this column only. PixArt-Sigma's printed 12.97 T is not by this rule, which gives 8.96: there the cross-attention too,
        whose keys are 300 text tokens, was counted as 4 N^2 D.
        """
        return self.linear / 2 + self.attention

    def cut(self, dense: Cost) -> float:
        """Fraction of the dense model's FLOPs that is saved; negative when the method costs more than it saves."""
        return 1 - self.total / dense.total

    def paper_rule_cut(self, dense: Cost) -> float:
        """The same under the paper's rule."""
        return 1 - self.paper_rule / dense.paper_rule


class Meter:
    """Counts methods on one backbone and sampler; remembers modules it has seen, so that a search costs little."""

    def __init__(self, backbone: Backbone, sampler: SamplerConfig) -> None:
        self.backbone, self.sampler = backbone, sampler
        self.calibration = ([""] * CALIBRATION_IMAGES, list(range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION_IMAGES)))
        """(prompts, seeds) of the images by which a dynamic method is counted before it has sampled."""
        real = Loop(backbone, sampler)  # resolves the backbone's own defaults
        resolved = SamplerConfig(num_steps=real.scheduler_steps, guidance_scale=real.guidance_scale, batch_size=1)
        self.loop = Loop(backbone.on_meta(), resolved)
        self.device = str(backbone.transformer.device)
        self._memory: dict[tuple, tuple[Any, Counter]] = {}
        self._structures: dict[nn.Module, str] = {}
        self._dense: Cost | None = None

    @property
    def run(self) -> Run:
        """The run that methods are counted in."""
        return self.loop.run

    @property
    def dense(self) -> Cost:
        """Cost of the backbone without any reduction."""
        if self._dense is None:
            self._dense = self.count(METHODS.build("dense", {}))
        return self._dense

    def count(self, method: Method) -> Cost:
        """The cost of `method`; works on a copy of it. Methods must decide how many tokens to keep without looking at values."""
        return self.counted(method)[0]

    def counted(self, method: Method) -> tuple[Cost, Kept]:
        """The cost and the kept fractions that go with it, to be compared with what a real run executed.

        Steps are alike when the method reads no step and carries no state; then one of them stands for all. A dynamic method is
        counted by what its images decided, those it has sampled or else a few of `calibration`.
        """
        if method.dynamic and method.pattern is None:
            return self._counted_dynamic(method)
        loop = self._loop(method)
        twin, method = loop.backbone, self._copy(method, loop.run)
        latents = torch.empty((1, *twin.latent_shape), device="meta", dtype=twin.transformer.dtype)
        seeds = torch.zeros(loop.guidance_halves, dtype=torch.int64, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            conditioning = loop.conditioning([""])
            tally = Tally(counter)
            metered = MeteredMethod(method, tally)
            if isinstance(method, nn.Module):
                for name, child in method.named_children():  # routers are the same work at every step
                    child.forward = Remembered(child.forward, ("method", name), {}, tally)
            with attach(twin, metered, loop.run) as injection:  # type: ignore[arg-type]
                injection.dense_pass = tally.left_out if method.uncounted else tally.method_scope
                self._remember(injection, tally)
                metered.reset()
                for step in range(loop.num_steps):
                    loop.predict(injection, step, latents, conditioning, seeds)
                    if step == 0 and metered.steps_alike:
                        break
            linear, attention, own = tally.closed()
        repeats = loop.num_steps // (step + 1)
        kept = {kind: injection.token_count.kept(kind, step + 1) * repeats for kind in ("attention", "ffn")}
        return Cost(linear * repeats, attention * repeats, own * repeats), kept

    def _counted_dynamic(self, method: Method) -> tuple[Cost, Kept]:
        """Means over images, each counted by its own pattern of steps."""
        patterns = list(method.patterns.values())
        if not patterns:
            method, (prompts, seeds) = copy.deepcopy(method), self.calibration
            for _ in sample(self.backbone, method, self.sampler, prompts, seeds):
                pass
            patterns = list(method.patterns.values()) or [(True,) * self.loop.num_steps]  # at its knob's end it decides nothing
        total, kept = Cost(0, 0, 0), {}
        for pattern, count in Counter(patterns).items():
            follower = copy.copy(method)
            follower.pattern = pattern
            cost, rows = self.counted(follower)
            share = count / len(patterns)
            total = Cost(*(whole + share * part for whole, part in zip(dataclasses.astuple(total), dataclasses.astuple(cost),
                                                                       strict=True)))
            kept = {kind: [[part * share + (kept[kind][step][block] if kept else 0.0) for block, part in enumerate(row)]
                           for step, row in enumerate(table)] for kind, table in rows.items()}
        return Cost(*map(round, dataclasses.astuple(total))), kept

    def cut(self, method: Method) -> float:
        """Fraction of dense FLOPs that `method` saves."""
        return self.count(method).cut(self.dense)

    def begin(self, method: Method) -> None:
        """Begin the run that is counted, where values can be made: it builds the method's parameters."""
        method.begin(dataclasses.replace(self.run, device=self.device))

    def try_step(self, method: Method, compile: str = "off") -> None:
        """One step of a copy of `method` on shapes alone, not counted. Raises what it raises, ConfigError where it refuses.

        compile: as the sampler asks; it is put on and off again, and nothing is compiled.
        """
        loop = self._loop(method)
        twin, method = loop.backbone, self._copy(method, loop.run)
        if method.dynamic and method.pattern is None:
            method.pattern = (True,) * loop.num_steps
        if compile != "off":
            with attach(twin, method, dataclasses.replace(loop.run, compile=compile, device=self.device)):
                pass
        latents = torch.empty((1, *twin.latent_shape), device="meta", dtype=twin.transformer.dtype)
        seeds = torch.zeros(loop.guidance_halves, dtype=torch.int64, device="meta")
        with torch.no_grad(), attach(twin, method, loop.run) as injection:
            method.reset()
            loop.predict(injection, 0, latents, loop.conditioning([""]), seeds)

    def _loop(self, method: Method) -> Loop:
        """This meter's loop, or one of as many steps as the method takes."""
        asked = self.loop.scheduler_steps
        if method.num_steps(asked) == asked:
            return self.loop
        config = SamplerConfig(num_steps=asked, guidance_scale=self.loop.guidance_scale, batch_size=1)
        return Loop(self.loop.backbone, config, method)

    def _copy(self, method: Method, run: Run) -> Method:
        method = copy.deepcopy(method)
        if isinstance(method, nn.Module):
            # its tables come from real weights, so they are built first; afterwards only shapes matter
            method.begin(dataclasses.replace(run, device=self.device))
            return method.to("meta").requires_grad_(False)
        method.begin(run)
        return method

    def _remember(self, injection: Injection, tally: Tally) -> None:
        if "block" in injection.method.sites and len(injection.method.sites) > 1:
            return  # a remembered block would skip the sites inside it
        for routed in injection.routed:
            routed.original = Remembered(routed.original, (self._structure(routed.module),), self._memory, tally)

    def _structure(self, module: nn.Module) -> str:
        """The same for modules that cost the same at the same shapes: most blocks of a transformer are alike."""
        if module not in self._structures:
            options = {key: value for part in module.modules() for key, value in vars(part).items()
                       if isinstance(value, bool | int | str) and key != "training"}
            sizes = [(name, tuple(weight.shape), weight.dtype) for name, weight in module.named_parameters()]
            self._structures[module] = repr((module, sorted(options.items()), sizes))
        return self._structures[module]
