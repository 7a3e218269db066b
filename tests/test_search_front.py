"""The front of a search and its hypervolume, by other means; and where they are told."""

import itertools
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fake_search import OPTUNA, RANDOM
from fake_search import sweep as sweep

from harness.execution.driver import DONE
from harness.reporting import front
from harness.reporting.front import front_of, front_rows, hypervolume, probabilities, summary, tolerances_of, unbeaten
from harness.reporting.report import write_report
from harness.reporting.rows import GFLOPS, Row, SweepResults, load_sweep

FD = "fidelity/fd_effnet_32"


def test_the_hypervolume_is_the_area_of_the_union():
    for seed in range(40):
        draw = random.Random(seed)
        points = [(draw.randint(0, 8), draw.randint(0, 8)) for _ in range(draw.randint(0, 9))]
        reference = (draw.randint(1, 8), draw.randint(1, 8))
        cells = itertools.product(range(reference[0]), range(reference[1]))
        assert hypervolume(points, reference) == sum(any(x <= i and y <= j for x, y in points) for i, j in cells)
    assert hypervolume([], (1, 1)) == 0 and hypervolume([(0.25, 0.5)], (1, 1)) == pytest.approx(0.375)


def dominates(one, other) -> bool:
    """The definition, written plainly: nowhere worse and somewhere better; less is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def test_the_report_tells_front_hypervolume_and_reference(sweep):
    assert sweep(OPTUNA.replace("reference: 1}", "reference: 0.8}")) == DONE
    results = load_sweep(sweep.folder)
    front = front_of(results)
    values = {point.row.label: point.values for point in front.points}
    best = {label for label, pair in values.items() if not any(dominates(other, pair) for other in values.values())}
    assert {point.row.label for point in front.best} == best and front.reference == (0.8, 1.0) and not front.given
    assert front.history()[-1] == (10, front.volume()) and summary(front)["search/hypervolume"] == front.history()
    assert [volume for _, volume in front.history()] == sorted(volume for _, volume in front.history())
    text = write_report(sweep.folder).read_text()
    assert f"**Hypervolume {front.volume():.4f}**" in text and "fidelity/fake_4 = 0.8000 and latency/fake_ms = 1.000" in text
    assert "![Front of the search](front.png)" in text and (sweep.folder / "front.png").exists()
    page = (sweep.folder / "report.html").read_text()
    assert "Hypervolume" in page and 'alt="Front of the search"' in page


def test_rows_that_cannot_be_compared_share_no_front(sweep):
    text = RANDOM.replace("method.first_block: {choice: [true, false]}", "sampler.num_steps: {choice: [2, 3]}")
    assert sweep(text) == DONE
    front = front_of(load_sweep(sweep.folder))
    steps = {point.row.trial["sampler"]["num_steps"] for point in front.points}
    assert len(steps) == 1 and front.left_out == 11 - len(front.points) > 0
    assert "measured otherwise" in write_report(sweep.folder).read_text()


def test_mlflow_holds_the_hypervolume_over_trials_once(sweep, tmp_path):
    from harness.tracking.client import Tracker, open_client

    assert sweep(OPTUNA) == DONE
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):
        tracker = Tracker("fake", sweep.folder, uri)
        tracker.start()
        tracker.finish(list(sweep.rows().values()), sweep.folder)
        assert tracker.errors == 0
    client = open_client(uri)
    found = client.search_runs([client.get_experiment_by_name("fake-sweeps").experiment_id])
    points = [(point.step, point.value) for point in client.get_metric_history(found[0].info.run_id, "search/hypervolume")]
    assert sorted(points) == front_of(load_sweep(sweep.folder)).history()


# ---------------------------------------------------------------------------------------------- budgets and chance


def row_of(name: str, gflops: float, fd: float, half: float | None = None, per_image=None) -> Row:
    fidelity = {"value": fd, "better": "lower", "interval": half and [fd - half, fd + half], "n": 32}
    metrics = {FD: fidelity, GFLOPS: {"value": gflops, "better": "lower", "interval": None, "n": None}}
    return Row(name, name, "done", {"metrics": metrics, "per_image": {FD: per_image} if per_image is not None else {}})


def sweep_of(*rows: Row) -> SweepResults:
    return SweepResults("s", "", Path("."), rows, ())


def names_on_front(*rows: Row) -> list[str]:
    return [row.label for row in front_rows(sweep_of(*rows), rows, (FD, GFLOPS))]


def test_rows_of_one_budget_are_not_both_on_the_front():
    """Where the published search had FD 286 at 35.92 GFLOP on a front with 233 at 35.93: no saving, a plainly worse picture."""
    dense = row_of("dense", 60.0, 187)
    assert names_on_front(dense, row_of("good", 35.93, 233), row_of("bad", 35.92, 286)) == ["good", "dense"]
    assert names_on_front(dense, row_of("good", 35.93, 233), row_of("cheaper", 30.0, 286)) == ["cheaper", "good", "dense"]
    assert names_on_front(dense, row_of("equal", 35.93, 233), row_of("equal, cheaper", 35.92, 233)) == ["equal, cheaper", "dense"]


def test_what_is_off_the_front_puts_no_cheaper_row_out():
    """C costs as little as B, within the tolerance, and B as A; C is cheaper than A."""
    a, b, c = row_of("A", 61.2, 200), row_of("B", 60.5, 290), row_of("C", 60.0, 300)
    assert names_on_front(a, b, c) == ["C", "A"]  # the tolerance is 1.5 % of the most expensive row: 0.918


def test_the_front_of_exact_values_is_that_of_plain_dominance():
    for seed in range(60):
        draw = np.random.default_rng(seed)
        values = draw.integers(0, 6, (8, 2)).astype(float)
        plain = [i for i, one in enumerate(values) if not any(dominates(other, one) for other in values)]
        assert unbeaten(values, (0.0, 0.0)) == plain


def test_the_probability_of_being_on_the_front_follows_the_intervals():
    def chances(*rows):
        return probabilities(rows, (GFLOPS, FD), (1, 1), tolerances_of(sweep_of(*rows), (GFLOPS, FD)))

    assert chances(row_of("a", 60, 187), row_of("b", 35, 233)) == [1, 1]  # no interval, no chance
    assert chances(row_of("a", 60, 187, 12), row_of("b", 35, 187.5, 12))[0] == pytest.approx(0.5, abs=0.07)
    sure = chances(row_of("a", 60, 187, 4), row_of("b", 35, 233, 4), row_of("c", 50, 300, 4))
    assert sure == [1, 1, 0]
    same = chances(row_of("a", 35, 187, 12), row_of("again", 35, 187, 12))
    assert same == [1, 1]  # one model, run twice


def test_images_are_drawn_together_where_there_are_values_of_each():
    hard = np.random.default_rng(0).normal(200, 50, 32)
    a, b = (row_of(name, gflops, float(values.mean()), 18, values.tolist())
            for name, gflops, values in (("a", 60, hard), ("b", 35, hard + 2)))
    assert probabilities((a, b), (GFLOPS, FD), (1, 1), (0, 0)) == [1, 1]  # better by 2 on every image, whatever images
    alone = [row_of(row.label, row.value(GFLOPS), row.value(FD), 18) for row in (a, b)]
    assert 0.4 < probabilities(alone, (GFLOPS, FD), (1, 1), (0, 0))[0] < 0.7


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js on this machine")
def test_the_page_draws_the_same_front(tmp_path):
    """The one copy of the rule that is in another language: page_plot.js, for measures that a reader picks."""
    draw, cases = np.random.default_rng(1), []
    for _ in range(100):
        signs, slack = draw.choice([-1, 1], 2), draw.choice([0.0, 1.0], 2, p=[0.7, 0.3])
        cases.append({"values": draw.integers(0, 6, (8, 2)).tolist(), "signs": signs.tolist(), "slack": slack.tolist()})
    script = (Path(front.__file__).parent / "page_plot.js").read_text(encoding="utf-8") + """
const found = JSON.parse(require("fs").readFileSync(0)).map(({ values, signs, slack }) => {
  const one = (i) => ({ better: signs[i] > 0 ? "lower" : "higher", tolerance: slack[i] }), metrics = { x: one(0), y: one(1) };
  const rows = values.map(([x, y], index) => ({ index, values: { x: { value: x }, y: { value: y } } }));
  return frontOf({ metrics }, { x: "x", y: "y" }, rows).map((row) => row.index).sort((a, b) => a - b);
});
console.log(JSON.stringify(found));"""
    (tmp_path / "front.js").write_text(script, encoding="utf-8")
    told = subprocess.run(["node", tmp_path / "front.js"], input=json.dumps(cases), capture_output=True, text=True, check=True)
    for case, page in zip(cases, json.loads(told.stdout), strict=True):
        assert page == unbeaten(np.array(case["values"], float) * case["signs"], case["slack"]), case
