"""python -m harness.tracking --ui: MLflow's server on this machine, with links to the pages worth opening."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.api import ConfigError, require
from harness.reporting.rows import load_sweep
from harness.storage.folder_lock import driving
from harness.storage.masking import masked
from harness.tracking import mapping
from harness.tracking.client import QUIET, Tracker, default_uri, open_client
from harness.tracking.database import ARTIFACTS, file_of

WAIT_SECONDS = 180.0
LIGHT = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""One worker and no job runner: 0.5 GB instead of 2.3 GB."""
USER = "harness"


@contextlib.contextmanager
def server(uri: str, artifacts: Path, port: int, password: str) -> Iterator[str]:
    """MLflow's server on 127.0.0.1 while the context lasts, for who logs in as USER; yields its address once it answers.

    Without a login, every user of this machine could change and delete runs through it.
    """
    address = f"http://127.0.0.1:{port}"
    require(not _answers(address), f"--port {port}: a server answers there already; open {address} or take another port")
    require(importlib.util.find_spec("flask_wtf") is not None, "MLflow's pages need a login here, and for that the package "
            "Flask-WTF is missing; install it with: pip install 'mlflow[auth]'")
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--artifacts-destination", str(artifacts),
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryDirectory(prefix="dit-harness-") as private:  # only its user can enter it
        # a command line is for everyone on the machine to read; the address may hold a password
        environment = {**os.environ, **LIGHT, "MLFLOW_BACKEND_STORE_URI": uri, **_login(Path(private), password)}
        said = Path(private) / "log"
        with open(said, "wb") as log:
            process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(process, address, said)
            yield address
        finally:
            _stop(process)


def _login(folder: Path, password: str) -> dict[str, str]:
    """Variables by which MLflow lets in USER with `password`, and nobody else; what it keeps of that lies in `folder`."""
    config = folder / "auth.ini"
    config.touch(mode=0o600)
    config.write_text(f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder / 'auth.db'}\n"
                      f"admin_username = {USER}\nadmin_password = {password}\nauth_cache_ttl_seconds = 3600\n"
                      "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n", encoding="utf-8")
    return {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_AUTH_ADMIN_USERNAME": USER, "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32)}


def _wait(process: subprocess.Popen, address: str, said: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not _answers(address):
        if process.poll() is not None:
            last = " | ".join(said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
            raise ConfigError(f"MLflow's server ended with code {process.poll()}: {masked(last)[-600:]}")
        require(time.monotonic() < deadline, f"MLflow's server does not answer at {address} after {WAIT_SECONDS:.0f} s")
        time.sleep(0.5)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:  # noqa: S310  our own address
            return answer.status == 200
    except OSError:
        return False


def _stop(process: subprocess.Popen) -> None:
    """End the server and its children: they are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pages(client: Any) -> list[tuple[str, str]]:
    """(what, link within the UI), newest sweep first."""
    found = []
    for experiment in client.search_experiments():
        sweeps = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'", max_results=100)
        trials = client.get_experiment_by_name(experiment.name.removesuffix("-sweeps"))
        if trials is not None:
            found += [(max(sweep.info.start_time, sweep.info.end_time or 0), trials, sweep, len(sweeps) > 1) for sweep in sweeps]
    links = []
    for _, trials, sweep, several in sorted(found, key=lambda item: -item[0]):
        results = sweep.data.tags.get("results_id", "")
        name = f"{trials.name} (results {results[:8]})" if several else trials.name
        query = "tags.kind = 'trial'" + f" and tags.results_id = '{results}'" * bool(results)
        runs = client.search_runs([trials.experiment_id], query, max_results=mapping.COMPARED,
                                  order_by=["attributes.start_time ASC"])
        compare = mapping.compare_link(trials.experiment_id, [run.info.run_id for run in runs])
        report = mapping.run_link(sweep.info.experiment_id, sweep.info.run_id, "artifacts/report.md")
        links += [(f"{name}: trials with charts", mapping.charts_link(trials.experiment_id, results)),
                  (f"{name}: compare trials", compare), (f"{name}: report and figures", report)]
    return links


def serve(results: Path, port: int, console: Console) -> None:
    """Run the server until Ctrl-C."""
    uri = default_uri(results)
    require(not uri.startswith("http"), f"MLFLOW_TRACKING_URI is {masked(uri)}: that server has its own pages; open it in "
            "a browser")
    database = file_of(uri)
    require(database is None or database.exists(),
            f"{database}: no such database. Run a sweep first, or fill it from results: "
            f"python -m harness.tracking --sync {results}/<sweep>")
    links, password = pages(open_client(uri)), secrets.token_urlsafe(12)
    with server(uri, (database.parent if database else Path(results).resolve()) / ARTIFACTS, port, password) as address:
        console.print(f"MLflow: {address}   (Ctrl-C stops it)\nIt asks for a login: user {USER}, password {password}   "
                      "(another one at each start)", soft_wrap=True, markup=False, highlight=False)
        for what, link in links:
            console.print(f"{what}\n  {address}/{link}", soft_wrap=True, markup=False, highlight=False)
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have started us with Ctrl-C ignored
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


def sync(folder: Path) -> int:
    """Mirror a results folder without running anything; returns the number of errors."""
    sweep = load_sweep(folder)
    results = [dict(row.result) for row in sweep.rows if row.result]
    with driving(folder):  # a driver mirrors by itself, and two would write everything twice
        tracker = Tracker(sweep.name, folder)
        tracker.start()
        tracker.finish(results, folder)
    return tracker.errors


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.tracking", description="Look at the mirror of results in MLflow.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ui", action="store_true", help="start MLflow's server and print links to its pages")
    what.add_argument("--sync", type=Path, metavar="RESULTS/SWEEP", help="mirror a results folder into MLflow")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if args.sync:
            return 1 if sync(args.sync) else 0
        serve(args.results, args.port, Console())
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{args.sync or args.results}: {error.strerror or error}; this needs a folder that can be written\n")
        return 2
    return 0
