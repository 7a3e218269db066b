"""A timing that was taken beside other work is taken again, and where that does not help the row says so everywhere."""

from __future__ import annotations

import csv
import subprocess
import sys
from types import SimpleNamespace

import fake_sweep
import pytest
from conftest import TinySD3, tiny_pipeline

from harness.api import METHODS, METRICS, Subject, disturbed
from harness.bench import contamination, sweep_cost, workers
from harness.bench.injection_cost import bare, injected
from harness.bench.jobs import covered, stages
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig
from harness.execution import worker
from harness.execution.results_folder import ResultsFolder
from harness.hardware.neighbours import CORES_LIMIT, MachineReader, Neighbours, Seen
from harness.metrics.cost import latency
from harness.reporting.rows import load_sweep
from harness.reporting.tables import csv_text
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.tracking import mapping
from harness.trial import job as trial_job

ROUNDS, RETAKES = 2, 1


def timed(job, of, store, progress, out_dir) -> dict:
    """A real timing of a tiny model, as `harness.trial.job.run_job` makes its part."""
    backbone = TinySD3.from_pipeline(tiny_pipeline(), text_length=6)
    config = SamplerConfig(num_steps=2, guidance_scale=4.0, batch_size=1)
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    subject = Subject(trial={}, backbone=backbone, student=backbone, method=method, sampler=config, meter=Meter(backbone, config),
                      prompts=["a cat"], seeds=[3], store=None, progress=progress)
    part = {"metrics": {}, "per_image": {}, "executed": {}, "series": {}, "artifacts": {}, "environment": {}, "stages": {},
            "timestamp_ms": 1}
    if job == "timing":
        trial_job._measure(part, METRICS.build("latency", {"rounds": ROUNDS, "retakes": RETAKES}), subject)
    return part


@pytest.fixture
def row(tmp_path, monkeypatch):
    """`row()` runs a sweep of one trial and returns (its result, rounds taken, its line of table.csv)."""
    fake_sweep.install(monkeypatch)
    file = tmp_path / "fake.yaml"
    file.write_text(fake_sweep.TEXT.replace("grid_search: [0.9, 0.5]", "grid_search: [0.5]").replace("  - dense\n", ""))
    sweep = resolve(load(file))
    folder, taken = ResultsFolder(tmp_path / "fake"), []
    once = latency._take_round

    def counted(*arguments, **stop):
        taken.append(once(*arguments, **stop))
        return taken[-1]

    monkeypatch.setattr(latency, "_take_round", counted)

    def run():
        folder.begin(sweep)
        for job in folder.missing(sweep):
            assert worker.run(job, folder.path, timed)
        (result,) = (folder.merge(entry, "fake") for entry in sweep.entries)
        (line,) = csv.DictReader(csv_text(load_sweep(folder.path)).splitlines())
        return result, taken, line

    run.folder, run.sweep, run.patch = folder, sweep, monkeypatch
    return run


@pytest.fixture
def beside(monkeypatch):
    """`beside.others`: what is seen beside each loop from now on."""
    told = SimpleNamespace(others=Seen(0.0, 0.0, disturbed=False))
    monkeypatch.setattr(latency, "Neighbours", lambda: Neighbours(lambda second: None, period_s=None))
    monkeypatch.setattr(Neighbours, "seen", lambda watch, begin, end: told.others)
    return told


BUSY, CALM, UNKNOWN = Seen(5.0, 0.9, disturbed=True), Seen(0.0, 0.0, disturbed=False), Seen(None, None)


@pytest.mark.processes
def test_a_neighbour_that_stays_is_written_into_the_row_after_every_retake(row):
    neighbour = subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        neighbour.stdout.read(1)
        watched = MachineReader()
        watched._children = []  # started by this process, but not by its timing
        row.patch.setattr(latency, "Neighbours", lambda: Neighbours(watched.read))
        result, taken, line = row()
    finally:
        neighbour.kill()
        neighbour.wait()
    assert len(taken) == ROUNDS + 4 * RETAKES, "each try ends at its first loop"
    proof = result["environment"]["timing"]["latency/ratio_to_dense"]
    assert proof["contaminated"] is True and proof["contaminated_rounds"] == ROUNDS
    assert proof["loops_dropped"] == 4 * RETAKES
    assert min(proof["foreign_cpu_cores"]) > CORES_LIMIT and min(proof["foreign_cpu_s_in_window"]) > 0
    assert proof["threads"] >= 1 and len(proof["load_average"]) == 3
    assert mapping.tags(result, None)["contaminated"] == "true"
    assert line["timing_disturbed"] == "True"


def test_a_neighbour_that_leaves_costs_retakes_and_no_mark(row, beside, monkeypatch):
    shares = iter([BUSY] * 4 * RETAKES)
    monkeypatch.setattr(Neighbours, "seen", lambda watch, begin, end: next(shares, CALM))
    result, taken, line = row()
    assert len(taken) == ROUNDS + 4 * RETAKES
    assert result["environment"]["timing"]["latency/ratio_to_dense"]["contaminated"] is False
    assert mapping.tags(result, None)["contaminated"] == "false"
    assert line["timing_disturbed"] == "False"


def test_a_timing_beside_which_nothing_could_be_seen_says_so_and_is_ranked_nowhere(row, beside):
    beside.others = UNKNOWN
    result, taken, line = row()
    assert len(taken) == ROUNDS and result["status"] == "done"
    assert result["environment"]["timing"]["latency/ratio_to_dense"]["contaminated"] is None
    assert mapping.tags(result, None)["contaminated"] == "unknown" and line["timing_disturbed"] == "unknown"
    (shown,) = load_sweep(row.folder.path).rows
    assert shown.contaminated and row.folder.set_aside_disturbed(row.sweep) == 1


def test_a_disturbed_timing_is_taken_again_when_asked_and_no_other(row, beside):
    beside.others = BUSY
    result, taken, _ = row()
    assert disturbed(result["environment"])
    beside.others, first_taken = CALM, len(taken)
    assert disturbed(row()[0]["environment"]), "a plain run leaves it"
    (part,) = row.folder.path.glob("parts/*.timing.json")
    first = part.read_text()
    assert row.folder.set_aside_disturbed(row.sweep) == 1 and not part.exists()
    assert part.with_suffix(".disturbed").read_text() == first, "nothing that was computed is lost"
    assert len(list(row.folder.path.glob("parts/*.score.json"))) == 1
    result, taken, _ = row()
    assert not disturbed(result["environment"]) and len(taken) == first_taken + ROUNDS
    assert row.folder.set_aside_disturbed(row.sweep) == 0


# ---------------------------------------------------------------------------------------------- the benchmarks, untimed


def part(end: float, **seconds: float) -> dict:
    return {"timestamp_ms": 1000 * end, "stages": {name.replace("_", " "): value for name, value in seconds.items()}}


def test_time_is_outside_model_compute_when_no_job_runs_a_model():
    found = [part(20.0, build=2.0, sample=8.0), part(24.0, build=1.0, train=6.0, measure_flops=2.0, measure_fd=3.0)]
    assert dict(stages(found[1])) == {"measure fd": (21.0, 24.0), "measure flops": (19.0, 21.0), "train": (13.0, 19.0),
                                      "build": (12.0, 13.0)}
    outside, before, between, after = sweep_cost.account(found, 5.0, 30.0)
    assert outside.value == pytest.approx(1 - 11 / 25)  # 12 to 20 and 21 to 24, of 25 s
    assert (before.value, between.value, after.value) == pytest.approx((5 / 25, 3 / 25, 6 / 25))
    assert covered([(0.0, 2.0), (1.0, 1.5), (4.0, 5.0), (4.5, 6.0)]) == 4.0


@pytest.mark.parametrize("text", [contamination.ALONE, contamination.BUSY, workers.TEXT.replace("RATIOS", "0.5, 0.501")])
def test_the_sweeps_of_the_benchmarks_are_valid(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    assert resolve(load(tmp_path / "x.yaml")).trials


def test_a_timing_that_moved_or_was_not_marked_is_a_missed_bar():
    def timing(ratio: float, disturbed: bool) -> dict:
        proof = {contamination.RATIO: {"contaminated": disturbed}}
        return {"metrics": {contamination.RATIO: {"value": ratio}}, "environment": proof}

    def verdicts(busy: float, overlaps: int, marked: bool) -> list[str]:
        taken = {"alone": [timing(0.7, False)] * 3, "busy": [timing(busy, False)] * 3, "burnt": [timing(0.9, marked)],
                 "bursts": [timing(busy, False)]}
        return [row.verdict for row in contamination.rows(taken, overlaps, 6) if row.bar]

    assert verdicts(0.71, 0, True) == ["PASS"] * 4
    assert verdicts(0.73, 1, False) == ["FAIL"] * 4


def test_keeping_every_token_gives_the_pipelines_latents():
    from harness.bench.options import BenchOptions
    from harness.bench.shapes import embedded

    backbone = embedded(BenchOptions())
    method = METHODS.build("random_drop", {"keep_ratio": 1.0, "first_block": True})
    assert float((injected(backbone, method)() - bare(backbone)()).abs().max()) < 1e-4
