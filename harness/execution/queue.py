"""What a sweep runs next, round by round: everything at once, a batch of suggestions, or trainings with rungs.

A round is decided by the results folder alone, from what the rounds before it left there. So a sweep that was killed comes to
the same decisions, with nothing to do until it is where it was. In a round of ASHA the jobs themselves are decided one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.api import ConfigError, Result
from harness.execution.asha import Promotions
from harness.execution.results_folder import Job, ResultsFolder
from harness.sweep.file import Entry, Sweep
from harness.sweep.resolve import grown
from harness.sweep.search.checks import rung_steps
from harness.sweep.search.halving import group_key, loss_at, survivors
from harness.sweep.search.suggest import Suggestions


@dataclass(frozen=True)
class Round:
    """title: '' where there is one round only. jobs: to do now. before: jobs of this round that were over already.

    promotions: where given, `jobs` are those it may give out, one by one.
    """

    title: str
    jobs: Sequence[Job]
    before: int
    promotions: Promotions | None = None


class Rounds:
    """Iterate over it and do the jobs of each round before asking for the next.

    sweep: with the trials known so far. rungs: {trial_id: kinds of its rung jobs}. stopped: {trial_id: where and why}.
    """

    def __init__(self, sweep: Sweep, folder: ResultsFolder) -> None:
        self.sweep, self.folder = sweep, folder
        self.rungs: dict[str, list[str]] = {}
        self.stopped: dict[str, dict[str, Any]] = {}
        self._given: set[str] = set()

    def __iter__(self) -> Iterator[Round]:
        if self.sweep.search and self.sweep.search.asks:
            yield from self._batches()
            return
        if self.sweep.asha:
            yield from self._halving() if self.sweep.asha.synchronous else self._promoted()
        left = [entry for entry in self.sweep.entries if entry.trial_id not in self.stopped and not self._lost(entry)]
        title = f"the {len(left)} of {len(self.sweep.entries)} trials that no rung stopped" if self.sweep.asha else ""
        last = self._round(title, left)
        again = [job for job in last.jobs if job.key in self._given and self.folder.failed(job)]  # it failed just now
        yield dataclasses.replace(last, jobs=[job for job in last.jobs if job not in again], before=last.before + len(again))

    def merge(self, entry: Entry) -> Result:
        """The result of a trial, with what its rungs left."""
        return self.folder.merge(entry, self.sweep.name, self.rungs.get(entry.trial_id, ()), self.stopped.get(entry.trial_id))

    def _round(self, title: str, entries: Sequence[Entry], final: bool = False) -> Round:
        """The missing jobs of `entries`. final: a failure is an outcome that later decisions rest on, and is not tried again."""
        jobs = self.folder.missing(dataclasses.replace(self.sweep, entries=list(entries)))
        todo = [job for job in jobs if not (final and self.folder.failed(job))]
        return Round(title, todo, 2 * len(entries) - len(todo))

    # -------------------------------------------------------------------------------------------- suggestions

    def _batches(self) -> Iterator[Round]:
        search = self.sweep.search
        fixed, suggestions = self.sweep.entries, Suggestions(search)
        yield self._round("the trials of methods", fixed)
        total = search.options.num_trials
        for first in range(0, total, search.options.parallel):
            size = min(search.options.parallel, total - first)
            self.sweep, ids = grown(self.sweep, suggestions.ask(size), first + 1)
            self.folder.extend(self.sweep)
            entries = {entry.trial_id: entry for entry in self.sweep.entries}
            refused = [str(one) for one in ids if isinstance(one, ConfigError)]
            title = f"suggestions {first + 1}-{first + size} of {total}" + "".join(f" (refused: {text})" for text in refused)
            batch = self._round(title, [entries[key] for key in dict.fromkeys(ids) if key in entries], final=True)
            if batch.jobs or refused:
                yield batch
            suggestions.tell([self._objectives(entries[key]) if key in entries else None for key in ids])

    def _objectives(self, entry: Entry) -> list[float] | None:
        result = self.merge(entry)
        values = [result["metrics"].get(objective.metric, {}).get("value") for objective in self.sweep.search.options.objectives]
        return None if None in values else values

    # -------------------------------------------------------------------------------------------- rungs

    def _halving(self) -> Iterator[Round]:
        """A round for each rung that still has something to train."""
        asha, alive = self.sweep.asha, [entry for entry in self.sweep.entries if entry.trial["train"]]
        for index in range(len(asha.rungs)):
            jobs = {entry.trial_id: self._rung_job(entry, index) for entry in alive}
            todo = [job for job in jobs.values() if not self.folder.finished(job) and not self.folder.failed(job)]
            if todo:
                yield Round(f"rung {index + 1} of {len(asha.rungs)}, {len(alive)} trainings", todo, len(jobs) - len(todo))
            alive = self._going_on(alive, jobs, index)

    def _promoted(self) -> Iterator[Round]:
        """One round of trainings and score jobs, where anything is left of them."""
        groups: dict[str, list[str]] = {}
        for entry in self.sweep.entries:
            if entry.trial["train"]:
                groups.setdefault(group_key(entry.trial), []).append(entry.trial_id)
        scores = {job.trial_id: job for job in self.folder.jobs(self.sweep) if job.kind == "score"}
        trained = [entry for entry in self.sweep.entries if entry.trial["train"]]
        ladders = {entry.trial_id: [*(self._rung_job(entry, index) for index in range(len(self.sweep.asha.rungs))),
                                    scores[entry.trial_id]] for entry in trained}
        promotions = Promotions(self.sweep.asha, self.folder, ladders, list(groups.values()),
                                [job for trial_id, job in scores.items() if trial_id not in ladders])
        self.folder.forget_failures(list(scores.values()))  # a failed training is an outcome; a failed score is tried again
        if promotions.peek():
            left = [job for job in promotions.jobs if not self.folder.finished(job) and not self.folder.failed(job)]
            yield Round(f"{len(trained)} trainings, promoted when they are among the best at their rung", left,
                        len(promotions.jobs) - len(left), promotions)
        self.stopped.update(promotions.stopped())
        self._given = promotions.given

    def _rung_job(self, entry: Entry, index: int) -> Job:
        kind = f"rung{rung_steps(self.sweep.asha, entry.trial)[index]}"
        self.rungs.setdefault(entry.trial_id, []).append(kind)
        return Job(kind, entry.trial_id, entry.label, entry.code, self.sweep.resources.threads, entry.trial)

    def _going_on(self, alive: Sequence[Entry], jobs: Mapping[str, Job], index: int) -> list[Entry]:
        """The rows that train on, in the order of the sweep; the others are noted as stopped, or are failed rows."""
        asha, groups = self.sweep.asha, {}
        for entry in alive:
            part = self.folder.part(jobs[entry.trial_id].key) or {}
            loss = loss_at(part.get("series") or {}, asha.metric)
            if loss is not None:
                groups.setdefault(group_key(entry.trial), {})[entry.trial_id] = loss
        kept: set[str] = set()
        for losses in groups.values():
            best = survivors(losses, asha.reduction_factor)
            kept |= set(best)
            ranked = sorted(losses, key=lambda key, losses=losses: losses[key])
            for rank, key in enumerate(ranked[len(best):], len(best) + 1):
                self.stopped[key] = {"rung": index + 1, "of": len(asha.rungs), "step": int(jobs[key].kind.removeprefix("rung")),
                                     "metric": asha.metric, "value": losses[key], "rank": rank, "rows": len(ranked),
                                     "went_on": len(best)}
        return [entry for entry in alive if entry.trial_id in kept]

    def _lost(self, entry: Entry) -> bool:
        """Whether a rung job of the trial failed, so that it is in no later round."""
        parts = (self.folder.part(f"{entry.trial_id}.{kind}") for kind in self.rungs.get(entry.trial_id, ()))
        return any(part["error"] for part in parts if part and "error" in part)
