"""A search space as a sweep file writes it: what may vary, how, and under which conditions. No code in it, no eval.

    method.name: {choice: [random_drop, tomesd]}
    method.keep_ratio: {uniform: [0.4, 0.9], when: {method.name: random_drop}}
    method.ffn: {choice: [true, false], when: {method.name: [tomesd, tofu]}}
    train.steps: 160

A parameter is marked by an operator; everything else is a constant. `when` names parameters that stand above it. A parameter that
means something else under other conditions is a list of cases, `{cases: [{uniform: ..., when: ...}, ...]}`; the first that holds
counts. A parameter of which no case holds is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness.api import brief, did_you_mean, require, show

GROUPS = ("method", "train", "sampler", "budget")
"""What a parameter may belong to: the first word of its name."""
BUDGETS = ("flops_cut", "speedup")
OPERATORS = {"choice": "a list such as [a, b]", "uniform": "two numbers, the smaller first, such as [0.4, 0.9]",
             "log_uniform": "two positive numbers, the smaller first, such as [0.0001, 0.01]",
             "int": "two whole numbers, the smaller first, such as [1, 8]", "value": "one value"}
CASES, WHEN = "cases", "when"
MAX_PARAMETERS, MAX_CHOICES = 64, 256
DIGITS = 4
Point = dict[str, Any]
"""{parameter: value} of the parameters that are present."""


@dataclass(frozen=True)
class Domain:
    """One case of a parameter. kind: an operator. values: of a choice (or one constant), else [low, high], both included.

    when: {an earlier parameter: the values under which this case holds}.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    case: int = 0

    @property
    def key(self) -> str:
        """A name of its own for each case, since cases differ in what they choose from."""
        return f"{self.name}#{self.case}" if self.case else self.name

    def holds(self, point: Point) -> bool:
        """Whether every condition is met by what is chosen so far; an absent parameter meets none."""
        return all(name in point and any(same(point[name], value) for value in allowed) for name, allowed in self.when)

    def rounded(self, value: float) -> float:
        """`value` with DIGITS significant digits, what a person can type again, and within the bounds."""
        low, high = self.values
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    def __str__(self) -> str:
        inside = ", ".join(map(brief, self.values))
        text = brief(self.values[0]) if self.kind == "value" else f"{self.kind} [{inside}]"
        conditions = " and ".join(f"{name} is {' or '.join(map(brief, allowed))}" for name, allowed in self.when)
        return f"{text} when {conditions}" if conditions else text


Pick = Callable[[Domain], Any]
"""Chooses a value of a domain; asked for those that hold, in the order of the file."""


@dataclass(frozen=True)
class Space:
    """{parameter: its cases}, in the order of the file."""

    parameters: Mapping[str, tuple[Domain, ...]]

    def assign(self, pick: Pick) -> Point:
        """One point: every parameter of which a case holds, by `pick`; a constant is not asked for."""
        point: Point = {}
        for name, cases in self.parameters.items():
            domain = next((case for case in cases if case.holds(point)), None)
            if domain is not None:
                point[name] = domain.values[0] if domain.kind == "value" else pick(domain)
        return point

    def points(self, values_of: Callable[[Domain], tuple[Any, ...]]) -> Iterator[Point]:
        """Every point whose values are among `values_of` the domain that holds, the last parameter fastest."""
        names = list(self.parameters)

        def extend(point: Point, index: int) -> Iterator[Point]:
            if index == len(names):
                yield point
                return
            domain = next((case for case in self.parameters[names[index]] if case.holds(point)), None)
            if domain is None:
                yield from extend(point, index + 1)
                return
            for value in values_of(domain):
                yield from extend({**point, names[index]: value}, index + 1)

        yield from extend({}, 0)

    @property
    def conditions(self) -> set[str]:
        """Parameters that some condition looks at."""
        return {name for cases in self.parameters.values() for case in cases for name, _ in case.when}


def same(left: Any, right: Any) -> bool:
    """Equality that tells 1 from true, as YAML does, and not 1 from 1.0."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def parse_space(written: Any, where: str) -> Space:
    """The space that a mapping means. Raises ConfigError naming `where` and the parameter."""
    require(isinstance(written, Mapping) and bool(written), f"{where}: expected parameters such as 'method.keep_ratio: "
            f"{{uniform: [0.4, 0.9]}}', got {show(written)}")
    require(len(written) <= MAX_PARAMETERS, f"{where}: {len(written)} parameters; at most {MAX_PARAMETERS} are possible")
    parameters: dict[str, tuple[Domain, ...]] = {}
    for name, value in written.items():
        _check_name(name, where)
        parameters[name] = _cases(name, value, parameters, f"{where}: {name}")
    require("method.name" in parameters, f"{where}: method.name is missing; say which method is searched, such as 'method.name: "
            "tomesd' or 'method.name: {choice: [tomesd, random_drop]}'")
    for domain in parameters["method.name"]:
        require(all(isinstance(value, str) for value in domain.values) and not domain.when and domain.kind in ("choice", "value"),
                f"{where}: method.name: expected a method or a choice of methods without when, got {domain}")
    return Space(parameters)


def _check_name(name: str, where: str) -> None:
    group, _, option = name.partition(".")
    require(group in GROUPS and bool(option), f"{where}: '{name}' is no parameter: write <group>.<option>, such as "
            f"method.keep_ratio.{did_you_mean(group, GROUPS)}")
    require("." not in option, f"{where}: '{name}': options of options cannot be searched; write one dot")
    require(group != "budget" or option in BUDGETS, f"{where}: unknown parameter '{name}'."
            f"{did_you_mean(name, [f'budget.{one}' for one in BUDGETS])}")
    for reserved, remedy in {"method.label": "a trial of a search is named by its number", "method.train": "write train.<option>",
                             "method.flops_cut": "write budget.flops_cut", "method.speedup": "write budget.speedup"}.items():
        require(name != reserved, f"{where}: {reserved}: not an option of a method; {remedy}")


def _cases(name: str, value: Any, above: Mapping[str, tuple[Domain, ...]], where: str) -> tuple[Domain, ...]:
    if not (isinstance(value, Mapping) and CASES in value):
        return (_domain(name, value, above, where),)
    require(len(value) == 1, f"{where}: {CASES} stands alone in its braces; move the other keys into the cases")
    cases = value[CASES]
    require(isinstance(cases, list) and 0 < len(cases) <= MAX_PARAMETERS, f"{where}.{CASES}: expected a list of at most "
            f"{MAX_PARAMETERS} cases such as [{{uniform: [0.4, 0.9], when: {{method.name: tomesd}}}}], got {show(cases)}")
    return tuple(replace(_domain(name, case, above, f"{where}.{CASES}[{index}]"), case=index) for index, case in enumerate(cases))


def _domain(name: str, value: Any, above: Mapping[str, tuple[Domain, ...]], where: str) -> Domain:
    if not isinstance(value, Mapping):
        return Domain(name, "value", (value,))
    require("grid_search" not in value, f"{where}: grid_search is not possible in a search; write choice")
    for key in value:
        require(key in OPERATORS or key == WHEN, f"{where}: unknown operator '{key}'.{did_you_mean(key, [*OPERATORS, WHEN])}")
    kinds = [key for key in value if key != WHEN]
    require(len(kinds) == 1, f"{where}: expected one operator and perhaps a {WHEN}, got {show(dict(value))}")
    return Domain(name, kinds[0], _values(kinds[0], value[kinds[0]], f"{where}.{kinds[0]}"),
                  _when(value[WHEN], above, f"{where}.{WHEN}") if WHEN in value else ())


def _values(kind: str, value: Any, where: str) -> tuple[Any, ...]:
    wrong = f"{where}: expected {OPERATORS[kind]}, got {show(value)}"
    if kind == "value":
        require(not isinstance(value, Mapping), wrong)
        return (value,)
    require(isinstance(value, list) and 0 < len(value) <= MAX_CHOICES, wrong)
    if kind == "choice":
        require(not any(isinstance(item, Mapping) for item in value), wrong)
        for index, item in enumerate(value):
            require(not any(same(item, other) for other in value[:index]), f"{where}: {show(item)} is listed twice; remove one")
        return tuple(value)
    numbers = (int,) if kind == "int" else (int, float)
    require(len(value) == 2 and all(type(item) in numbers for item in value) and value[0] < value[1]
            and (kind != "log_uniform" or value[0] > 0), wrong)
    return tuple(value if kind == "int" else map(float, value))


def _when(written: Any, above: Mapping[str, tuple[Domain, ...]], where: str) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    require(isinstance(written, Mapping) and bool(written), f"{where}: expected conditions such as {{method.name: tomesd}} or "
            f"{{method.name: [tomesd, tofu]}}, got {show(written)}")
    conditions = []
    for name, allowed in written.items():
        require(name in above, f"{where}: '{name}' is no parameter that stands above this one."
                f"{did_you_mean(name, list(above))}")
        values = allowed if isinstance(allowed, list) else [allowed]
        known = [value for case in above[name] if case.kind in ("choice", "value") for value in case.values]
        require(bool(values) and all(case.kind in ("choice", "value") for case in above[name]),
                f"{where}.{name}: a condition needs values of a choice, and '{name}' is {above[name][0]}")
        for value in values:
            require(any(same(value, one) for one in known),
                    f"{where}.{name}: {show(value)} is never chosen.{did_you_mean(brief(value), [brief(one) for one in known])}")
        conditions.append((name, tuple(values)))
    return tuple(conditions)
