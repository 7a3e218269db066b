"""An interval is printed only if its coverage was measured; only `statistics.intervals` makes one; the extrapolation is right."""

import ast
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from harness.api import METRICS, Measure
from harness.metrics.fidelity import fd
from harness.metrics.fidelity.fd import Frechet, KernelDistance
from harness.metrics.fidelity.feature_sets import FeatureSets
from harness.metrics.fidelity.spread import DistanceOptions, distance_measure, images_and_dense
from harness.statistics import intervals
from harness.study import intervals as study
from harness.study.intervals_report import KINDS

ROOT = Path(__file__).parent.parent
DRAWS = 400
SLACK = 3 * (0.05 * 0.95 / DRAWS) ** 0.5
"""Three standard errors of a share of 95 % in so many draws."""
CASES = study.cases()


def kinds() -> set[str]:
    """The public functions of `harness.statistics.intervals` that give an interval."""
    return {name for name, function in inspect.getmembers(intervals, inspect.isfunction)
            if function.__module__ == intervals.__name__ and not name.startswith("_")
            and "Interval" in str(inspect.signature(function).return_annotation)}


# ---------------------------------------------------------------------------------------------- coverage


def test_every_kind_of_interval_has_its_coverage_measured():
    assert kinds() == {case.kind for case in CASES} == set(KINDS)
    for kind in kinds():
        assert any(case.quick for case in CASES if case.kind == kind), f"{kind}: a test measures none of its cases"


@pytest.mark.parametrize("case", [case for case in CASES if case.quick],
                         ids=lambda case: f"{case.kind} {case.n} {case.values}".replace(" ", "-"))
def test_an_interval_holds_the_truth_as_often_as_it_says(case):
    """In 93 to 97 % of the draws, give or take three standard errors of so few; more where it is said to be conservative."""
    found = study.coverage(case, DRAWS, seed=1)["covered"]
    assert found >= study.LEAST - SLACK
    assert found <= study.GREATEST + SLACK or case.said == "conservative"


def test_what_the_docs_call_conservative_or_short_is_what_was_measured():
    published = json.loads((ROOT / "results/published/intervals/data.json").read_text(encoding="utf-8"))
    rows = {(row["kind"], row["printed"], row["n"], row["values"]): row for row in published["rows"]}
    assert published["draws"] >= 2000 and set(rows) == {(c.kind, c.printed, c.n, c.values) for c in CASES}
    for case in CASES:
        row = rows[case.kind, case.printed, case.n, case.values]
        assert row["verdict"] == "held" or case.said == row["verdict"], f"{case}: measured as {row['covered']}, and not said"


def test_nothing_but_stats_makes_an_interval():
    """No quantile of draws, no quantile of a distribution and no 1.96 elsewhere: it would escape the study."""
    allowed = {"harness/statistics/intervals.py", "harness/study/intervals.py"}
    found = []
    for file in sorted((ROOT / "harness").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else \
                node.value if isinstance(node, ast.Constant) else None
            if name in ("quantile", "percentile", "stdtrit", "ndtri", "bootstrap", 1.96, 1.95996) and "special.ndtri" not in \
                    (ast.unparse(node) if isinstance(node, ast.Attribute) else ""):
                found.append(str(file.relative_to(ROOT)))
    assert set(found) <= allowed, f"{set(found) - allowed}: make it in statistics/intervals.py, with a case in the study"


# ---------------------------------------------------------------------------------------------- distances


def test_a_distance_of_five_images_has_no_interval():
    a, b = np.random.default_rng(0).normal(size=(2, 60, 4))
    features = FeatureSets(a[:5], b, a[:5] + 1, "real")
    frechet = Frechet(images_and_dense(features), b)
    found = distance_measure("fid_5", lambda weights: [frechet(w) for w in weights], features,
                             DistanceOptions(num_subsets=2, num_permutations=9)).measure
    assert found.interval is None and found.notes["to_dense"]["interval"] is None


def closed_bias(scales: np.ndarray, real: np.ndarray, n: int) -> float:
    """Of the Frechet distance of n images of N(0, diag(scales^2)) to N(0, diag(real^2)), to first order in 1/n.

    tr S / n by the mean; and by the curvature of the matrix root, whose second derivative at M = S_r^(1/2) S S_r^(1/2) meets the
    Wishart variance m_i m_j (1 + [i = j]) / (n - 1).
    """
    root = scales * real
    pairs = np.outer(root, root) / (root[:, None] + root)
    return float((scales**2).sum() / n + (pairs.sum() + np.trace(pairs)) / 2 / (n - 1))


@pytest.mark.parametrize(("flat", "d", "n"), [(True, 8, 400), (False, 16, 400), (False, 32, 800)])
def test_the_extrapolated_distance_of_two_gaussians_has_lost_the_closed_form_of_the_bias(flat, d, n):
    scales = np.ones(d) if flat else 1 / np.sqrt(np.arange(1, d + 1))
    real = 1.2 * scales
    rng = np.random.default_rng(d)
    white = rng.normal(size=(4 * d, d))
    white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    truth, plain, infinite = float(((scales - real) ** 2).sum()), [], []
    for _ in range(60):
        frechet = Frechet(rng.normal(size=(n, d)) * scales, white * real)  # a reference whose covariance is exactly known
        plain.append(frechet())
        infinite.append(intervals.extrapolated(plain[-1], [frechet(row) for row in intervals.leave_out(n)], n))
    bias, error = closed_bias(scales, real, n), np.std(infinite) / np.sqrt(len(infinite))
    assert np.mean(plain) - truth == pytest.approx(bias, abs=3 * error + 0.05 * bias)
    assert np.mean(infinite) == pytest.approx(truth, abs=3 * error + 0.05 * bias)
    assert bias > 6 * error  # so that the test can tell them apart


def test_there_is_an_extrapolated_distance_from_4096_images_on_and_none_below():
    fid, effnet = METRICS.build("fid", {}), METRICS.build("fd", {})
    assert fid.names(4000) == ("fidelity/fid_4k",) and fid.names(5000) == ("fidelity/fid_5k", "fidelity/fid_inf_5k")
    assert effnet.names(32) == ("fidelity/fd_effnet_32", "fidelity/kd_effnet_32")
    assert effnet.names(5000) == ("fidelity/fd_effnet_5000", "fidelity/kd_effnet_5000", "fidelity/fd_effnet_inf_5000")
    few, many = (Measure("fid", 3.0, "lower", n=n, title="FID (n = 1)") for n in (32, 5000))
    assert list(fd.extrapolation("fid_inf_32", few, 3.0, [3.1] * 32, {})) == []
    (found,) = fd.extrapolation("fid_inf_5k", many, 3.0, [3.001] * 32, {"reference_id": "x"})
    assert found.value == pytest.approx(3 - 0.001 * (5000 - 156) / 156) and found.notes["reference_id"] == "x"
    assert found.interval[0] < found.value < found.interval[1] < 3.0


def test_the_interval_of_a_kernel_distance_holds_the_chance_of_its_subsets():
    rng = np.random.default_rng(0)
    images, real = rng.normal(size=(30, 6)), rng.normal(size=(200, 6))
    assert KernelDistance(images, real).subset_variance > 0
    assert KernelDistance(images, rng.normal(size=(30, 6))).subset_variance < 1e-20  # every subset is everything
