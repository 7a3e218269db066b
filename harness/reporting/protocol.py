"""The report's small print: how the numbers were made, from what the trials recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness.reporting.rows import FEW_IMAGES, LATENCY, Row, SweepResults
from harness.reporting.tables import cell

EMBEDDED = "A small model on a small data set: the order of methods is evidence; absolute scores are not comparable to anyone's."
UNSAID = ("contaminated", "contaminated_rounds", "identical_images")
"""Notes of metrics that differ from trial to trial by nature and are told elsewhere."""
SETTINGS = ("backbone", "sampler", "data", "threads")


def is_embedded(sweep: SweepResults) -> bool:
    """Whether a row ran on the model inside the package."""
    return any((row.trial.get("backbone") or {}).get("weights") == "embedded" for row in sweep.rows)


def protocol_section(sweep: SweepResults) -> str:
    """What a reader needs to trust or to repeat the numbers."""
    trials = [row for row in sweep.rows if row.trial]
    if not trials:
        return ""
    points = ["FLOPs: one multiply-add counts two; torch's dispatcher counter on the meta device over the executed token counts, "
              "the method's own matching or routing included. The columns \"paper's rule\" follow Shiva-DiT's printed FLOPs, "
              "which for PixArt alone count cross-attention as if its keys were image tokens (12.97 T; the rule gives 8.96).",
              "Latency: the sampling loop for one batch of fixed size, text encoding and VAE apart; method and dense interleaved "
              "A-B-B-A in one process, alone on the machine, after a warm-up over the whole schedule. The ratio is the number to "
              f"read.{_noise_floor(sweep)}",
              _images(trials), *_prompts(trials), *_few_images(sweep), *_training_seeds(trials),
              f"Settings: {_settings(trials)}."]
    points += _notes(sweep) + _identical(sweep)
    same, different = _environment(trials)
    points += [f"Environment: {same}."] if same else []
    points += [f"**The environment differs between trials** in {different}."] if different else []
    points += [EMBEDDED] if is_embedded(sweep) else []
    return "## Protocol\n\n" + "\n".join(f"- {point}" for point in points)


def _noise_floor(sweep: SweepResults) -> str:
    dense = sweep.dense
    if dense is None or dense.interval(LATENCY) is None:
        return ""
    return f" Dense timed against itself reads {cell(dense, LATENCY)}: what this machine cannot tell apart."


def _images(trials: Sequence[Row]) -> str:
    seeds = sorted({tuple(row.trial["seeds"]) for row in trials if row.trial.get("seeds")})
    ranges = "; ".join(f"{first}–{last} (n = {last - first + 1})" for first, last in seeds)
    return (f"Images: one per seed; seeds {ranges}. Image i depends on seed i and prompt i only, so methods are compared on the "
            "same noise.")


def _prompts(trials: Sequence[Row]) -> list[str]:
    """How many prompts a tokenizer cut, as the trials counted it: what was cut off, no model has seen."""
    counted: dict[str, list[str]] = {}
    for row in trials:
        score = row.environment.get("score")
        for name, found in ((score or {}).get("prompts_cut") or {}).items() if isinstance(score, Mapping) else ():
            counted.setdefault(f"{name} {found['cut']} of {found['of']} beyond {found['tokens']} tokens", []).append(row.label)
    if not counted:
        return []
    if all(" 0 of " in text for text in counted):
        return ["Prompts: no tokenizer cut any of them."]
    every = len(trials)
    words = [text if len(labels) == every else f"{text} ({', '.join(labels)})" for text, labels in counted.items()]
    return [f"**Prompts were cut** by their length in tokens, and what was cut off no model has seen: {'; '.join(words)}."]


def _few_images(sweep: SweepResults) -> list[str]:
    names = [name for name in sweep.metrics if sweep.traits(name).group == "fidelity"]
    counts = {(row.measure(name) or {}).get("n") for name in names for row in sweep.rows} - {None}
    few = ", ".join(str(n) for n in sorted(counts) if n < FEW_IMAGES)
    return [f"Distances between distributions from {few} images are biased upwards: compare them at equal n only."] if few else []


def _training_seeds(trials: Sequence[Row]) -> list[str]:
    trained = [row for row in trials if row.trial.get("train")]
    seeds = {row.trial["train"].get("seed") for row in trained}
    if not trained or len(seeds) > 1:
        return []
    return [f"**One training seed** ({next(iter(seeds))}) for all trained rows: the intervals hold sampling noise, not the "
            "spread between trainings, which is usually larger."]


def _notes(sweep: SweepResults) -> list[str]:
    """What the metrics recorded about themselves, where all trials agree."""
    parts = []
    for name in sweep.metrics:
        rows = [row for row in sweep.rows if row.measure(name)]
        kept = {key: value for key, value in rows[0].notes(name).items() if isinstance(value, str | int) and key not in UNSAID
                and all(row.notes(name).get(key) == value for row in rows)} if rows else {}
        if kept:
            parts.append(f"{name} ({', '.join(f'{key} {value}' for key, value in kept.items())})")
    return [f"As recorded by the metrics: {'; '.join(parts)}."] if parts else []


def _identical(sweep: SweepResults) -> list[str]:
    counts = {row.label: row.notes("dense/psnr_db").get("identical_images", 0) for row in sweep.rows}
    rows = ", ".join(f"`{label}` {count}" for label, count in counts.items() if count)
    return [f"Images identical to dense, booked at the largest PSNR two differing images can have: {rows}."] if rows else []


def _settings(trials: Sequence[Row]) -> str:
    flats = [flat({key: row.trial.get(key) for key in SETTINGS}) for row in trials]
    keys = dict.fromkeys(key for f in flats for key in f)
    return ", ".join(f"{key} {'varies' if len({json.dumps(f.get(key)) for f in flats}) > 1 else flats[0].get(key)}"
                     for key in keys)


def _environment(trials: Sequence[Row]) -> tuple[str, str]:
    """What all trials recorded alike, and the keys in which they differ. Measured loads (floats) and flags are left out."""
    values: dict[str, dict[str, set[str]]] = {}  # key -> job -> recorded values
    for row in trials:
        measured = row.result.get("metrics") or {}
        for job, tree in row.environment.items():
            own = {key: value for key, value in tree.items() if key not in measured} if isinstance(tree, Mapping) else {job: tree}
            for key, value in flat(own).items():
                # notes of metrics are told elsewhere, and what training recorded is each trial's own
                if isinstance(value, str | int) and not key.startswith(("train", "prompts_cut")):
                    values.setdefault(key, {}).setdefault(job, set()).add(str(value))
    alike = [_agreed(key, jobs) for key, jobs in values.items() if all(len(v) == 1 for v in jobs.values())]
    return ", ".join(alike), ", ".join(key for key, jobs in values.items() if any(len(v) > 1 for v in jobs.values()))


def _agreed(key: str, jobs: Mapping[str, set[str]]) -> str:
    """'threads 1', or 'threads 1 (score) 2 (timing)' where the jobs of a trial are meant to differ."""
    each = {job: next(iter(values)) for job, values in jobs.items()}
    if len(set(each.values())) == 1:
        return f"{key} {next(iter(each.values()))}"
    return f"{key} " + " ".join(f"{value} ({job})" for job, value in each.items())


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: scalar or list}."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return result
