"""What a metric is, what it sees of a trial, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from harness.api.backbone import Backbone
from harness.api.measure import GROUPS, Group, Measure
from harness.api.method import Method
from harness.api.registry import require, sources_of
from harness.api.sites import Run


@dataclass
class Subject:
    """A trial as a metric sees it: built, trained, its budget solved, and (in the score job) sampled.

    backbone is the dense model; `student` is the one the method runs on, the same object unless training adapted its weights.
    sampler: harness.engine.sampler.SamplerConfig. meter: harness.cost.flops.Meter of this backbone and sampler.
    images and dense_images: (n, height, width, 3) uint8, the pictures as they are saved, of `seeds` in order; None in the timing
    job, and dense_images is None for the dense trial itself. kept: fraction of image tokens as executed, {'attention' | 'ffn':
    [step][block]}. progress: (stage, done, total). store: harness.storage.store.Store. out_dir: folder of the files that belong
    to the trial. cost: harness.cost.flops.Cost as executed, of a dynamic method that has sampled; else the meter knows it.
    """

    trial: Mapping[str, Any]
    backbone: Backbone
    student: Backbone
    method: Method
    sampler: Any
    meter: Any
    prompts: list[str]
    seeds: list[int]
    store: Any
    progress: Callable[[str, int, int], None]
    images: Any = None
    dense_images: Any = None
    kept: dict[str, list[list[float]]] = field(default_factory=dict)
    cost: Any = None
    out_dir: Any = None

    @property
    def is_dense(self) -> bool:
        """Whether this is the reference row itself."""
        return self.method.name == "dense"


def disturbed(environment: Mapping[str, Any]) -> bool:
    """Whether a timing, by a timing part's `environment` or a whole result's, is not known to be clean: see `disturbance`."""
    return disturbance(environment) != "clean"


def disturbance(environment: Mapping[str, Any]) -> Literal["clean", "disturbed", "unknown"]:
    """What the metrics and the solver of a speed-up noted of other work beside their timing; 'clean' where nothing was timed.

    Their note is `contaminated`: False, True, or None where the machine does not tell.
    """
    noted = [notes for notes in environment.get("timing", environment).values()
             if isinstance(notes, Mapping) and "contaminated" in notes]
    if any(notes["contaminated"] for notes in noted):
        return "disturbed"
    return "unknown" if any(notes["contaminated"] is None or None in (notes.get("foreign_cpu_cores") or ()) for notes in noted) \
        else "clean"


class Unavailable(RuntimeError):
    """A metric cannot run here: weights cannot be fetched, or an optional package is not installed.

    The message is the reason in one short line; the trial reports it in place of the number and goes on. What could be checked
    before anything was computed, such as a wrong file, is a ConfigError instead.
    """


@dataclass(frozen=True)
class Planned:
    """What is known of a trial before it runs.

    num_real: real images of its data's split; 0 where there are none. run: of the sampler on its model; None where nothing is
    known of the model yet. timing_threads: of torch in its timing job; None where a machine elsewhere will say.
    """

    num_images: int
    num_real: int
    run: Run | None
    timing_threads: int | None


class Metric(ABC):
    """One file in `harness/metrics/`. Building it checks whatever can be checked before anything is computed."""

    name: ClassVar[str]
    group: ClassVar[Group] = "other"
    """What its numbers are about, where they do not say so themselves, and of those that cannot be had."""
    job: ClassVar[Literal["score", "timing"]] = "score"
    """Timing jobs have the machine to themselves; score jobs share it."""
    against_dense: ClassVar[bool] = False
    """Compares with the dense model's images, so it is left out for the dense trial itself."""
    needs_weights: ClassVar[bool] = True
    """Judges what a model draws or predicts. Where False, the number depends on shapes alone and random weights will do."""
    needs_reference: ClassVar[bool] = False
    """Compares with real images, so it is refused where the data set is prompts alone."""

    least_images: ClassVar[int] = 1
    """Of the trial, and where it compares with real images of these too."""

    measures: ClassVar[tuple[str, ...]] = ()
    """Names of what it yields, '{n}' for the number of images, where they do not depend on its options; else see `names`."""
    alias: str = ""
    """What the sweep calls this entry by `as`, so that two entries of one metric keep their numbers apart; '' for nothing."""

    @classmethod
    def sources(cls, config: Any) -> Sequence[Any]:
        """Files and folders that the options name: what is in them becomes part of the trial. See `Backbone.sources`."""
        return sources_of(config)

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        require(cls.group in GROUPS, f"metric class {cls.__name__}: its group is '{cls.group}'; take one of {', '.join(GROUPS)}")

    def __init__(self, config: Any) -> None:
        self.config = config

    def called(self, name: str) -> str:
        """`name` of a number as tables show it: with the alias, where there is one."""
        return f"{name}-{self.alias}" if self.alias else name

    def names(self, num_images: int) -> tuple[str, ...]:
        """What `measure` yields: what a search may name as its objective, and what is unavailable when it raises Unavailable."""
        return tuple(name.replace("{n}", str(num_images)) for name in self.measures) or (self.name,)

    def check(self, planned: Planned) -> None:
        """Raises ConfigError where it could not be measured of such a trial; asked before anything is computed."""
        require(planned.num_images >= self.least_images, f"{self.name}: it needs at least {self.least_images} images, and the "
                f"trial has {planned.num_images}; widen seeds, or remove {self.name}")
        require(not self.needs_reference or planned.num_real >= self.least_images, f"{self.name}: it compares with at least "
                f"{self.least_images} real images, and the data's split has {planned.num_real}; take another data set or split")

    @abstractmethod
    def measure(self, subject: Subject) -> Iterator[Measure]:
        """Yield the measured values. Raises Unavailable when they cannot be had here."""
