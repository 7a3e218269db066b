"""MLflow's own page, opened in a browser: a sweep's compare view shows its trials and what was measured."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from fake_results import make_sweep
from fake_server import Proxy

from harness.tracking.client import Tracker, default_uri, open_client
from harness.tracking.ui import USER, pages, server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.skipif(importlib.util.find_spec("flask_wtf") is None, reason="mlflow[auth] is not installed")
def test_the_compare_page_of_a_sweep_shows_its_trials(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "results" / "ablation"
    results = make_sweep(folder, images=24, artifacts=False)
    tracker = Tracker(folder.name, folder)
    tracker.start()
    tracker.finish(results, folder)
    uri = default_uri(folder.parent)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    links = dict(pages(open_client(uri)))
    with server(uri, folder.parent / "mlartifacts", port, "a-long-password"):
        proxy = Proxy(port, login=f"{USER}:a-long-password")  # a browser asks for it in a window, which nobody sees here
        page = opened(f"{proxy.address}/{links['ablation: compare trials']}", tmp_path)
        proxy.close()
    for result in results:
        assert result["label"].split()[0] in page
    assert "Parallel Coordinates" in page and "fd_effnet_24" in page and "flops_cut" in page
    assert "not found" not in page.lower() and "Something went wrong" not in page


def opened(url: str, folder: Path) -> str:
    """The page's elements after its scripts have run for a while."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}",
               "--window-size=1600,1200", "--virtual-time-budget=60000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
