"""What can be known of a sweep before any of it is computed: each trial on its model's configs, its data and this machine.

A dry run and the first seconds of a run ask the same. What a job would refuse for the file, the configs, the data or the machine
is refused here, so that no night ends with what its first minute could have said.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from harness import data
from harness.api import METHODS, METRICS, Backbone, ConfigError, NotHere, Planned, Trial, build_config, named, require
from harness.cost.budget import KNOB_STEPS, check_reach, lowest_valid
from harness.cost.flops import Meter
from harness.cost.reach import ends_of
from harness.execution.machine import Machine
from harness.storage.store import Store
from harness.sweep.file import BUDGETS, Entry, Sweep
from harness.sweep.resolve import grown
from harness.sweep.search.draws import probes
from harness.training.config import TrainConfig
from harness.trial import sketches
from harness.trial.sketches import known_sketch, sketch_of

PATIENCE_S = 60.0
"""Of CPU time: so long the ends of budgets are counted; those that are left are refused by their own job, before it samples."""
CLOSE = 0.005
"""Of an executed cut to the one asked for, as `harness.cost.budget` has it."""
MAX_PROBED = 32
"""Points of a search's space that stand for those that will be suggested."""
Model = tuple[Backbone, Meter]


def check(sweep: Sweep, machine: Machine, store: Store | None = None, only: Collection[str] | None = None) -> list[str]:
    """Raise ConfigError for the first trial that cannot be done; returns labels of rows whose budget there was no time to check.

    store: where the ends of budgets are kept for the next time. only: ids of the trials that still have something to do.
    """
    sketches.forget()
    machine.check(sweep)
    checks = _Checks(sweep, machine, store)
    entries = [entry for entry in sweep.entries if only is None or entry.trial_id in only]
    if sweep.search and sweep.search.asks:
        entries += _probed(sweep)
    for entry in entries:
        checks.check(entry)
    quick_first = sorted(entries, key=lambda entry: entry.trial["train"] is not None)
    return [entry.label for entry in quick_first if not checks.reaches(entry)]


def _probed(sweep: Sweep) -> list[Entry]:
    """Trials at the ends of a space whose points are suggested as it goes on: none of them is promised, but each may come."""
    points = list(itertools.islice(probes(sweep.search.space), MAX_PROBED))
    known = set(sweep.trial_ids)
    return [entry for entry in grown(sweep, points, 1)[0].entries if entry.trial_id not in known]


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put `place` before the message of a ConfigError that does not begin with it."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(str(error) if str(error).startswith(place) else f"{place}: {error}") from None


@dataclass
class _Checks:
    """Each question is asked once, however many trials pose it."""

    sweep: Sweep
    machine: Machine
    store: Store | None
    asked: set[str] = field(default_factory=set)
    trained_on: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Data of a trial -> its training images: how many, and pixels of a side."""
    spent: float = 0.0
    """CPU seconds of counting."""

    def check(self, entry: Entry) -> None:
        """All but the budget."""
        trial, file, where = entry.trial, str(self.sweep.path), self._where(entry)
        with naming(file):
            if self._new("device", trial, "backbone", "sampler"):
                self.machine.check_device(trial)
            model = self._model(trial)
            if self._new("data", trial, "backbone", "data", "seeds"):
                _check_data(trial, model and model[0])
            if self._new("metrics", trial, "metrics", "seeds", "data", "backbone", "sampler"):
                self._check_metrics(trial, model)
        with naming(where):
            if model and self._new("method", trial, "method", "budget", "backbone", "sampler"):
                if not (self.sweep.search and self.sweep.search.asks and entry.number):  # where an end is 1, less will be drawn
                    _check_less_than_all(trial, model[1])
                if not _counts(trial):
                    _check_fit(trial, *model)
            if trial["train"] and self._new("train", trial, "method", "train", "data", "backbone"):
                self._check_training(trial, model)

    def reaches(self, entry: Entry) -> bool:
        """Whether there was time to find the budget, if any, in reach. Raises ConfigError where it is not."""
        trial, where = entry.trial, self._where(entry)
        name = trial["method"]["name"]
        model = known_sketch(trial)
        if model is None or not _counts(trial):
            return True
        options, meter = named(trial["method"])[1], model[1]
        if METHODS.get(name).dynamic:
            with naming(where):
                _check_dynamic_reach(trial, meter)
            return True
        with naming(where), _named_method(name, model[0].name):
            began = time.process_time()
            ends = ends_of(trial, meter, self.store, counting=self.spent < PATIENCE_S)
            self.spent += time.process_time() - began
        if ends is None:
            with naming(where):
                _check_fit(trial, *model)
            return False
        own = entry.draft is not None and entry.draft.own & BUDGETS.keys()
        try:
            asked = trial["budget"]["flops_cut"]
            check_reach(meter, name, options, (*ends, asked), where if own else f"{self.sweep.path}: budget")
        except ConfigError as error:
            place = "" if own else f" (as flops_cut of {where.partition(': ')[2]}, if the other rows keep theirs)"
            raise ConfigError(f"{error}{place}") from None
        return True

    def _where(self, entry: Entry) -> str:
        return entry.draft.where if entry.draft else str(self.sweep.path)

    def _new(self, question: str, trial: Trial, *keys: str) -> bool:
        """Whether the question was not asked yet of these parts of a trial."""
        text = json.dumps([question, *(trial[key] for key in keys)], sort_keys=True)
        known = text in self.asked
        self.asked.add(text)
        return not known

    def _model(self, trial: Trial) -> Model | None:
        try:
            return sketch_of(trial)
        except NotHere:
            if self.machine.elsewhere:
                return None
            raise

    def _check_metrics(self, trial: Trial, model: Model | None) -> None:
        real = any(METRICS.get(metric["name"]).needs_reference for metric in trial["metrics"])
        first, last = trial["seeds"]
        planned = Planned(num_images=last - first + 1, num_real=data.count(trial["data"], trial["data"]["split"]) if real else 0,
                          run=model and model[1].run, timing_threads=self.machine.timing_threads(self.sweep))
        for index, metric in enumerate(trial["metrics"]):
            with naming(f"{self.sweep.path}: metrics[{index}]"):
                METRICS.build(*named(metric), "").check(planned)


    def _check_training(self, trial: Trial, model: Model | None) -> None:
        """There are enough images to train on, of the right size, and something to train."""
        config = build_config(TrainConfig, trial["train"], "train")
        key = json.dumps(trial["data"], sort_keys=True)
        if key not in self.trained_on:
            images = data.load_training(trial["data"])
            self.trained_on[key] = len(images.captions), images.images.shape[1]
        num, side = self.trained_on[key]
        held_out = config.num_held_out
        require(held_out < num, f"train.validation_images: {held_out} held out of {num} training images leaves none to train on; "
                "lower it, or write validate_every: 0")
        if model is not None:
            drawn = model[0].resolution
            require(side == drawn, f"data: the training images have {side} pixels a side, and the backbone draws {drawn}; train "
                    f"on a data set with resolution: {drawn}, or write backbone.resolution: {side} where the model can draw that")
            _check_parameters(trial, config, *model)


def _counts(trial: Trial) -> bool:
    """Whether both ends of its budget are counted, which tries the method too."""
    return "flops_cut" in (trial["budget"] or {}) and trial["sampler"]["compile"] == "off"


# ---------------------------------------------------------------------------------------------- one trial


def _check_data(trial: Trial, backbone: Backbone | None) -> None:
    """There are prompts that the model takes, and images of the size that it draws."""
    options = trial["data"]
    require(data.count(options, options["split"]) > 0, f"data.split: '{options['split']}' of '{options['name']}' has no pair, so "
            "nothing says what to draw; set reference_share above 0, or take the other split")
    if backbone is None:
        return
    with naming("data"):
        if type(backbone).check_prompts is not Backbone.check_prompts:
            from harness.trial.images import prompts_of

            backbone.check_prompts(prompts_of(options, range(trial["seeds"][0], trial["seeds"][1] + 1)))
    try:
        data.check_resolution(options, backbone.resolution)
    except ConfigError as error:
        raise ConfigError(f"{error}{_or_resized(trial)}") from None


def _or_resized(trial: Trial) -> str:
    """The other remedy for images of another size, where the model can draw them."""
    side = trial["data"].get("resolution") or (trial["data"].get("train") or {}).get("resolution")
    try:
        model = known_sketch({**trial, "backbone": {**trial["backbone"], "resolution": side}})
    except ConfigError:
        return ""
    return f", or backbone.resolution: {side}" if model else ""


def _check_fit(trial: Trial, backbone: Backbone, meter: Meter) -> None:
    """The method does something on this model at these options: tried for a step, on shapes."""
    name, options = trial["method"]["name"], named(trial["method"])[1]
    cls = METHODS.get(name)
    if trial["budget"]:
        options[cls.knob] = lowest_valid(name, options, cls.knob) / KNOB_STEPS
    with _named_method(name, backbone.name):
        meter.try_step(METHODS.build(name, options, "method"), trial["sampler"]["compile"])


def _check_dynamic_reach(trial: Trial, meter: Meter) -> None:
    """What a method whose steps depend on values saves at the most: where it computes the first step alone."""
    name, asked = trial["method"]["name"], trial["budget"]["flops_cut"]
    method = METHODS.build(name, named(trial["method"])[1], "method")
    with _named_method(name, meter.backbone.name):
        method.pattern = (True, *(False,) * (method.num_steps(meter.run.num_steps) - 1))
        most = meter.cut(method)
    require(asked <= most + CLOSE, f"flops_cut: {asked:g}, but method '{name}' cannot cut more than {most:.1%} of the FLOPs, "
            f"which it does where it computes the first step alone; ask for less than {most:.2f}")


def _check_less_than_all(trial: Trial, meter: Meter) -> None:
    """An untrained method whose knob is turned to 1 is the dense row again, which no job takes for a result."""
    name, options = trial["method"]["name"], named(trial["method"])[1]
    knob, asked = METHODS.get(name).knob, meter.run.num_steps
    if trial["budget"] or trial["train"] or knob not in options:
        return
    require(options[knob] != 1, f"{knob}: {options[knob]!r} computes everything, as the dense row does; take less than 1, or "
            "remove the row")
    alike = knob == "step_ratio" and METHODS.build(name, options, "method").num_steps(asked) == asked
    require(not alike, f"{knob}: {options[knob]} of {asked} steps are all of them; take less, or remove the row")


@contextmanager
def _named_method(name: str, backbone: str) -> Iterator[None]:
    """Say of whatever goes wrong which method on which backbone did: the same is done in the job, and fails there too."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith((f"{name}.", f"{name}:", "sampler.", "method '")):
            raise
        raise ConfigError(f"method '{name}' on backbone '{backbone}': {error}; docs/backbones.md says which methods run "
                          "there") from None
    except Exception as error:
        raise ConfigError(f"method '{name}' cannot run on backbone '{backbone}' ({type(error).__name__}: {error}); "
                          "docs/backbones.md says which methods run there") from error


def _check_parameters(trial: Trial, config: TrainConfig, backbone: Backbone, meter: Meter) -> None:
    import torch

    from harness.engine.adapters import adapted_layers

    name, options = trial["method"]["name"], named(trial["method"])[1]
    if trial["budget"]:
        options.setdefault(METHODS.get(name).knob, 1.0)
    method: Any = METHODS.build(name, options, "method")
    if config.adapter != "none":
        layers = adapted_layers(backbone.transformer)
        require(bool(layers) or not any(stage.adapters for stage in method.stages), f"train.adapter: '{config.adapter}', but "
                f"'{backbone.name}' has no linear layer in its blocks to adapt; write adapter: none")
        return
    meter.begin(method)
    for stage in method.stages:
        groups = method.start_stage(stage.name, torch.Generator().manual_seed(0))
        require(any(group["params"] for group in groups), f"train.adapter: 'none' leaves nothing to train in stage "
                f"'{stage.name}' of method '{name}'; take dora or lora")


