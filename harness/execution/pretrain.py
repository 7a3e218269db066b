"""python -m harness.execution.pretrain SWEEP.yaml: train every trained row of a sweep into the store, by all processes launched.

  one process                  python -m harness.execution.pretrain SWEEP.yaml
  8 GPUs                       accelerate launch --multi_gpu --num_processes 8 -m harness.execution.pretrain SWEEP.yaml
  2 processes on CPU           torchrun --nproc_per_node 2 -m harness.execution.pretrain SWEEP.yaml

Afterwards `python -m harness.run SWEEP.yaml` finds the trained parts. A batch is divided among the processes, so what is trained
does not depend on their number; a training that was killed goes on from its last checkpoint, with any number of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.api import ConfigError, Trial, require
from harness.execution.driver import DONE, INTERRUPTED, REFUSED, resolved

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: rank 0 may wait for another job that trains the same part."""


def pretrain(sweep_path: Path, results: Path, console: Console) -> int:
    """Train what is missing of the sweep into `results/.cache`; returns the number of trained rows. Collective."""
    sweep = resolved(sweep_path)
    from harness.execution.checks import check
    from harness.execution.machine import Machine
    from harness.storage.store import Store

    trained = [entry for entry in sweep.entries if entry.trial["train"]]
    check(sweep, Machine.of(local=True), Store(results / ".cache"), {entry.trial_id for entry in trained})
    with _processes([entry.trial for entry in trained]) as (rank, size):
        import torch

        from harness.trial.job import pretrain as train_one

        if rank == 0:
            console.print(f"{sweep.name}: {len(trained)} trained rows, {size} process{'es' if size > 1 else ''}")
        for entry in trained:
            torch.set_num_threads(entry.trial["threads"])
            with _shown(entry.label, console, rank) as progress:
                facts = train_one(entry.trial, Store(results / ".cache"), progress)
            if rank == 0:
                parts = ", ".join(f"{stage} {fact['store']}" for stage, fact in facts["stages"].items())
                console.print(f"{entry.label}: {parts}", markup=False, highlight=False, soft_wrap=True)
    return len(trained)


@contextmanager
def _processes(trials: Sequence[Trial]) -> Iterator[tuple[int, int]]:
    """(rank, number) of this process, with torch.distributed set up where there are several."""
    from accelerate import PartialState

    devices = {str(trial["backbone"].get("device", "cpu")) for trial in trials}
    state = PartialState(cpu=not any(device.startswith("cuda") for device in devices), timeout=PATIENCE)
    require(state.num_processes == 1 or devices <= {"cpu", "cuda"},
            f"backbone.device: {sorted(devices)} names one device for {state.num_processes} processes; write cuda")
    try:
        yield state.process_index, state.num_processes
    finally:
        state.destroy_process_group()


@contextmanager
def _shown(label: str, console: Console, rank: int) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left for each stage, on the first process."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=rank > 0) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{label}  {stage}", total=total)
            bars.update(tasks[stage], completed=done)

        yield progress


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.execution.pretrain",
                                     description="Train the rows of a sweep into its store.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    args = parser.parse_args(arguments)
    try:
        pretrain(args.sweep, args.results, Console(width=None if sys.stdout.isatty() else 160))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. The same command goes on from the last checkpoint.\n")
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
