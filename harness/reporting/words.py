"""How a comparison is said: plain statistical terms, with the numbers, and what they rest on in the same sentence."""

from __future__ import annotations

from harness.reporting.paired import Comparison
from harness.reporting.rows import Row
from harness.reporting.seeds import seed_count


def p_words(p: float) -> str:
    """'p < 0.001' or 'p = 0.03'."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def numbers(c: Comparison) -> str:
    """'difference -0.1, 95 % interval [-0.3, 0.1], n = 32'."""
    count = f", n = {c.n}" if c.n else ""
    return f"difference {c.difference:+.3g}, 95 % interval [{c.low:+.3g}, {c.high:+.3g}]{count}"


def no_difference(c: Comparison) -> str:
    """What is said of a test that found nothing: not that there is nothing."""
    return f"no difference shown ({numbers(c)})"


def one_training(*rows: Row) -> bool:
    """Whether a trained row among `rows` was trained once, so that another training might say otherwise."""
    return any(seed_count(row) == 1 for row in rows)


def over_seeds_words(c: Comparison) -> str:
    """', 3 and 3 training seeds apart', ', one training each' or what else the trainings say; '' when nothing was trained."""
    if c.apart is None:
        return ", from one training each, which another may overturn" if one_training(c.row, c.other) else ""
    counts = " and ".join(str(seed_count(row)) for row in (c.row, c.other) if seed_count(row))
    return f", {counts} training seeds {'apart' if c.apart else 'overlap: no claim'}"
