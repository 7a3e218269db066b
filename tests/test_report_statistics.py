"""What the report calls a difference: paired tests, their corrections, and how few images prove nothing."""

import numpy as np
import pytest
from fake_reports import by_label, text_of
from fake_reports import sweep_folder as sweep_folder
from fake_results import make_sweep, write_result

from harness.reporting.paired import Comparison, compare, corrected, holm, paired_difference
from harness.reporting.rows import load_sweep


def test_pairing_finds_what_independent_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    mean, low, high, p = paired_difference(hard + 0.05 + 0.01 * rng.normal(size=200), hard)
    assert low < 0.05 < high and p < 0.001
    assert 1.96 * hard.std() / np.sqrt(200) > 0.05  # the difference is far inside the spread over images
    assert mean == pytest.approx(0.05, abs=0.01)


def test_the_p_value_is_uniform_when_nothing_differs():
    rng = np.random.default_rng(1)
    p_values = [paired_difference(rng.normal(size=60), rng.normal(size=60), seed=i)[3] for i in range(60)]
    assert 0.3 < np.mean(p_values) < 0.7 and np.mean(np.array(p_values) < 0.05) < 0.15


def test_identical_images_are_no_difference():
    values = np.linspace(0, 1, 30)
    assert paired_difference(values, values) == (0.0, 0.0, 0.0, 1.0)


def test_a_handful_of_images_proves_nothing():
    *_, p = paired_difference(np.array([1.0, 1.1]), np.zeros(2))
    assert p == pytest.approx(0.5, abs=0.05)
    *_, p = paired_difference(np.array([1.0, 1.1, 0.9, 1.2]), np.zeros(4))
    assert p == pytest.approx(0.125, abs=0.02)


def test_below_eight_images_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.reporting.report._figures", lambda *sweeps: set())
    make_sweep(tmp_path / "few", images=4, artifacts=False)
    text = text_of(tmp_path / "few")
    assert "4 images, fewer than 8" in text and "beats `random_drop`" not in text and "not beat" not in text
    results = text.split("## Results")[1].split("##")[0]
    assert "**" not in "".join(line.split("|")[-4] for line in results.splitlines() if line.startswith("| shiva"))


def test_a_gap_that_so_few_images_could_never_prove_is_not_called_noise():
    rng, base = np.random.default_rng(0), {"row": None, "other": None, "metric": "m", "better": "lower"}

    def corrected_of(num_images: int, gap: float) -> Comparison:
        found = paired_difference(rng.normal(gap, 0.1, num_images), np.zeros(num_images))
        one = Comparison(**base, difference=found[0], low=found[1], high=found[2], p=found[3], n=num_images)
        return corrected([one] * 30)[0]

    small, large, nothing = corrected_of(8, 1.0), corrected_of(32, 1.0), corrected_of(8, 0.0)
    assert small.verdict == "noise" and small.too_few and small.p > 0.05
    assert large.verdict == "worse" and not large.too_few
    assert nothing.verdict == "noise" and not nothing.too_few


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_infinite_psnr_pairs_are_dropped_not_averaged(sweep_folder):
    folder, results = sweep_folder
    odd = by_label(results, "shiva -24%")
    odd["per_image"]["dense/psnr_db"][3] = float("inf")
    write_result(folder, odd)
    rows = {row.label: row for row in load_sweep(folder).rows}
    comparison = compare(rows["shiva -24%"], rows["random_drop -24%"], "dense/psnr_db")
    assert comparison.n == 23 and np.isfinite(comparison.difference)
