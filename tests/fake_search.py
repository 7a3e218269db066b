"""Searches whose jobs cost nothing: spaces, sweep files, and a runner of them."""

import json
import signal
from io import StringIO
from pathlib import Path

import fake_sweep
import pytest
import yaml
from rich.console import Console

from harness.execution.driver import Options, run_sweep
from harness.sweep.search.space import parse_space

SPACE = """
method.name: {choice: [random_drop, tomesd, learner]}
method.keep_ratio:
  cases:
    - {uniform: [0.4, 0.9], when: {method.name: random_drop}}
    - {uniform: [0.6, 0.9], when: {method.name: [tomesd]}}
method.ffn: {choice: [true, false], when: {method.name: tomesd}}
method.stride: {value: 4, when: {method.name: tomesd, method.ffn: true}}
method.width: {int: [2, 5], when: {method.name: learner}}
train.adapter_lr: {log_uniform: [0.00001, 0.1], when: {method.name: learner}}
sampler.num_steps: 4
"""
OBJECTIVES = "[{metric: fidelity/fake_4, direction: minimize, reference: 1}, {metric: latency/fake_ms, direction: minimize}]"
OPTUNA = f"""
name: fake
seeds: 4
backbone: nothing
metrics: [probe]
methods: [dense]
search:
  algorithm: optuna
  num_trials: 10
  parallel: 3
  seed: 5
  objectives: {OBJECTIVES}
  space: {{method.name: random_drop, method.keep_ratio: {{uniform: [0.1, 0.9]}}, method.first_block: {{choice: [true, false]}}}}
"""
RANDOM = OPTUNA.replace("optuna", "random").replace("  parallel: 3\n", "")
ASHA = """
name: fake
seeds: 4
backbone: nothing
metrics: [probe]
train: {steps: 40, validate_every: 5}
methods:
  - dense
  - {name: learner, keep_ratio: {grid_search: [0.5, 0.2, 0.4, 0.1, 0.3]}}
asha: {rungs: [0.25, 0.5], synchronous: true}
"""


def run_job(job, trial, store, progress, out_dir) -> dict:
    """`fake_sweep.run_job` with a trade between quality and time, and with a loss that is the keep ratio."""
    part = fake_sweep.run_job(job, trial, store, progress, out_dir)
    ratio = trial["method"].get("keep_ratio", 1)
    if job == "score":
        part["metrics"]["fidelity/fake_4"]["value"] = (1 - ratio) ** 2
    if job.startswith("rung"):
        part["metrics"], part["series"] = {}, {"val/diffusion_mse": [[int(job[4:]) - 1, ratio]]}
    return part


class Runner:
    """One sweep file and its results folder."""

    def __init__(self, place: Path) -> None:
        self.file, self.results, self.folder, self.output = place / "s.yaml", place / "results", place / "results" / "fake", ""
        self.results.mkdir()

    def __call__(self, text: str, job=run_job) -> int:
        self.file.write_text(text)
        screen = StringIO()
        try:
            options = Options(results=self.results, local=True, run_job=job, publish=False)
            return run_sweep(self.file, options, Console(file=screen, width=200))
        finally:
            self.output = screen.getvalue()

    def orders(self, *lines: str) -> None:
        """See `fake_sweep.run_job`."""
        (self.results / "orders").write_text("\n".join(lines))

    @property
    def header(self) -> dict:
        return json.loads((self.folder / "sweep.json").read_text())

    def rows(self) -> dict[str, dict]:
        results = [json.loads((self.folder / f"{trial_id}.json").read_text()) for trial_id in self.header["trial_ids"]]
        return {result["label"]: result for result in results}


def space(text: str = SPACE):
    return parse_space(yaml.safe_load(text), "s.yaml: search.space")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """`sweep(text)` runs a sweep file in an empty folder, here, and returns the exit code."""
    fake_sweep.install(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return Runner(tmp_path)
