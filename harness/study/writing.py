"""Writes what a study found: report.md, data.json and figures. Numbers carry their uncertainty and the machine they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import numpy as np
from matplotlib.figure import Figure

from harness.hardware.provenance import environment
from harness.reporting.plots import DPI
from harness.statistics.intervals import mean_interval


def write(name: str, study: Any, data: dict[str, Any], folder: Path) -> Path:
    """Write the findings of `study` into `folder`; returns the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"study": name, **data, "environment": environment("cpu", "float32")}
    (folder / "data.json").write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    for file, figure in study.figures(data).items():
        save(figure, folder / file)
    path = folder / "report.md"
    path.write_text(f"# {name}\n\n{study.report(data).strip()}\n\n{protocol(name, data)}\n", encoding="utf-8")
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI)


def protocol(name: str, data: dict[str, Any]) -> str:
    """How to make the report again, and on what it was made."""
    machine = data["environment"]
    seeds = " ".join(map(str, data["seeds"]))
    packages = ", ".join(f"{key} {machine['packages'][key]}" for key in ("torch", "diffusers", "numpy"))
    return (f"## Protocol\n\nMade again by `{command(name, data)}`, into this folder. Seeds: {seeds}. Raw numbers: "
            f"`data.json`.\n\nHardware: {machine['num_cpus']} cores ({machine['cpu_model']}, {machine['machine']}), no GPU used, "
            f"{machine['threads']} thread(s), {machine['dtype']}; {packages}, Python {machine['python']}."
            + (f" Measuring took {data['seconds']:.0f} s of wall clock." if "seconds" in data else ""))


def command(name: str, data: dict[str, Any]) -> str:
    """The one command of a study."""
    return f"python -m harness.study {name} --seeds {' '.join(map(str, data['seeds']))}{data.get('arguments', '')}"


def mean_with_interval(values: Sequence[float], digits: int = 2) -> str:
    """'mean [low, high]', the 95 % interval over `values`; 'mean (least to greatest)' for too few; the mean alone for one."""
    interval = mean_interval(values)
    mean = f"{np.mean(values):.{digits}f}"
    if interval is None:
        return mean if len(values) < 2 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return f"{mean} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column left, the others right."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def picture(file: str, alt: str, caption: str) -> str:
    """A figure with its caption."""
    return f"![{alt}]({file})\n\n*{caption}*"
