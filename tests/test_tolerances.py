"""How near is near enough: tolerances of budgets, and of what was executed to what was counted, at both of their sides."""

from types import SimpleNamespace

import numpy as np
import pytest

import methods as _methods  # noqa: F401  (fills the registry)
from harness.api import METHODS, ConfigError
from harness.cost import budget
from harness.trial import job


class Counter:
    """A meter by which a method saves `cut(keep_ratio)`; asked: of every count."""

    def __init__(self, cut):
        self.of, self.asked = cut, []

    def cut(self, method):
        """The FLOPs saved."""
        self.asked.append(method.config.keep_ratio)
        return self.of(method.config.keep_ratio)


def test_a_knob_is_solved_to_a_ten_thousandth_of_the_cut():
    for asked in (0.1, 0.2345, 0.7):
        counter = Counter(lambda keep_ratio: 0.9 * (1 - keep_ratio) ** 1.7)
        found = budget.solve_budget(counter, "random_drop", {}, asked)
        cuts = [counter.of(ratio) for ratio in counter.asked]
        assert abs(found.executed - asked) <= 1e-4 and found.executed == cuts[-1]
        assert all(abs(cut - asked) > 1e-4 for cut in cuts[:-1]), "and the search stops there"
        assert found.value == counter.asked[-1] and round(found.value * 10_000) == pytest.approx(found.value * 10_000)
        assert len(cuts) < 14 and (found.knob, found.asked, found.unit) == ("keep_ratio", asked, "flops_cut")


def test_where_a_staircase_misses_the_cut_the_nearer_step_is_taken():
    for asked, executed in ((0.24, 0.2), (0.26, 0.3), (0.49, 0.5)):
        counter = Counter(lambda keep_ratio: int(10 * (1 - keep_ratio) + 1e-9) / 10)
        assert budget.solve_budget(counter, "random_drop", {}, asked).executed == executed


def test_half_a_point_beyond_the_reach_is_still_within_it():
    counter = Counter(lambda keep_ratio: 0.5 * (1 - keep_ratio))
    reach = counter.of(1e-4)
    assert budget.solve_budget(counter, "random_drop", {}, reach + 0.0049).executed == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ConfigError, match="cannot cut 50.5% of the FLOPs.*reaches 0 to 50.0%"):
        budget.solve_budget(counter, "random_drop", {}, reach + 0.0051)


def test_a_method_that_saves_too_much_at_its_end_is_told_at_half_a_point():
    counter = Counter(lambda keep_ratio: 1 - 0.8 * keep_ratio)
    assert budget.solve_budget(counter, "random_drop", {}, 0.1951).value == 1
    with pytest.raises(ConfigError, match="saves 20.0% even at keep_ratio=1; ask for at least 0.20"):
        budget.solve_budget(counter, "random_drop", {}, 0.1949)


def test_the_lowest_valid_knob_is_found_by_halving():
    assert budget.lowest_valid("random_drop", {}, "keep_ratio") == 1  # (0, 1] in steps of 1/10,000
    assert budget.lowest_valid("sdtm", {"window": 2}, "keep_ratio") == 2500
    assert (budget.KNOB_STEPS, budget.CLOSE_ENOUGH) == (10_000, 1e-4)


def executed(kept, images=0, dense=1):
    """A subject whose every attention kept this fraction."""
    return SimpleNamespace(method=METHODS.build("random_drop", {}), kept={"attention": [[1.0, kept]], "ffn": [[1.0, 1.0]]},
                           images=np.full((1, 2, 2, 3), images, np.uint8), dense_images=np.full((1, 2, 2, 3), dense, np.uint8))


def test_what_was_executed_is_what_was_counted_within_a_hundredth():
    promised = {"attention": [[1.0, 0.5]], "ffn": [[1.0, 1.0]]}
    for kept in (0.4901, 0.5, 0.5099):
        job._check_work_was_saved(executed(kept), promised)
    for kept in (0.4899, 0.5101):
        with pytest.raises(RuntimeError, match=r"computed other tokens than were counted: at some attention .* off by 0.010"):
            job._check_work_was_saved(executed(kept), promised)
    with pytest.raises(RuntimeError, match="changed nothing"):
        job._check_work_was_saved(executed(1.0, 7, 7), {"attention": [[1.0, 1.0]], "ffn": [[1.0, 1.0]]})
    job._check_work_was_saved(executed(1.0, 7, 8), {"attention": [[1.0, 1.0]], "ffn": [[1.0, 1.0]]})
