"""Finished sweeps with invented numbers, and what one asks of their reports."""

from pathlib import Path

import pytest
from fake_results import make_sweep

from harness.reporting.report import write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep with its report: read, never changed."""
    folder = tmp_path_factory.mktemp("results") / "ablation"
    make_sweep(folder)
    write_report(folder)
    return folder


@pytest.fixture
def sweep_folder(tmp_path, monkeypatch):
    """A finished sweep without pictures, to damage, whose figures are not drawn. Returns (folder, results)."""
    monkeypatch.setattr("harness.reporting.report._figures", lambda *sweeps: set())
    folder = tmp_path / "ablation"
    return folder, make_sweep(folder, images=24, artifacts=False)


def text_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def by_label(results, label):
    return next(result for result in results if result["label"] == label)


def table_line(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {label}"))
