"""No reduction: the row every other row is divided by."""

from harness.api import METHODS, Method


@METHODS.register("dense")
class Dense(Method):
    """Every token is computed; nothing is attached to the model."""

    sites = frozenset()
    knob = None
