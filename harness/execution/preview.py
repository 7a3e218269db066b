"""--dry-run: what a sweep would do and about what it would cost. Writes nothing, starts nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.api import METHODS, named
from harness.execution.outcome import JOBS
from harness.execution.preview_search import plan_lines
from harness.execution.results_folder import ResultsFolder
from harness.execution.unused import unused
from harness.sweep.file import Entry, Sweep, budget_words

PROBE_S = 1.0
FEW = 4
"""So many numbers are written out."""
SLOW = 0.5
"""A format below this fraction of float32's speed is worth a word."""


def preview(sweep: Sweep, results: Path, console: Console) -> None:
    """Print one row per trial with its options and an estimate of its cost on this machine."""
    folder = ResultsFolder(results / sweep.name)
    missing = {job.key for job in folder.missing(sweep)}
    speeds = {dtype: gflops_per_s(sweep.resources.threads, dtype) for dtype in cpu_dtypes(sweep) or {"float32"}}
    speed = min(speeds.values())  # one dtype a sweep, as a rule
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("id", "trial", "options", "budget", "images", "steps", "to do"):
        table.add_column(name, no_wrap=name in ("id", "budget"))
    table.add_column("tokens computed")
    for name in ("sampling GFLOPs", "training GFLOPs", "about"):
        table.add_column(name, justify="right")
    total, notes, costs_of = 0.0, {}, {}
    for entry in sweep.entries:
        todo = [kind for kind in JOBS if f"{entry.trial_id}.{kind}" in missing]
        sampling, training, counts, note = _estimate(entry)
        costs_of[entry.trial_id] = sampling, training
        seconds = (sampling + training) / speed if sampling is not None and "score" in todo else 0.0
        total += seconds
        costs = ("?" if sampling is None else f"{sampling:,.0f}", f"{training:,.0f}" if training else "-", f"{seconds:,.0f} s")
        if note:
            notes.setdefault(note, []).append(entry.label)
        table.add_row(entry.trial_id, Text(entry.label), Text(_options(entry)), _budget(entry), str(_num_images(entry)),
                      str(entry.trial["sampler"]["num_steps"] or "default"), " ".join(todo) or "nothing", Text(counts), *costs)
    num_jobs = len(JOBS) * len(sweep.entries)
    console.print(Text(f"{sweep.name}: {len(sweep.entries)} trials, {len(missing)} of {num_jobs} jobs to do"))
    if sweep.question:
        console.print(Text(sweep.question))
    console.print(table, soft_wrap=not console.is_terminal)
    console.print(Text(
        f"Estimate: {total / 60:.1f} min of one worker for sampling and training: counted FLOPs at {speed:.0f} GFLOP/s, this "
        "machine's speed in a matrix product. Real layers reach a fraction of it; timing, metrics and start-up come on top."))
    plan = plan_lines(sweep, lambda entry: costs_of.get(entry.trial_id) or _estimate(entry)[:2])
    for line in (*plan, *slow_dtypes(sweep), *unused(folder, sweep)):
        console.print(Text(line), soft_wrap=True)
    for note, labels in notes.items():
        console.print(Text(f"No estimate for {', '.join(labels)}: {note}"))


def _estimate(entry: Entry) -> tuple[float | None, float, str, str]:
    """(GFLOPs of sampling, GFLOPs of training, numbers of tokens computed, why there is no estimate)."""
    from harness.trial.job import estimate

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of libraries
            cost = estimate(entry.trial)
    except Exception as error:  # whatever stops one trial must not hide the others
        return None, 0.0, "?", f"{type(error).__name__}: {error}"
    return cost["gflops_sampling"], cost.get("gflops_training") or 0.0, _counts(cost.get("token_counts"), entry), ""


def _counts(counts: list[int] | None, entry: Entry) -> str:
    """Distinct numbers of image tokens, each a shape that a compiler meets: '153 256', '14 numbers, 96 to 256'."""
    if counts is None:
        return "set by training" if entry.trial["train"] else "set by the run"
    return " ".join(map(str, counts)) if len(counts) <= FEW else f"{len(counts)} numbers, {counts[0]} to {counts[-1]}"


def _options(entry: Entry) -> str:
    """The method's options that are not its defaults."""
    method = entry.trial["method"]
    usual = {field.name: field.default for field in dataclasses.fields(METHODS.get(method["name"]).Config)}
    return " ".join(f"{key}={value}" for key, value in named(method)[1].items() if _plain(usual[key]) != value) or "-"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _budget(entry: Entry) -> str:
    budget: dict[str, Any] | None = entry.trial["budget"]
    return "-" if not budget else budget_words(budget) + (" FLOPs" if "flops_cut" in budget else " speed")


def _num_images(entry: Entry) -> int:
    first, last = entry.trial["seeds"]
    return last - first + 1


def cpu_dtypes(sweep: Sweep) -> set[str]:
    """The number formats in which trials of `sweep` run on a CPU."""
    backbones = [trial["backbone"] for trial in sweep.trials if str(trial["backbone"].get("device", "cpu")) == "cpu"]
    return {backbone["dtype"] for backbone in backbones if "dtype" in backbone}


def slow_dtypes(sweep: Sweep) -> list[str]:
    """A sentence for each format that this CPU only emulates: bfloat16 then takes tens of times as long as float32."""
    notes, usual = [], 0.0
    for dtype in sorted(cpu_dtypes(sweep) - {"float32"}):
        usual = usual or gflops_per_s(1, "float32", seconds=0.1)
        share = gflops_per_s(1, dtype, seconds=0.1) / usual
        if share < SLOW:
            notes.append(f"This CPU multiplies {dtype} {1 / share:.0f} times slower than float32: set backbone.dtype: float32")
    return notes


def gflops_per_s(threads: int, dtype: str, seconds: float | None = None) -> float:
    """This machine's speed in a matrix product of `dtype`, by a probe of `seconds`, PROBE_S by default."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left = right = torch.ones(512, 512, dtype=getattr(torch, dtype))
    torch.mm(left, right)
    began, count, seconds = time.perf_counter(), 0, seconds or PROBE_S
    while time.perf_counter() - began < seconds:
        torch.mm(left, right)
        count += 1
    spent = time.perf_counter() - began
    torch.set_num_threads(before)
    return count * 2 * 512**3 / spent / 1e9
