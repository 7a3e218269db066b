"""Suggestions of Optuna, by ask and tell. The only module that imports it.

There is no study file: a search that goes on asks the same seeded sampler the same questions from the first batch, and tells it
what the results folder holds. So it is given the same suggestions, and only what the folder lacks is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from harness.sweep.search.config import Search
from harness.sweep.search.space import Domain, Point

MAX_STARTUP, MAX_POPULATION = 10, 50
"""Optuna's own numbers, too many for a short search."""


class Suggestions:
    """A study in memory. `ask` and `tell` take turns; what is told must follow the order of what was asked."""

    def __init__(self, search: Search) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.asked = search.space, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            directions = [objective.direction for objective in search.options.objectives]
            self.study = optuna.create_study(directions=directions, sampler=_sampler(search))

    def ask(self, count: int) -> list[Point]:
        """The next points. Those of one call do not know each other's outcome."""
        self.asked = [self.study.ask() for _ in range(count)]
        return [self.space.assign(lambda domain, trial=trial: _suggested(trial, domain)) for trial in self.asked]

    def tell(self, outcomes: Sequence[Sequence[float] | None]) -> None:
        """The objectives of each point of the last `ask`; None where the trial failed."""
        from optuna.trial import TrialState

        for trial, values in zip(self.asked, outcomes, strict=True):
            if values is None:
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                self.study.tell(trial, [float(value) for value in values])  # whole numbers crash its estimator


def _sampler(search: Search) -> Any:
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    options = search.options
    if options.sampler == "random":
        return RandomSampler(seed=options.seed)
    if options.sampler == "nsga2":
        return NSGAIISampler(seed=options.seed, population_size=min(MAX_POPULATION, max(2, options.num_trials // 4)))
    return TPESampler(seed=options.seed, n_startup_trials=min(MAX_STARTUP, max(1, options.num_trials // 3)), multivariate=False,
                      constant_liar=True)


def _suggested(trial: Any, domain: Domain) -> Any:
    if domain.kind == "choice":  # by index: a choice may be a list, which Optuna does not take
        return domain.values[trial.suggest_categorical(domain.key, list(range(len(domain.values))))]
    low, high = domain.values
    if domain.kind == "int":
        return trial.suggest_int(domain.key, low, high)
    return domain.rounded(trial.suggest_float(domain.key, low, high, log=domain.kind == "log_uniform"))
