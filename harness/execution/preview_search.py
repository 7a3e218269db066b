"""The plan of a search in words and FLOPs, for --dry-run: what is tried, in which batches, up to which rungs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.sweep.file import Entry, Sweep
from harness.sweep.resolve import grown
from harness.sweep.search.checks import rung_steps
from harness.sweep.search.config import Search
from harness.sweep.search.draws import draw
from harness.sweep.search.halving import counts, group_key

SAMPLED = 4
"""Points of a space whose FLOPs stand for those that Optuna will suggest."""
Cost = Callable[[Entry], tuple[float | None, float]]
"""GFLOPs of sampling (None where they cannot be told) and of training."""


def plan_lines(sweep: Sweep, cost: Cost) -> Iterator[str]:
    """The plan, a line at a time; nothing for a sweep without a search or rungs."""
    if sweep.search:
        yield from _search_lines(sweep, cost)
    if sweep.asha:
        yield from _rung_lines(sweep, cost)


def _search_lines(sweep: Sweep, cost: Cost) -> Iterator[str]:
    options, search = sweep.search.options, sweep.search
    known = [entry for entry in sweep.entries if entry.number]
    yield f"Search: {_how(search)}; {options.num_trials or len(known)} trials beside the rows of methods."
    for name, cases in search.space.parameters.items():
        yield f"  {name}: {'; '.join(map(str, cases))}"
    for objective in options.objectives:
        corner = "the worst value found" if objective.reference is None else f"{objective.reference:g}"
        yield f"  objective: {objective.direction} {objective.metric}, hypervolume up to {corner}"
    if search.asks:
        points = [search.space.assign(lambda domain, i=i: draw(domain, options.seed, i)) for i in range(SAMPLED)]
        drawn = [entry for entry in grown(sweep, points, 1)[0].entries if entry.number]
        costs = [cost(entry) for entry in drawn]
        known_costs = [(sampling, training) for sampling, training in costs if sampling is not None]
        if known_costs:
            mean = sum(sampling + training for sampling, training in known_costs) / len(known_costs)
            yield (f"  about {mean * options.num_trials:,.0f} GFLOPs: {options.num_trials} times the mean of {len(known_costs)} "
                   "points drawn at random; what will be suggested is not known yet")


def _how(search: Search) -> str:
    options = search.options
    if search.asks:
        return f"Optuna ({options.sampler}), {options.parallel} suggestions at once, seed {options.seed}"
    return "every point of the grid" if options.algorithm == "grid" else f"random draws, seed {options.seed}"


def _rung_lines(sweep: Sweep, cost: Cost) -> Iterator[str]:
    asha, groups = sweep.asha, {}
    for entry in sweep.entries:
        if entry.trial["train"]:
            groups.setdefault(group_key(entry.trial), []).append(entry)
    when = "when all have come" if asha.synchronous else "as soon as it is among the best so far"
    yield (f"Rungs: compared by {asha.metric} at {', '.join(f'{fraction:g}' for fraction in asha.rungs)} of the steps; one in "
           f"{asha.reduction_factor:g} goes on, {when}.")
    least = "" if asha.synchronous else "at least "
    for entries in groups.values():
        numbers = counts(len(entries), len(asha.rungs), asha.reduction_factor)
        steps = [*rung_steps(asha, entries[0].trial), entries[0].trial["train"]["steps"]]
        ladder = ", ".join(f"{least if i else ''}{number} to step {step}"
                           for i, (number, step) in enumerate(zip(numbers, steps, strict=True)))
        shares = [0.0, *asha.rungs, 1.0]
        spent = sum(number * (end - begin) for number, begin, end in zip(numbers, shares, shares[1:], strict=False))
        whole = sum(cost(entry)[1] for entry in entries)
        yield (f"  {ladder}: {least or 'about '}{whole * spent / len(entries):,.0f} of {whole:,.0f} GFLOPs of training; the "
               "others are rows that say where they were stopped")
