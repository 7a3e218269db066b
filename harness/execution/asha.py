"""ASHA: which training goes on next, decided anew whenever a worker is free, from what the folder holds at that moment.

Source: Li et al. 2020, arXiv:1810.05934, Algorithm 2. A row is promoted to the next rung as soon as it is among the best
1/reduction_factor of the rows that have come to its rung so far; where none can be, the next row begins. The sweep's rows are a
finite list, so a rung to which no more rows can come promotes ceil(n / factor) of its n: at least the rows that synchronous
halving would have, and a single row goes on. (Ray Tune's ASHA scheduler is the stopping variant: it pauses nothing, its first
rows always run to the end, and what it knows is lost with the driver.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from harness.execution.results_folder import Job, ResultsFolder
from harness.sweep.search.config import Asha
from harness.sweep.search.halving import best, loss_at


class Promotions:
    """`following()` is the next job to run; None where there is none now, or none until a job that runs is over.

    ladders: {trial_id: its rung jobs in order and, last, its score job}. groups: rows that are compared, by trial_id. others:
    jobs to do where no row can be promoted or begun.
    """

    def __init__(self, asha: Asha, folder: ResultsFolder, ladders: Mapping[str, Sequence[Job]], groups: Sequence[Sequence[str]],
                 others: Sequence[Job]) -> None:
        self.asha, self.folder, self.ladders, self.groups, self.others = asha, folder, ladders, groups, others
        self.given: set[str] = set()
        self._outcomes: dict[str, float | None] = {}

    @property
    def jobs(self) -> list[Job]:
        """All that `following` may ever give, the higher rungs last."""
        rungs = [ladder[index] for index in range(len(self.asha.rungs) + 1) for ladder in self.ladders.values()]
        return [*rungs, *self.others]

    def following(self) -> Job | None:
        """The next job, which is then taken as given out."""
        job = self.peek()
        if job is not None:
            self.given.add(job.key)
        return job

    def peek(self) -> Job | None:
        """What `following` would give."""
        for index in reversed(range(len(self.asha.rungs))):
            for group in self.groups:
                for row in self._promotable(group, index):
                    return self.ladders[row][index + 1]
        begin = (ladder[0] for row, ladder in self.ladders.items() if self._level(row) < 0)
        return next(begin, None) or next((job for job in self.others if not self._reached(job)), None)

    def stopped(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(trial_id, where and why it was stopped) of the rows that were not promoted, once nothing is left to do."""
        for group in self.groups:
            for index in range(len(self.asha.rungs)):
                losses, number = self._losses(group, index), index + 1
                ranked = sorted(losses, key=lambda row, losses=losses: losses[row])
                went_on = sum(self._level(row) > index for row in ranked)
                for rank, row in enumerate(ranked, 1):
                    if self._level(row) == index:
                        yield row, {"rung": number, "of": len(self.asha.rungs), "metric": self.asha.metric, "value": losses[row],
                                    "step": int(self.ladders[row][index].kind.removeprefix("rung")), "rank": rank,
                                    "rows": len(ranked), "went_on": went_on}

    # -------------------------------------------------------------------------------------------- one rung

    def _promotable(self, group: Sequence[str], index: int) -> list[str]:
        """Rows of the group that have earned the rung after `index` and not begun it, best first."""
        losses = self._losses(group, index)
        rounded: Callable[[float], int] = math.ceil if self._settled(group, index) else math.floor
        return [row for row in best(losses, rounded(len(losses) / self.asha.reduction_factor)) if self._level(row) == index]

    def _settled(self, group: Sequence[str], index: int) -> bool:
        """Whether all rows that will ever come to the rung have come and are over there."""
        if index == 0:
            complete = all(self._level(row) >= 0 for row in group)
        else:
            complete = self._settled(group, index - 1) and not self._promotable(group, index - 1)
        return complete and all(self._over(self.ladders[row][index]) for row in group if self._level(row) >= index)

    def _losses(self, group: Sequence[str], index: int) -> dict[str, float]:
        losses = {}
        for row in group:
            job = self.ladders[row][index]
            if self._level(row) >= index and self._over(job) and self._outcomes[job.key] is not None:
                losses[row] = self._outcomes[job.key]
        return losses

    def _level(self, row: str) -> int:
        """The highest rung that the row has begun or is over with; the score job counts as the last; -1 before the first."""
        level = -1
        for job in self.ladders[row]:
            if not self._reached(job):
                break
            level += 1
        return level

    def _reached(self, job: Job) -> bool:
        return job.key in self.given or self._over(job)

    def _over(self, job: Job) -> bool:
        """Whether the job has an outcome, which is read once: this is asked all the time."""
        if job.key not in self._outcomes and (self.folder.finished(job) or self.folder.failed(job)):
            self._outcomes[job.key] = loss_at((self.folder.part(job.key) or {}).get("series") or {}, self.asha.metric)
        return job.key in self._outcomes
