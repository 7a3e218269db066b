"""Counting compute: what one image costs, with a method and without.

FLOPs are counted by torch's dispatcher counter on the backbone's meta twin while it runs exactly the sampler's own step with the
method attached: one multiply-add counts two, per image, over the whole loop, all guided halves. (On the CPU that counter sees
no attention kernel, hence the meta device.) Autoencoder and text encoders are no part of the number.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from harness.api import METHODS, Backbone, Call, Method, Reduction, Run, Site
from harness.engine.injection import Injection, attach
from harness.engine.sampler import Loop, SamplerConfig, sample
from harness.engine.tokens import Mixture, PerRow

CALIBRATION_IMAGES, CALIBRATION_SEED = 8, 1_000_000
Kept = dict[str, list[list[float]]]
"""Fraction of image tokens computed, {'attention' | 'ffn': [step][block]}."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one image over the whole loop. A multiply-add counts two.

    linear: everything of the transformer but its attention core. attention: the two products QK' and PV.
    method: what the method itself adds in `reduce`, `restore` and `observe` (matching, routers, and facts of the call that the
    model had not computed); `begin` runs once per run and is not counted.
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


class _Tally:
    """FLOPs seen so far, in two books: the transformer's and the method's."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self._replayed: Counter = Counter()
        self._own: Counter = Counter()

    def _seen(self) -> Counter:
        return Counter(self._counter.get_flop_counts().get("Global", {})) + self._replayed

    @contextmanager
    def method_scope(self) -> Iterator[None]:
        """What runs inside belongs to the method."""
        before = self._seen()
        yield
        self._own += self._seen() - before

    def measured(self, function: Callable[[], Any]) -> tuple[Any, Counter]:
        """The result of `function` and the FLOPs it took."""
        before = self._seen()
        return function(), self._seen() - before

    def replay(self, flops: Counter) -> None:
        """Book FLOPs of work that was counted earlier."""
        self._replayed += flops

    def cost(self) -> Cost:
        """Both books closed."""
        transformer = self._seen() - self._own
        attention = sum(flops for op, flops in transformer.items() if _is_attention(op))
        return Cost(sum(transformer.values()) - attention, attention, sum(self._own.values()))


def _is_attention(op: Any) -> bool:
    return any(word in str(op) for word in ("bmm", "scaled_dot_product", "flash_attention", "efficient_attention"))


class _MeteredPlan(Reduction):
    def __init__(self, plan: Reduction, tally: _Tally) -> None:
        self._plan, self._tally, self.num_tokens, self.kinds = plan, tally, plan.num_tokens, plan.kinds  # type: ignore[misc]

    def reduce(self, hidden_states: Tensor) -> Tensor:
        with self._tally.method_scope():
            return self._plan.reduce(hidden_states)

    def execute(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        return self._plan.execute(module, forward, args, kwargs)  # the reduced module itself: no cost of the method's

    @property
    def mean_tokens(self) -> float:
        return self._plan.mean_tokens

    def restore(self, computed: Tensor | None, bypass: Tensor | None) -> Tensor:
        with self._tally.method_scope():
            return self._plan.restore(computed, bypass)

    def positions(self) -> Tensor:
        return self._plan.positions()


def _metered(plan: Reduction | None, tally: _Tally) -> Reduction | None:
    """`plan` with its own FLOPs booked as the method's; of plans that the injection takes apart, each part."""
    if not isinstance(plan, PerRow | Mixture):
        return None if plan is None else _MeteredPlan(plan, tally)
    parts = {id(part): _metered(part, tally) for part in plan.plans}  # rows that share a plan go on sharing it
    twin = copy.copy(plan)
    twin.plans = [parts[id(part)] for part in plan.plans]
    return twin


class _WatchedCall:
    """A call that notes which of its facts a method reads."""

    def __init__(self, call: Call, read: set[str]) -> None:
        self._call, self._read = call, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._call, name)


class _WatchedSite(Site):
    """A site whose random numbers do not count as looking at the step: they change which tokens, not how many."""

    raw: Site

    def rand(self, num: int) -> Tensor:
        return self.raw.rand(num)

    def generator(self) -> torch.Generator:
        return self.raw.generator()


class _Metered(Method):
    """The method with its own FLOPs booked apart, and watched for looking at the step."""

    def __init__(self, method: Method, tally: _Tally) -> None:
        self._method, self._tally = method, tally
        self.name, self.sites, self.hooks_model = method.name, method.sites, method.hooks_model  # type: ignore[misc]
        self.attach, self.detach, self.before = method.attach, method.detach, method.before  # type: ignore[method-assign]
        self._read: set[str] = set()

    @property
    def steps_alike(self) -> bool:
        """Whether nothing the method has done so far could differ in another step: it reads no step and carries no state."""
        stateless = type(self._method).observe is Method.observe and type(self._method).reset is Method.reset
        return stateless and not self._read & {"step", "timestep"}

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        watched = _WatchedSite(_WatchedCall(site.call, self._read), site.run, site.block, site.kind, site.module, site.memory)
        watched.raw = site
        with self._tally.method_scope():
            plan = self._method.reduce(hidden_states, watched)
        return _metered(plan, self._tally)

    def reset(self) -> None:
        self._method.reset()

    def observe(self, call: Call, prediction: Tensor) -> None:
        with self._tally.method_scope():
            self._method.observe(call, prediction)


class _Remembered:
    """A module on the meta device that is really run once per distinct shapes (and other values) of its inputs."""

    def __init__(self, forward: Callable, place: tuple, memory: dict, tally: _Tally) -> None:
        self._forward, self._place, self._memory, self._tally = forward, place, memory, tally

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        shapes = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
        key = (self._place, shapes, str(structure))
        if key in self._memory:
            result, flops = self._memory[key]
            self._tally.replay(flops)
            return result
        result, flops = self._tally.measured(lambda: self._forward(*args, **kwargs))
        self._memory[key] = result, flops
        return result


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
            tally = _Tally(counter)
            metered = _Metered(method, tally)
            if isinstance(method, nn.Module):
                for name, child in method.named_children():  # routers are the same work at every step
                    child.forward = _Remembered(child.forward, ("method", name), {}, tally)
            with attach(twin, metered, loop.run) as injection:
                self._remember(injection, tally)
                metered.reset()
                for step in range(loop.num_steps):
                    loop.predict(injection, step, latents, conditioning, seeds)
                    if step == 0 and metered.steps_alike:
                        break
            cost = tally.cost()
        repeats = loop.num_steps // (step + 1)
        kept = {kind: injection.ledger.kept(kind, step + 1) * repeats for kind in ("attention", "ffn")}
        return Cost(cost.linear * repeats, cost.attention * repeats, cost.method * repeats), kept

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

    def _remember(self, injection: Injection, tally: _Tally) -> None:
        if "block" in injection.method.sites and len(injection.method.sites) > 1:
            return  # a remembered block would skip the sites inside it
        for module in injection.backbone.transformer.modules():
            routed = vars(module).get("forward")
            if hasattr(routed, "original"):  # ours: libraries put their own there too
                routed.original = _Remembered(routed.original, (self._structure(routed.module),), self._memory, tally)

    def _structure(self, module: nn.Module) -> str:
        """The same for modules that cost the same at the same shapes: most blocks of a transformer are alike."""
        if module not in self._structures:
            options = {key: value for part in module.modules() for key, value in vars(part).items()
                       if isinstance(value, bool | int | str) and key != "training"}
            sizes = [(name, tuple(weight.shape), weight.dtype) for name, weight in module.named_parameters()]
            self._structures[module] = repr((module, sorted(options.items()), sizes))
        return self._structures[module]
