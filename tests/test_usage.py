"""What a job used of its machine: sampled while it runs, in MLflow's units, and never at the cost of the job."""

import json
import time

import fake_sweep
import psutil
import torch

from harness.execution.results_folder import Job, ResultsFolder
from harness.execution.worker import run
from harness.hardware import usage
from harness.hardware.usage import MIB, Usage, sample
from harness.tracking.mapping import system_metrics


def test_a_busy_process_shows_its_core_and_its_memory():
    with Usage(period_s=0.1) as seen:
        ballast = bytearray(200 * 2**20)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            ballast[0] = 1
    assert abs(seen.began_ms / 1000 - time.time()) < 60
    process = [value for _, value in seen.curves["process_cpu_percentage"]]
    assert len(process) > 5 and 20 < max(process) and all(value >= 0 for value in process)
    machine = [value for _, value in seen.curves["cpu_utilization_percentage"]]
    assert 0 < max(machine) <= 100
    own = [value for _, value in seen.curves["process_memory_megabytes"]]
    whole = [value for _, value in seen.curves["system_memory_usage_megabytes"]]
    assert 200 < max(own) < max(whole) < psutil.virtual_memory().total / MIB
    assert not seen._thread.is_alive()


def test_a_long_job_stays_a_small_file(monkeypatch):
    monkeypatch.setattr(usage, "MOST_POINTS", 8)
    seen = Usage()
    seen._began = 0.0
    now = 0.0
    monkeypatch.setattr(usage.time, "monotonic", lambda: now)
    while now < 86400:
        now += seen.period_s
        seen._keep({"a": now})
    (points,) = seen.curves.values()
    assert len(points) <= 8 and points[0] == [10, 10.0] and points[-1][0] > 0.6 * 86400 and points == sorted(points)


def test_a_job_writes_its_curves_beside_its_own_and_mlflow_gets_them(tmp_path, monkeypatch):
    def slow(job, trial, *rest):
        part = fake_sweep.run_job(job, trial, *rest)
        time.sleep(0.3)
        return {**part, "series": {"train/diffusion": [[0, 1.0]]}}

    monkeypatch.setattr(usage, "PERIOD_S", 0.05)
    job = Job("score", "abc", "dense", "code", 1, {"method": {"name": "dense"}})
    assert run(job, tmp_path / "sweep", slow)
    part = json.loads(ResultsFolder(tmp_path / "sweep").part_path(job.key).read_text())
    assert part["series"] == {"train/diffusion": [[0, 1.0]]} and part["usage"]["curves"]["process_memory_megabytes"]
    told = list(system_metrics({"usage": {"score": part["usage"]}}))
    assert {name for name, *_ in told} >= {"system/score/process_memory_megabytes", "system/score/cpu_utilization_percentage"}
    assert all(when == part["usage"]["began_ms"] + 1000 * second for _, _, second, when in told)


def test_the_gpu_is_asked_through_nvml_and_left_out_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 73)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda device: 3 * 2**30)
    values = sample(psutil.Process())
    assert values["gpu_0_utilization_percentage"] == 73 and values["gpu_0_memory_usage_megabytes"] == 3072

    def missing(device):
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert not [name for name in sample(psutil.Process()) if name.startswith("gpu")]


def test_a_failing_sample_ends_the_curves_and_not_the_job(monkeypatch):
    def broken(process):
        raise psutil.AccessDenied

    monkeypatch.setattr(usage, "sample", broken)
    with Usage(period_s=0.01) as seen:
        time.sleep(0.1)
    assert seen.curves == {}
