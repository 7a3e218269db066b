"""A sweep file: YAML -> checked, expanded description of what to run. Imports neither torch nor Ray nor MLflow.

Parsing is strict: every error is a ConfigError that names the file, the dotted key, the value and the remedy. An axis is
marked, never inferred: `keep_ratio: {grid_search: [0.9, 0.7]}` gives two trials, a plain list is a list. Options of methods,
metrics and backbones are checked one step later, in `harness.sweep.resolve`, because that needs the classes behind the names.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.api import Method, Trial, build_config, did_you_mean, require, show
from harness.api.registry import AXIS_HINT
from harness.sweep.grid import AXIS, axes_in, checked_axes, expanded, size_of, size_of_point
from harness.sweep.search.config import Asha, Search, parse_asha, parse_search
from harness.sweep.search.draws import grid_points, random_points
from harness.sweep.search.entries import as_entry
from harness.sweep.search.space import Point
from harness.sweep.yaml import parse, read

"""Version of the trial dictionary; part of every trial id, so that a new meaning can never collide with old results."""

KEYS = ("name", "question", "seeds", "backbone", "sampler", "data", "metrics", "train", "methods", "resources", "budget",
        "search", "asha")
SHARED = ("seeds", "backbone", "sampler", "data", "metrics", "train", "budget")
REQUIRED = ("name", "seeds", "backbone", "metrics", "methods")
RESERVED = ("flops_cut", "speedup", "label", "preset", "train")
"""Keys of a `methods` entry that belong to the harness and not to the method."""
BUDGETS = {"flops_cut": ("the fraction of FLOPs to save, a number between 0 and 1 such as 0.24", 0, 1),
           "speedup": ("how many times as fast as dense, a number above 1 such as 1.25", 1, 1000)}
"""Budget -> (what it means, bounds of the number, both excluded)."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_SEEDS = re.compile(r"([0-9]{1,18})\s*-\s*([0-9]{1,18})")
MAX_TRIALS, MAX_IMAGES, MAX_VALUES = 2000, 10**6, 10**6
"""Far beyond any sensible sweep, and small enough that a slip of the pen is refused at once instead of filling the memory.

MAX_VALUES: values of all trials together, for each trial has its own copy of what the file says: 2000 trials of 500 values.
"""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job may use. None means: derived from the machine.

    workers: score jobs at once on a node. threads: of each score job. gpu: GPUs of a score job, may be a fraction.
    timing_threads: of a timing job, which has its node to itself.
    """

    workers: int | None = None
    threads: int = 1
    gpu: float | None = None
    timing_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "timing_threads"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= 4096, f"{name} must be at least 1 and at most 4096, got {value}")
        require(self.gpu is None or 0 <= self.gpu <= 1024, f"gpu must not be negative and at most 1024, got {self.gpu}")


@dataclass(frozen=True)
class Draft:
    """One point of the grid as written, before defaults are filled in.

    file, place: what to name in errors, such as "sweeps/smoke.yaml" and "methods[2]". budget: {'flops_cut' or 'speedup': number},
    or empty. own: the reserved keys that the entry wrote
    itself, as opposed to defaults from the top of the file. label: the user's own name of the entry, or None. preset: a named set
    of the method's options, over which `method` is laid, or None. shared: backbone, sampler, data, metrics as written, and seeds
    as [first, last].
    """

    file: str
    place: str
    method: dict[str, Any]
    budget: dict[str, float]
    train: dict[str, Any]
    label: str | None
    preset: str | None
    own: frozenset[str]
    shared: dict[str, Any]
    number: int | None = None
    """Of a trial of a search, from 1; None for an entry of `methods`."""

    @property
    def where(self) -> str:
        """'<file>: methods[2]'."""
        return f"{self.file}: {self.place}"

    def preset_options(self, cls: type[Method]) -> dict[str, Any]:
        """The options of the entry's preset, none without one. A budget solves for the knob, whatever the preset says of it."""
        if self.preset is None:
            return {}
        require(self.preset in cls.presets, f"{self.where}.preset: method '{cls.name}' has no preset '{self.preset}'."
                f"{did_you_mean(self.preset, list(cls.presets))}")
        return dict(cls.presets[self.preset])


@dataclass(frozen=True)
class Entry:
    """One trial of a sweep. varied: the dotted keys in which the trials of the sweep differ, with this trial's values."""

    trial_id: str
    trial: Trial
    label: str
    varied: dict[str, Any]
    code: str = ""
    """Hash of the method's source, so that a result of yesterday's code is not taken for today's."""
    number: int | None = None
    """Of a trial of a search, from 1."""
    draft: Draft | None = field(default=None, repr=False, compare=False)
    """What the file says of it: for messages."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file. `drafts` after `load`, `entries` after `harness.sweep.resolve.resolve`. text: the file as read."""

    path: Path
    name: str
    question: str
    text: str
    resources: Resources
    drafts: list[Draft] = field(repr=False)
    entries: list[Entry] = field(default_factory=list, repr=False)
    search: Search | None = None
    asha: Asha | None = None
    shared: dict[str, Any] = field(default_factory=dict, repr=False)
    """The top of the file as written, over which a point of the search is laid."""
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """{method: {dotted option that varies: its default}}: what an ablation compares with."""

    @property
    def trials(self) -> list[Trial]:
        """The resolved trials, dense first."""
        return [entry.trial for entry in self.entries]

    @property
    def trial_ids(self) -> list[str]:
        """Ids in the order of `trials`."""
        return [entry.trial_id for entry in self.entries]

    def draft(self, point: Point, number: int) -> Draft:
        """The trial that point `number` of the search means, laid over the top of the file."""
        entry, sampler = as_entry(point, number)
        shared = copy.deepcopy(self.shared)
        if sampler:
            shared["sampler"] = {**_mapping(shared["sampler"], f"{self.path}: sampler"), **sampler}
        return dataclasses.replace(_draft(shared, entry, str(self.path), "search.space"), number=number)

    @property
    def file_hash(self) -> str:
        """sha256 of the file, 12 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def budget_words(budget: dict[str, Any]) -> str:
    """'-41%' or 'x1.25'."""
    return f"-{100 * budget['flops_cut']:g}%" if "flops_cut" in budget else f"x{budget['speedup']:g}"


def load(path: Path | str) -> Sweep:
    """Read, check and expand a sweep file; no option of a method, metric or backbone is checked yet."""
    path = Path(path)
    text = read(path)
    tree = parse(text, str(path))
    require(tree is not None, f"{path}: the file is empty; a sweep needs {', '.join(REQUIRED)}")
    require(isinstance(tree, dict), f"{path}: expected keys such as 'name:' at the top, got {show(tree)}")
    return _build(tree, text, path)


# ---------------------------------------------------------------------------------------------- the top level


def _build(tree: dict[str, Any], text: str, path: Path) -> Sweep:
    where = str(path)
    for key in tree:
        require(key in KEYS, f"{where}: unknown key '{key}'.{did_you_mean(key, KEYS)}")
    for key in REQUIRED:
        require(tree.get(key) is not None, f"{where}: {key} is missing; a sweep needs {', '.join(REQUIRED)}")
    name, question = tree["name"], tree.get("question") or ""
    require(isinstance(name, str) and _NAME.fullmatch(name) is not None and len(name) <= 80,
            f"{where}: name: {show(name)} cannot be a folder name; use letters, digits, '-', '_' and inner dots, at most "
            "80 of them")
    require(isinstance(question, str), f"{where}: question: expected text, got {show(question)}")
    require(next(axes_in({k: tree.get(k) for k in ("name", "question", "resources", "asha")}), None) is None,
            f"{where}: {AXIS} is not possible in name, question, resources or asha")
    resources = build_config(Resources, tree.get("resources") or {}, f"{where}: resources", axis=False)
    search = parse_search(tree.get("search"), f"{where}: search")
    sweep = Sweep(path=path, name=name, question=question.strip(), text=text, resources=resources,
                  drafts=list(_drafts(tree, where)), search=search, asha=parse_asha(tree.get("asha"), f"{where}: asha", search),
                  shared={key: tree.get(key) for key in SHARED})
    return _with_search(sweep) if search else sweep


def _with_search(sweep: Sweep) -> Sweep:
    """The sweep with the trials of a search that are known from the start, after the entries of `methods`."""
    where, options, space = f"{sweep.path}: search", sweep.search.options, sweep.search.space
    axis = next(axes_in(sweep.shared), None)
    require(axis is None, f"{sweep.path}: {'.'.join(map(str, axis[0] if axis else ()))}: {AXIS} at the top of the file is not "
            "possible beside a search; write it into search.space")
    room = MAX_TRIALS - len(sweep.drafts)
    require((options.num_trials or 1) <= room, f"{where}.num_trials: with the {len(sweep.drafts)} trials of methods these are "
            f"more than {MAX_TRIALS}; lower it")
    points = [] if sweep.search.asks else grid_points(space, room, where) if options.algorithm == "grid" else \
        random_points(space, options.num_trials, options.seed, where)
    values = size_of(sweep.shared) * max(len(points), options.num_trials or 0)
    require(values <= MAX_VALUES, f"{where}: the top of the file, copied for each trial, makes {values} values; at most "
            f"{MAX_VALUES} are possible, so shorten the longest list there, or lower num_trials")
    if sweep.search.asks:
        return sweep
    return dataclasses.replace(sweep, drafts=[*sweep.drafts, *(sweep.draft(p, i) for i, p in enumerate(points, 1))])


def _drafts(tree: dict[str, Any], where: str) -> Iterator[Draft]:
    shared = {key: tree.get(key) for key in SHARED}
    entries = tree["methods"]
    require(isinstance(entries, list) and bool(entries),
            f"{where}: methods: expected a list such as '- {{name: dense}}', got {show(entries)}")
    room, values = MAX_TRIALS, MAX_VALUES
    for index, item in enumerate(entries):
        place = f"methods[{index}]"
        options = {"name": item} if isinstance(item, str) else item
        require(isinstance(options, dict) and isinstance(options.get("name"), str),
                f"{where}: {place}: an entry needs a name, such as {{name: dense}}; got {show(item)}")
        both = {"shared": shared, "entry": options}
        axes = checked_axes(both, where, place)
        each, points = size_of_point(both, axes), math.prod(len(marker[AXIS]) for _, marker in axes)
        room, values = room - points, values - each * points
        require(room >= 0, f"{where}: {place}: with this entry the sweep has more than {MAX_TRIALS} trials, by "
                f"{' x '.join(str(len(marker[AXIS])) for _, marker in axes) or 'one'}; shorten a {AXIS} or split the file")
        require(values >= 0, f"{where}: {place}: with this entry the trials hold more than {MAX_VALUES} values together, "
                f"{points} x {each} of them by this entry; shorten the longest list in it or at the top of the file, or a {AXIS}")
        for point in expanded(both, axes):
            yield _draft(point["shared"], point["entry"], where, place)


def _draft(shared: dict[str, Any], entry: dict[str, Any], where: str, place: str) -> Draft:
    label = entry.get("label")
    require(label is None or (isinstance(label, str) and 0 < len(label) <= 80 and label.isprintable()),
            f"{where}: {place}.label: expected a short text, got {show(label)}")
    preset = entry.get("preset")
    require(preset is None or isinstance(preset, str),
            f"{where}: {place}.preset: expected a name such as official, got {show(preset)}")
    default = _budget(_mapping(shared.pop("budget"), f"{where}: budget"), f"{where}: budget")
    own = {key: entry[key] for key in BUDGETS if key in entry}  # null: no budget, whatever the default
    budget = _budget({key: value for key, value in own.items() if value is not None}, f"{where}: {place}") if own else default
    train = _merged(_mapping(shared.pop("train"), f"{where}: train"), _mapping(entry.get("train"), f"{where}: {place}.train"))
    shared["seeds"] = _seeds(shared["seeds"], f"{where}: seeds")
    method = {key: value for key, value in entry.items() if key not in RESERVED}
    return Draft(file=where, place=place, method=method, budget=budget, train=train, label=label, preset=preset,
                 own=frozenset(entry) & frozenset(RESERVED), shared=shared)


def _budget(written: dict[str, Any], where: str) -> dict[str, float]:
    """{'flops_cut': 0.24}, {'speedup': 1.2} or nothing, from the options of a budget."""
    for key, value in written.items():
        require(key in BUDGETS, f"{where}: unknown option '{key}'.{did_you_mean(key, BUDGETS)}")
        meaning, least, below = BUDGETS[key]
        require(type(value) in (int, float) and least < value < below, f"{where}.{key}: expected {meaning}, got "
                f"{show(value)}{AXIS_HINT if isinstance(value, list) else ''}")
    require(len(written) <= 1, f"{where}: flops_cut and speedup are two budgets for one knob; remove one")
    return {key: float(value) for key, value in written.items()}


def _seeds(value: Any, where: str) -> list[int]:
    """'0-95' -> [0, 95], both included; 96 -> [0, 95]."""
    if type(value) is int:
        require(1 <= value <= MAX_IMAGES, f"{where}: expected at least one image and at most {MAX_IMAGES}, got {value}")
        return [0, value - 1]
    match = _SEEDS.fullmatch(value.strip()) if isinstance(value, str) else None
    require(match is not None, f"{where}: expected a number of images such as 96, or a range such as 0-95, got {show(value)}")
    first, last = int(match[1]), int(match[2])  # type: ignore[index]
    require(first <= last, f"{where}: the range {value} is empty; write the smaller seed first")
    require(last - first < MAX_IMAGES, f"{where}: the range {value} is {last - first + 1} images; at most "
            f"{MAX_IMAGES} are possible")
    return [first, last]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    require(value is None or isinstance(value, dict),
            f"{where}: expected a mapping of options, got {show(value)}")
    return value or {}


def _merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`override` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
