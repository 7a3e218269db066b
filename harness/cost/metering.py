"""Whose FLOPs: while a loop is counted, the method's and its plans' are kept apart from the transformer's.

Method and plans are stood in for by objects that forward all they are asked, and book what that takes as the method's. Only what
is booked otherwise is written here, so a hook that the contract gains is forwarded and booked without a change.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from harness.api import Method, Reduction, Site
from harness.engine.tokens import Mixture, PerRow

STATE = ("reset", "before", "observe", "attach")
"""Hooks by which a method can carry something from step to step; one that has none of them carries nothing."""


class Tally:
    """FLOPs seen so far, in three books: the transformer's, the method's, and what is left out."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self._replayed: Counter = Counter()
        self._own: Counter = Counter()
        self._free: Counter = Counter()
        self._open = False

    def _seen(self) -> Counter:
        return Counter(self._counter.get_flop_counts().get("Global", {})) + self._replayed

    @contextmanager
    def _into(self, book: Counter) -> Iterator[None]:
        if self._open:  # a hook that calls another one: all of it is the first one's
            yield
            return
        before, self._open = self._seen(), True
        try:
            yield
        finally:
            self._open = False
            book.update(self._seen() - before)

    def method_scope(self) -> AbstractContextManager[None]:
        """What runs inside belongs to the method."""
        return self._into(self._own)

    def left_out(self) -> AbstractContextManager[None]:
        """What runs inside is in no number."""
        return self._into(self._free)

    def measured(self, function: Callable[[], Any]) -> tuple[Any, Counter]:
        """The result of `function` and the FLOPs it took."""
        before = self._seen()
        return function(), self._seen() - before

    def replay(self, flops: Counter) -> None:
        """Book FLOPs of work that was counted earlier."""
        self._replayed += flops

    def closed(self) -> tuple[int, int, int]:
        """(linear, attention, method) FLOPs: all books closed. linear, attention: of the transformer."""
        transformer = self._seen() - self._own - self._free
        attention = sum(flops for op, flops in transformer.items() if _is_attention(op))
        return sum(transformer.values()) - attention, attention, sum(self._own.values())


def _is_attention(op: Any) -> bool:
    return any(word in str(op) for word in ("bmm", "scaled_dot_product", "flash_attention", "efficient_attention"))


class _Forwarding:
    """Stands in for `inner`, whatever it is asked; what that takes is booked as the method's."""

    def __init__(self, inner: Any, tally: Tally) -> None:
        self._inner, self._tally = inner, tally

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """That of `inner`: whoever asks what it is, or names it in a message, means that."""
        return type(self._inner)

    def __getattr__(self, name: str) -> Any:
        with self._tally.method_scope():
            value = getattr(self._inner, name)
        if not inspect.isroutine(value):
            return value

        def booked(*args: Any, **kwargs: Any) -> Any:
            with self._tally.method_scope():
                return value(*args, **kwargs)

        return booked


class _MeteredPlan(_Forwarding):
    def execute(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        return self._inner.execute(module, forward, args, kwargs)  # the reduced module itself: no cost of the method's


def metered_plan(plan: Reduction | None, tally: Tally) -> Reduction | None:
    """`plan` with its own FLOPs booked as the method's; of plans that the injection takes apart, each part."""
    if plan is None:
        return None
    if not isinstance(plan, PerRow | Mixture):
        return _MeteredPlan(plan, tally)  # type: ignore[return-value]
    parts = {id(part): metered_plan(part, tally) for part in plan.plans}  # rows that share a plan go on sharing it
    twin = copy.copy(plan)
    twin.plans = [parts[id(part)] for part in plan.plans]
    return twin


class _WatchedCall:
    """A call that notes which of its facts a method reads."""

    def __init__(self, call: Any, read: set[str]) -> None:
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


class MeteredMethod(_Forwarding):
    """The method with its own FLOPs booked apart, and watched for looking at the step."""

    def __init__(self, method: Method, tally: Tally) -> None:
        super().__init__(method, tally)
        self._read: set[str] = set()

    @property
    def steps_alike(self) -> bool:
        """Whether nothing the method has done so far could differ in another step: it reads no step and carries no state."""
        kind = type(self._inner)
        return all(getattr(kind, hook) is getattr(Method, hook) for hook in STATE) and not self._read & {"step", "timestep"}

    def reduce(self, hidden_states: Tensor, site: Site) -> Reduction | None:
        """Its plan, metered."""
        watched = _WatchedSite(**{**vars(site), "call": _WatchedCall(site.call, self._read)})
        watched.raw = site
        with self._tally.method_scope():
            plan = self._inner.reduce(hidden_states, watched)
        return metered_plan(plan, self._tally)


class Remembered:
    """A module on the meta device that is really run once per distinct shapes (and other values) of its inputs."""

    def __init__(self, forward: Callable, place: tuple, memory: dict, tally: Tally) -> None:
        self._forward, self._place, self._memory, self._tally = forward, place, memory, tally

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the first call of this kind, its FLOPs booked each time."""
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
