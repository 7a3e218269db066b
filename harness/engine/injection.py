"""Token reduction inside unmodified diffusers blocks: reduce -> the module's own forward -> restore.

A routed module gets one callable object as its instance-level `forward`; the class, the weights and the state-dict keys stay
as they are, and removing the object leaves the untouched model. Text tokens, modulation and everything else that is not an
image token pass through unchanged. State lives in local variables of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.api import Backbone, Call, Method, Reduction, Run, Site, SiteKind, require
from harness.engine import compiling
from harness.engine.compiling import compiled
from harness.engine.ports import BlockView, ModulePort
from harness.engine.rotary import gather_rotary
from harness.engine.tokens import Mixture, PerRow


class TokenCount:
    """Image tokens that each routed module really computed: {(step, block, module): (M, N)}, M as a mean over rows."""

    def __init__(self, views: list[BlockView]) -> None:
        self._modules = {kind: [[name for name, (k, _) in view.branches.items() if k == kind] for view in views]
                         for kind in ("attention", "ffn")}
        self.tokens: dict[tuple[int, int, str], tuple[float, int]] = {}

    def record(self, site: Site, computed: float) -> None:
        """Note that the module at `site` computed `computed` of the run's tokens."""
        self.tokens[site.step, site.block, site.module] = (computed, site.run.num_tokens)

    def kept(self, kind: SiteKind, num_steps: int) -> list[list[float]]:
        """Fraction of image tokens that modules of `kind` computed, as [step][block]; 1 where nothing was reduced."""
        return [[self._mean_kept(step, block, names) for block, names in enumerate(self._modules[kind])]
                for step in range(num_steps)]

    def _mean_kept(self, step: int, block: int, names: list[str]) -> float:
        whole = self.tokens.get((step, block, ""))
        if whole is not None:
            return whole[0] / whole[1]
        pairs = [self.tokens.get((step, block, name), (1, 1)) for name in names] or [(1, 1)]  # a block without such a site
        return sum(m / n for m, n in pairs) / len(pairs)


class _Routed:
    """The instance-level `forward` of one routed module."""

    def __init__(self, module: nn.Module, port: ModulePort, injection: Injection, place: tuple[int, SiteKind, str]) -> None:
        self.module, self.port, self.injection = module, port, injection
        self.block, self.kind, self.name = place
        self.original = injection.forward_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        injection = self.injection
        hidden_states = self._hidden_states(args, kwargs)
        plan = None
        if not injection.suspended:
            site = injection.site(self.block, self.kind, self.name)
            plan = injection.method.reduce(hidden_states, site)
            computed = None if plan is None else plan.mean_tokens
            injection.token_count.record(site, hidden_states.shape[1] if computed is None else computed)
        result = self._planned(plan, args, kwargs)
        if self.kind == "block" and injection.features is not None:
            injection.features.append((hidden_states, self._image(result)))
        return result

    def _planned(self, plan: Reduction | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's result under `plan`; plans made of plans are taken apart."""
        if isinstance(plan, PerRow):
            groups = plan.groups()
            back = torch.tensor([row for rows, _ in groups for row in rows]).argsort()
            results = [self._planned(one, *self._rows(rows, args, kwargs)) for rows, one in groups]
            return self._joined(results, lambda parts: torch.cat(parts).index_select(0, back.to(parts[0].device)))
        if isinstance(plan, Mixture):
            results = [self._planned(one, args, kwargs) for one in plan.plans]
            return self._joined(results, lambda parts: sum(w * x for w, x in zip(plan.weights, parts, strict=True)))
        return self._run(plan, args, kwargs)

    def _run(self, plan: Reduction | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's own forward on the tokens of `plan`, and the full sequence put back."""
        if plan is None:
            return self._forward(None, args, kwargs)
        hidden_states = self._hidden_states(args, kwargs)
        require(self.kind in plan.kinds, f"{self._place()}: the plan {plan.__class__.__name__} of method "
                f"'{self.injection.method.name}' can be used at {' and '.join(sorted(plan.kinds))} sites alone")
        if plan.num_tokens == 0:
            return self._passed(plan, hidden_states, kwargs)
        if plan.wants_dense:
            with torch.no_grad():
                with self.injection.dense_pass():
                    output = self._image(self.original(*args, **kwargs))
                plan.take_dense(output)
        reduced, num_tokens = plan.reduce(hidden_states), hidden_states.shape[1]
        self._check_count(plan, "reduce", reduced, num_tokens if plan.num_tokens is None else plan.num_tokens)
        if self.port.image in kwargs:
            kwargs = {**kwargs, self.port.image: reduced}
        else:
            args = (*args[: self.port.position], reduced, *args[self.port.position + 1:])
        if self.port.rotary and reduced.shape[1] < num_tokens:
            kwargs = {**kwargs, self.port.rotary: gather_rotary(kwargs[self.port.rotary], plan, num_tokens)}
        result = self._forward(plan, args, kwargs)
        restored = plan.restore(self._image(result), hidden_states if self.kind == "block" else None)
        if self.kind != "block":  # a branch is added to what came in; a block may hand on another number of tokens
            self._check_count(plan, "restore", restored, num_tokens)
        return self._with_image(result, restored)

    def _check_count(self, plan: Reduction, hook: str, tokens: Tensor, wanted: int) -> None:
        """An error where a plan computes or gives back other tokens than it says: nothing after it would fit, or be counted."""
        if tokens.shape[1] != wanted:
            raise RuntimeError(f"{self._place()}: `{hook}` of the plan {plan.__class__.__name__} of method "
                               f"'{self.injection.method.name}' gives {tokens.shape[1]} tokens where {wanted} are due; a plan "
                               "that computes fewer tokens sets num_tokens and has a `reduce` and a `restore`")

    def _forward(self, plan: Reduction | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.original(*args, **kwargs) if plan is None else plan.execute(self.module, self.original, args, kwargs)

        # the reduced module alone is checkpointed: a recomputed selection could pick other tokens and give wrong gradients
        if self.injection.checkpoint_blocks and self.kind == "block" and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    def _passed(self, plan: Reduction, hidden_states: Tensor, kwargs: dict[str, Any]) -> Any:
        """The result of a module that computes nothing: what the plan makes of no token, and the text as it came."""
        image = plan.restore(None, hidden_states if self.kind == "block" else torch.zeros_like(hidden_states))
        if self.port.output is None:
            return image
        require(self.port.text is not None, f"{self._place()}: the plan {plan.__class__.__name__} of method "
                f"'{self.injection.method.name}' computes no token, and what the module gives for text would be missing; skip "
                "whole blocks or the feed-forward")
        result = [kwargs[self.port.text]] * 2
        result[self.port.output] = image
        return tuple(result)

    def _place(self) -> str:
        return f"backbone '{self.injection.backbone.name}', block {self.block}, {self.name or 'whole'} ({self.kind} site)"

    def _joined(self, results: list[Any], join: Callable[[Sequence[Tensor]], Tensor]) -> Any:
        """Results of several runs of the module as one: `join` of the parts that belong together."""
        if self.port.output is None:
            return join(results)
        # the last block gives no text, and a skipped one the text that nobody reads after it
        return tuple(None if any(part is None for part in parts) else join(parts) for parts in zip(*results, strict=True))

    def _hidden_states(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return kwargs[self.port.image] if self.port.image in kwargs else args[self.port.position]

    def _rows(self, rows: list[int], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """These rows of every argument that has rows; rotary tables are shared by the batch."""
        batch = self._hidden_states(args, kwargs).shape[0]
        run = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else rows

        def some(name: str | int, value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch and name != self.port.rotary
            return value[run] if has_rows else value

        return tuple(some(i, value) for i, value in enumerate(args)), {name: some(name, value) for name, value in kwargs.items()}

    def _image(self, result: Any) -> Tensor:
        return result if self.port.output is None else result[self.port.output]

    def _with_image(self, result: Any, image: Tensor) -> Any:
        if self.port.output is None:
            return image
        return tuple(image if i == self.port.output else value for i, value in enumerate(result))

    def __deepcopy__(self, memo: dict) -> _Routed:
        # a copied block (EMA) must run its own weights, not the original's
        return _Routed(memo[id(self.module)], self.port, self.injection, (self.block, self.kind, self.name))

    def __reduce__(self) -> Any:
        raise TypeError("a model with a token-reduction method attached cannot be pickled; leave the `attach` context first")


class Injection:
    """A method attached to a backbone. Made by `attach`; `call` must be set before each call of the transformer."""

    def __init__(self, backbone: Backbone, method: Method, run: Run) -> None:
        self.backbone, self.method, self.run = backbone, method, run
        self.views = backbone.port.blocks(backbone.transformer)
        self.token_count = TokenCount(self.views)
        self.suspended = False
        self.checkpoint_blocks = False
        """Recompute each block in the backward pass instead of keeping its activations (training)."""
        self.features: list[tuple[Tensor, Tensor]] | None = None
        self.dense_pass: Callable[[], AbstractContextManager[None]] = nullcontext
        """Around a module's extra pass on every token, for plans that `wants_dense`: counting books it apart."""
        self._call: Call | None = None
        self._memory: dict[int, dict[str, Any]] = {}
        self._routed: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._compiled: list[nn.Module] = []
        self._watched: list[tuple[int, str]] = []

    def begin_call(self, call: Call) -> None:
        """Describe the next call of the transformer."""
        self._call, self._memory = call, {}
        for block, name in self._watched:
            self.token_count.tokens[call.step, block, name] = (0, self.run.num_tokens)
        self.method.before(call)

    def site(self, block: int, kind: SiteKind, module: str) -> Site:
        """The site of one module in the present call."""
        if self._call is None:
            raise RuntimeError("the transformer was called outside the sampler: begin_call() was not given")
        return Site(self._call, self.run, block, kind, module, self.memory(block))

    def memory(self, block: int) -> dict[str, Any]:
        """What the sites of `block` noted in the present call, such as router scores."""
        return self._memory.setdefault(block, {})

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Within this context the transformer is the dense one."""
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False

    @contextmanager
    def recording(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect (input, output) image tokens (B, N, D) of every block, in order."""
        self.features = features = []
        try:
            yield features
        finally:
            self.features = None

    def install(self) -> None:
        """Route every module of the method's kinds. Raises when there is none, or when something else is installed."""
        compiling.check_graphs(self.run.compile, self.run.device, "sampler.compile")
        for index, view in enumerate(self.views):
            if "block" in self.method.sites:
                self._route(view.block, view.port, (index, "block", ""))
            for name, (kind, port) in view.branches.items():
                if kind in self.method.sites:
                    self._route(view.block.get_submodule(name), port, (index, kind, name))
        require(bool(self._routed) or not self.method.sites,
                f"method '{self.method.name}' acts at {sorted(self.method.sites)}, but backbone '{self.backbone.name}' offers no "
                f"such site in its {len(self.views)} blocks; it would silently do nothing")
        self._compile_others()
        if self.method.hooks_model:
            self.method.attach(self.backbone.transformer)
            self._watch()
        if self.method.sites:
            self._take_facts()

    def _take_facts(self) -> None:
        """Let the model tell what conditions it: the timestep's embedding and the pooled prompt."""
        transformer, embedder = self.backbone.transformer, self.backbone.port.time_embedder
        self._hooks = [transformer.register_forward_pre_hook(self._take_conditioning, with_kwargs=True)]
        if isinstance(embedder, str):
            self._hooks.append(transformer.get_submodule(embedder).register_forward_hook(self._take_time))

    def forward_of(self, module: nn.Module) -> Callable[..., Any]:
        """The module's own forward, compiled where the run asks for it."""
        if self.run.compile == "off":
            return type(module).forward.__get__(module)
        return partial(compiled(self.backbone.transformer, type(module), self.run.compile), module)

    def _compile_others(self) -> None:
        """Compile the blocks in which nothing is routed; a compiled block would swallow what is routed inside it."""
        if self.run.compile == "off":
            return
        require(not self.method.hooks_model, f"sampler.compile: '{self.run.compile}', but method '{self.method.name}' acts by "
                "hooks that a compiled block would swallow; set sampler.compile: off")
        for view in self.views:
            if not any("forward" in vars(module) for module in view.block.modules()):
                view.block.forward = self.forward_of(view.block)
                self._compiled.append(view.block)

    def remove(self) -> None:
        """Leave the untouched model."""
        for module in (*self._routed, *self._compiled):
            del module.forward
        for hook in self._hooks:
            hook.remove()
        if self.method.hooks_model and self._watched:
            self.method.detach()
        self._routed, self._compiled, self._hooks, self._watched = [], [], [], []

    def _watch(self) -> None:
        """Let the first layer inside each attention and feed-forward tell that it ran: hooks of others leave it out."""
        for index, view in enumerate(self.views):
            for name in view.branches or ("",):
                module = view.block.get_submodule(name) if name else view.block
                layers = (part for path, part in module.named_modules() if isinstance(part, nn.Linear) and "norm" not in path)
                layer = next(layers)
                self._hooks.append(layer.register_forward_pre_hook(self._ran(index, name)))
                self._watched.append((index, name))

    def _ran(self, block: int, name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: Any) -> None:
            if self._call is not None:
                self.token_count.tokens[self._call.step, block, name] = (self.run.num_tokens, self.run.num_tokens)

        return note

    @property
    def routed(self) -> list[_Routed]:
        """What runs in place of each routed module's forward."""
        return [vars(module)["forward"] for module in self._routed]

    def _route(self, module: nn.Module, port: ModulePort, place: tuple[int, SiteKind, str]) -> None:
        if "forward" in module.__dict__:
            raise RuntimeError(f"block {place[0]} {place[2]}: its forward is already replaced by {module.__dict__['forward']!r}; "
                               "attach token reduction first, caches and offloading after it")
        module.forward = _Routed(module, port, self, place)
        self._routed.append(module)

    def _take_time(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._call is not None:
            self._call.time_embedding = output

    def _take_conditioning(self, module: nn.Module, args: Any, kwargs: dict) -> None:
        port = self.backbone.port
        if self._call is not None:
            self._call.pooled_prompt = partial(port.pooled_prompt, module, kwargs)
            if not isinstance(port.time_embedder, str):
                self._call.time_embedding = partial(port.time_embedder, module, kwargs)


@contextmanager
def attach(backbone: Backbone, method: Method, run: Run) -> Iterator[Injection]:
    """Attach `method` to the backbone's transformer for the length of the context."""
    injection = Injection(backbone, method, run)
    try:
        injection.install()
        yield injection
    finally:
        injection.remove()
