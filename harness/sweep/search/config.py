"""The sections `search` and `asha` of a sweep file, checked. What their names of metrics mean is checked in `resolve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.api import build_config, require, show
from harness.sweep.search.space import Space, parse_space

MAX_SEARCH, MAX_SEED = 1000, 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Objective:
    """metric: a measured name. reference: the worst value that still counts, in the metric's unit; None: the worst one found."""

    metric: str
    direction: Literal["minimize", "maximize"]
    reference: float | None = None

    @property
    def sign(self) -> int:
        """1 where less is better, else -1: times the value, less is better."""
        return 1 if self.direction == "minimize" else -1


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """algorithm: grid (every point), random (drawn up front), optuna (ask, run, tell). num_trials: of random and optuna.

    seed: of draws and of the sampler. parallel: suggestions that are asked for at once; part of the search's meaning, for a later
    batch learns from the earlier ones. objectives: one or two; needed by optuna, else for the report alone.
    """

    algorithm: Literal["grid", "random", "optuna"]
    space: dict
    num_trials: int | None = None
    seed: int = 0
    parallel: int = 4
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    objectives: tuple[Objective, ...] = ()

    def __post_init__(self) -> None:
        asks, grid = self.algorithm == "optuna", self.algorithm == "grid"
        require(grid or self.num_trials is not None, f"num_trials is missing; say how many trials {self.algorithm} "
                "takes, such as 20")
        require(not grid or self.num_trials is None, "num_trials: a grid has as many trials as points; remove num_trials")
        require(grid or 1 <= self.num_trials <= MAX_SEARCH, f"num_trials must be at least 1 and at most {MAX_SEARCH}, got "
                f"{self.num_trials}")
        require(0 <= self.seed <= MAX_SEED, f"seed must be at least 0 and at most {MAX_SEED}, got {self.seed}")
        require(1 <= self.parallel <= 256, f"parallel must be at least 1 and at most 256, got {self.parallel}")
        require(not asks or bool(self.objectives), "objectives is missing; optuna needs one or two, such as "
                "[{metric: compute/flops_cut, direction: maximize}]")
        names = [objective.metric for objective in self.objectives]
        require(len(names) <= 2, f"objectives: {len(names)} are given; front and hypervolume are defined here for one or two")
        require(len(set(names)) == len(names), f"objectives: '{names[0] if names else ''}' is given twice; remove one")


@dataclass(frozen=True)
class Search:
    """A checked `search` section."""

    options: SearchOptions
    space: Space

    @property
    def asks(self) -> bool:
        """Whether its trials are known only as it goes on."""
        return self.options.algorithm == "optuna"


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Successive halving of the trained rows. metric: a validation loss. rungs: fractions of `train.steps` at which rows are
    compared. reduction_factor: of the rows at a rung, one in this many goes on. synchronous: a rung waits for all its rows, so
    that whom it stops does not depend on which worker was faster."""

    metric: Literal["val/diffusion_mse", "val/dense_mse"] = "val/diffusion_mse"
    rungs: tuple[float, ...] = (0.25, 0.5)
    reduction_factor: float = 2.0
    synchronous: bool = False

    def __post_init__(self) -> None:
        require(bool(self.rungs), "rungs: expected fractions such as [0.25, 0.5], got []")
        rising = all(low < high for low, high in zip(self.rungs, self.rungs[1:], strict=False))
        require(rising and 0 < self.rungs[0] and self.rungs[-1] < 1, "rungs: expected rising fractions between 0 and 1 such as "
                f"[0.25, 0.5], got {list(self.rungs)}; the end of the training is no rung")
        require(len(self.rungs) <= 16, f"rungs: at most 16 are possible, got {len(self.rungs)}")
        require(1 < self.reduction_factor <= 1000, "reduction_factor must be above 1 and at most 1000, got "
                f"{self.reduction_factor}")


def parse_search(written: Any, where: str) -> Search | None:
    """The `search` section; None where there is none."""
    if written is None:
        return None
    options = build_config(SearchOptions, written, where, axis=False)
    for key in ("parallel", "sampler"):
        require(options.algorithm == "optuna" or key not in written, f"{where}.{key}: only algorithm optuna has it; remove it")
    return Search(options, parse_space(written["space"], f"{where}.space"))


def parse_asha(written: Any, where: str, search: Search | None) -> Asha | None:
    """The `asha` section; None where there is none, and `{}` takes the defaults."""
    if written is None:
        return None
    require(isinstance(written, Mapping), f"{where}: expected options such as {{rungs: [0.25, 0.5]}}, got {show(written)}")
    require(search is None or not search.asks, f"{where}: not possible with search.algorithm optuna, whose study would mix rows "
            "that were stopped with rows that were finished; take random or grid")
    return build_config(Asha, written, where, axis=False)
