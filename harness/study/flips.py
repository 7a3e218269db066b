"""The exact effect of a token's selection: the loss with the token in the routed block, minus the loss without it.

One token of one block changes its status, everything else of the routing stays (also the choices of later blocks, which the
estimators do not differentiate either). Blocks before the changed one give what they gave before, so they are not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.api import Backbone, Call, Method, Reduction, Run, Site
from harness.engine.injection import Injection, attach
from harness.engine.tokens import Keep
from harness.training import losses
from methods.shiva.estimators import Gated

LOSSES = ("diffusion", "distill")
DISTILL_EVERY = 4
CHUNK = 32
Scorer = Callable[[Tensor, Site], Tensor]


@dataclass(frozen=True)
class Samples:
    """A noised batch: noisy, target (B, C, H, W); timestep in the scheduler's unit, level in (0, 1), seeds: (B,)."""

    noisy: Tensor
    target: Tensor
    timestep: Tensor
    level: Tensor
    seeds: Tensor
    conditioning: dict[str, Tensor]


class _Chosen(Method):
    """Whatever `choose` says at each block."""

    name = "chosen"

    def __init__(self) -> None:
        super().__init__(None)
        self.choose: Callable[[Tensor, Site], Reduction | None] = lambda hidden_states, site: None

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        return self.choose(hidden_states, site)


class Probe:
    """A routed model on fixed samples: its losses, the estimators' gradients, and the exact effect of single tokens.

    scores[l], kept[l]: (B, N) and (B, M) of routed block l, None for block 0, which is dense. losses: name -> (B,).
    Made by `probing`.
    """

    def __init__(self, backbone: Backbone, injection: Injection, samples: Samples) -> None:
        self.backbone, self.injection, self.samples = backbone, injection, samples
        self.num_tokens = injection.run.num_tokens
        with torch.no_grad():
            with injection.suspend():
                self._dense, self._wanted = self._predict(torch.arange(len(samples.level)))
        self.scores: list[Tensor | None] = []
        self.kept: list[Tensor | None] = []

    @property
    def routed(self) -> range:
        """The routed blocks: all but the first."""
        return range(1, self.injection.run.num_blocks)

    @torch.no_grad()
    def route(self, scorer: Scorer, num_kept: int) -> dict[str, Tensor]:
        """Choose the `num_kept` tokens that `scorer` ranks first in each block, and return the losses."""
        self.scores, self.kept = [], []

        def choose(hidden_states: Tensor, site: Site) -> Keep | None:
            scores = None if site.block == 0 else scorer(hidden_states, site).detach()
            self.scores.append(scores)
            self.kept.append(None if scores is None else scores.topk(num_kept, dim=-1).indices)
            return None if scores is None else Keep(self.kept[-1], self.num_tokens)

        self.injection.method.choose = choose
        self._before: list[Any] = []
        hooks = [view.block.register_forward_hook(lambda module, args, result: self._before.append(result))
                 for view in self.injection.views]
        try:
            rows = torch.arange(len(self.samples.level))
            prediction, features = self._predict(rows)
        finally:
            for hook in hooks:
                hook.remove()
        self._features = features
        self.losses = self._losses(prediction, features, rows)
        return self.losses

    def gradients(self, estimator: str) -> dict[str, list[Tensor | None]]:
        """Loss -> dL/dpi (B, N) of every block by `estimator`, each sample by its own loss; None for block 0."""
        shape = (len(self.samples.level), self.num_tokens)
        pis = [None if kept is None else torch.full(shape, 0.5, requires_grad=True) for kept in self.kept]

        def choose(hidden_states: Tensor, site: Site) -> Gated | None:
            pi, kept = pis[site.block], self.kept[site.block]
            if pi is None:
                return None
            before, after = self._wanted[site.block]
            teacher = after - before if estimator == "teacher_contrast" else None
            return Gated(Keep(kept, self.num_tokens), pi - pi.detach(), estimator, teacher)

        self.injection.method.choose = choose
        rows = torch.arange(len(self.samples.level))
        found = self._losses(*self._predict(rows), rows)
        leaves = [pi for pi in pis if pi is not None]
        grads = {name: torch.autograd.grad(found[name].sum(), leaves, retain_graph=True) for name in LOSSES}
        return {name: [None, *of_blocks] for name, of_blocks in grads.items()}

    def effects(self, block: int, rows: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Loss -> (R,) loss with token tokens[i] of sample rows[i] in `block` minus the loss without it. All kept or none."""
        kept = self.kept[block][rows]
        here = kept == tokens[:, None]
        inside = bool(here.any(-1).all())
        if inside:
            changed = kept[~here].view(len(rows), -1)
        else:
            changed = torch.cat([kept, tokens[:, None]], dim=-1)
        without = self.losses_with(block, rows, changed)
        sign = -1 if inside else 1
        return {name: sign * (without[name] - self.losses[name][rows]) for name in LOSSES}

    @torch.no_grad()
    def losses_with(self, block: int, rows: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Loss -> (R,) of the samples `rows` when `block` keeps kept[i] (R, M') and every other block keeps what it kept."""
        parts = []
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            sets = [None if old is None else old[rows[part]] for old in self.kept]
            sets[block] = kept[part]
            self.injection.method.choose = lambda hidden_states, site, sets=sets: Keep(sets[site.block], self.num_tokens)
            with self._replayed(block, rows[part]):
                prediction, features = self._predict(rows[part])
            earlier = [tuple(x[rows[part]] for x in pair) for pair in self._features[:block]]
            parts.append(self._losses(prediction, earlier + features, rows[part]))
        return {name: torch.cat([part[name] for part in parts]) for name in LOSSES}

    @contextmanager
    def _replayed(self, block: int, rows: Tensor) -> Iterator[None]:
        """The blocks before `block` return their recorded results; an instance-level forward stands over the injection's."""
        views = self.injection.views[:block]
        routed = [view.block.forward for view in views]
        for view, result in zip(views, self._before, strict=False):
            taken = tuple(None if part is None else part[rows] for part in result)
            view.block.forward = lambda *args, taken=taken, **kwargs: taken
        try:
            yield
        finally:
            for view, forward in zip(views, routed, strict=True):
                view.block.forward = forward

    def _predict(self, rows: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        samples = self.samples
        with self.injection.recording() as features:
            self.injection.begin_call(Call(step=-1, timestep=samples.level[rows], seeds=samples.seeds[rows], training=True))
            conditioning = {name: value[rows] for name, value in samples.conditioning.items()}
            return self.backbone.denoise(samples.noisy[rows], samples.timestep[rows], conditioning), features

    def _losses(self, prediction: Tensor, features: list[tuple[Tensor, Tensor]], rows: Tensor) -> dict[str, Tensor]:
        """Those of training, one value a sample."""
        wanted = [(before[rows], after[rows]) for before, after in self._wanted]
        return {"diffusion": losses.diffusion([prediction], self.samples.target[rows], per_row=True),
                "distill": losses.distillation((prediction, self._dense[rows]), (features, wanted), DISTILL_EVERY, per_row=True)}


@contextmanager
def probing(backbone: Backbone, run: Run, samples: Samples) -> Iterator[Probe]:
    """A probe of `backbone`, which is left as it was."""
    with attach(backbone, _Chosen(), run) as injection:
        yield Probe(backbone, injection, samples)
