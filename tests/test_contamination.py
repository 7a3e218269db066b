"""A timing that was taken beside other work is taken again, and where that does not help the row says so everywhere."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import fake_sweep
import pytest
from conftest import TinySD3, tiny_pipeline

from harness import mirror, trial, worker
from harness.api import METHODS, METRICS, Subject, disturbed
from harness.bench import contamination, sweep_cost, workers
from harness.bench.injection_cost import bare, injected
from harness.bench.jobs import covered, stages
from harness.flops import Meter
from harness.ledger import Ledger
from harness.metrics import latency
from harness.reporting.rows import load_sweep
from harness.reporting.tables import csv_text
from harness.resolve import resolve
from harness.sampler import SamplerConfig
from harness.sweep import load

ROUNDS, RETAKES = 2, 3


def timed(job, of, store, progress, out_dir) -> dict:
    """A real timing of a tiny model, as `harness.trial.run_job` makes its part."""
    backbone = TinySD3.from_pipeline(tiny_pipeline(), text_length=6)
    config = SamplerConfig(num_steps=2, guidance_scale=4.0, batch_size=1)
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    subject = Subject(trial={}, backbone=backbone, student=backbone, method=method, sampler=config, meter=Meter(backbone, config),
                      prompts=["a cat"], seeds=[3], store=None, progress=progress)
    part = {"metrics": {}, "per_image": {}, "executed": {}, "series": {}, "artifacts": {}, "environment": {}, "stages": {},
            "timestamp_ms": 1}
    if job == "timing":
        for measure in METRICS.build("latency", {"rounds": ROUNDS, "retakes": RETAKES}).measure(subject):
            trial._enter(part, measure)
    return part


@pytest.fixture
def row(tmp_path, monkeypatch):
    """`row()` runs a sweep of one trial and returns (its result, rounds taken, its line of table.csv)."""
    fake_sweep.install(monkeypatch)
    file = tmp_path / "fake.yaml"
    file.write_text(fake_sweep.TEXT.replace("grid_search: [0.9, 0.5]", "grid_search: [0.5]").replace("  - dense\n", ""))
    sweep = resolve(load(file))
    ledger, taken = Ledger(tmp_path / "fake"), []
    once = latency._take_round

    def counted(*arguments):
        taken.append(once(*arguments))
        return taken[-1]

    monkeypatch.setattr(latency, "_take_round", counted)

    def run():
        ledger.begin(sweep)
        for job in ledger.missing(sweep):
            assert worker.run(job, ledger.folder, timed)
        (result,) = (ledger.merge(entry, "fake") for entry in sweep.entries)
        (line,) = csv.DictReader(csv_text(load_sweep(ledger.folder)).splitlines())
        return result, taken, line

    run.ledger, run.sweep = ledger, sweep
    return run


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux tells how busy its processors are")
def test_a_neighbour_that_stays_is_written_into_the_row_after_every_retake(row):
    mine = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, mine[:1])
    neighbour = subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        neighbour.stdout.read(1)
        result, taken, line = row()
    finally:
        neighbour.kill()
        neighbour.wait()
        os.sched_setaffinity(0, mine)
    assert len(taken) == ROUNDS + RETAKES
    proof = result["environment"]["timing"]["latency/ratio_to_dense"]
    assert proof["contaminated"] is True and proof["contaminated_rounds"] == ROUNDS
    assert min(proof["foreign_cpu_cores"]) > latency.FOREIGN_CPU_LIMIT
    assert proof["threads"] == 1 and len(proof["load_average"]) == 3
    assert mirror.tags(result, None)["contaminated"] == "true"
    assert line["timing_disturbed"] == "True"


def test_a_neighbour_that_leaves_costs_retakes_and_no_mark(row, monkeypatch):
    shares = iter([5.0] * ROUNDS + [0.0] * RETAKES)
    monkeypatch.setattr(latency, "foreign_cpu_seconds", lambda: 0.0)
    once = latency._take_round

    def beside(*arguments):
        one = once(*arguments)
        one.foreign = next(shares)
        return one

    monkeypatch.setattr(latency, "_take_round", beside)
    result, taken, line = row()
    assert len(taken) == 2 * ROUNDS
    assert result["environment"]["timing"]["latency/ratio_to_dense"]["contaminated"] is False
    assert mirror.tags(result, None)["contaminated"] == "false"
    assert line["timing_disturbed"] == "False"


def test_a_disturbed_timing_is_taken_again_when_asked_and_no_other(row, monkeypatch, tmp_path):
    calm = [0.0]
    monkeypatch.setattr(latency, "foreign_cpu_seconds", lambda: 0.0)
    once = latency._take_round

    def beside(*arguments):
        one = once(*arguments)
        one.foreign = calm[0]
        return one

    monkeypatch.setattr(latency, "_take_round", beside)
    calm[0] = 5.0
    result, taken, _ = row()
    assert disturbed(result["environment"]) and len(taken) == ROUNDS + RETAKES
    calm[0] = 0.0
    assert disturbed(row()[0]["environment"]), "a plain run leaves it"
    (part,) = row.ledger.folder.glob("parts/*.timing.json")
    first = part.read_text()
    assert row.ledger.set_aside_disturbed(row.sweep) == 1 and not part.exists()
    assert part.with_suffix(".disturbed").read_text() == first, "nothing that was computed is lost"
    result, taken, _ = row()
    assert not disturbed(result["environment"]) and len(taken) == 2 * ROUNDS + RETAKES
    assert row.ledger.set_aside_disturbed(row.sweep) == 0


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
        taken = {"alone": [timing(0.7, False)] * 3, "busy": [timing(busy, False)] * 3, "burnt": [timing(0.9, marked)]}
        return [row.verdict for row in contamination.rows(taken, overlaps, 6) if row.bar]

    assert verdicts(0.71, 0, True) == ["PASS"] * 3
    assert verdicts(0.73, 1, False) == ["FAIL"] * 3


def test_keeping_every_token_gives_the_pipelines_latents():
    from harness.bench.options import Options
    from harness.bench.shapes import embedded

    backbone = embedded(Options())
    method = METHODS.build("random_drop", {"keep_ratio": 1.0, "first_block": True})
    assert float((injected(backbone, method)() - bare(backbone)()).abs().max()) < 1e-4
