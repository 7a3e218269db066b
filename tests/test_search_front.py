"""The front of a search and its hypervolume, by other means; and where they are told."""

import itertools
import random

import pytest
from fake_search import OPTUNA, RANDOM
from fake_search import sweep as sweep

from harness.report import write_report
from harness.reporting.front import dominates, front_of, hypervolume, summary
from harness.reporting.rows import load_sweep
from harness.run import DONE


def test_the_hypervolume_is_the_area_of_the_union():
    for seed in range(40):
        draw = random.Random(seed)
        points = [(draw.randint(0, 8), draw.randint(0, 8)) for _ in range(draw.randint(0, 9))]
        reference = (draw.randint(1, 8), draw.randint(1, 8))
        cells = itertools.product(range(reference[0]), range(reference[1]))
        assert hypervolume(points, reference) == sum(any(x <= i and y <= j for x, y in points) for i, j in cells)
    assert hypervolume([], (1, 1)) == 0 and hypervolume([(0.25, 0.5)], (1, 1)) == pytest.approx(0.375)


def test_dominating_is_being_nowhere_worse_and_somewhere_better():
    assert dominates((1, 2), (1, 3)) and not dominates((1, 2), (1, 2)) and not dominates((0, 3), (1, 2))


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
    from harness.tracking import Tracker, open_client

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
