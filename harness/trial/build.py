"""From a trial to what is measured: backbone, meter, method, training, budget. No Ray, no MLflow."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness.backbones as _backbones  # noqa: F401  (these two fill the registries)
import methods as _methods  # noqa: F401
from harness import data
from harness.api import BACKBONES, METHODS, Backbone, Method, Subject, TrainableMethod, Trial, build_config, named, require
from harness.cost import budget, speedup
from harness.cost.budget import Solution, solve_budget
from harness.cost.flops import Meter
from harness.cost.speedup import solve_speedup
from harness.engine.sampler import Loop, SamplerConfig
from harness.hardware import provenance
from harness.storage.code_hash import code_hash
from harness.storage.store import Store
from harness.training.train import TrainConfig, Training, training_set
from harness.trial.identity import check_content
from harness.trial.images import calibration_prompts, prompts_of

Progress = Callable[[str, int, int], None]


class Clock:
    """Seconds per stage."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside, and announce it."""
        self._progress(name, 0, 1)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)


def seeds_of(trial: Trial) -> list[int]:
    """The seeds of a trial, one for each image."""
    first, last = trial["seeds"]
    require(last >= first, f"seeds: [{first}, {last}] holds no image")
    return list(range(first, last + 1))


_held: dict[str, tuple[Backbone, dict[tuple[SamplerConfig, str], Meter]]] = {}


def backbone_of(trial: Trial) -> tuple[Backbone, Meter]:
    """The backbone and its meter; the last backbone stays in memory for the next trial of this process."""
    key, sampler = repr(sorted(trial["backbone"].items())), build_config(SamplerConfig, trial["sampler"], "sampler")
    if key not in _held:
        _held.clear()
        _held[key] = BACKBONES.build(*named(trial["backbone"]), where="backbone"), {}
    backbone, meters = _held[key]
    check_content("backbone", trial["backbone"], "backbone")  # after loading: what was loaded is what was asked for
    data.check_resolution(trial["data"], backbone.resolution)
    of = sampler, repr(trial["data"])  # what a method is calibrated on depends on the data
    if of not in meters:
        meters[of] = meter = Meter(backbone, sampler)
        seeds = meter.calibration[1]
        meter.calibration = calibration_prompts(trial["data"], seeds), seeds
    return backbone, meters[of]


def method_of(trial: Trial, meter: Meter, store: Store | None = None) -> tuple[Method, Solution | None]:
    """The method of a trial and, with a budget, the solution of its knob, which is counted once for all jobs."""
    name, options = named(trial["method"])
    asked = trial["budget"]
    if not asked:
        return METHODS.build(name, options, "method"), None

    def solve() -> Solution:
        if "speedup" in asked:
            return solve_speedup(_dense_subject(trial, meter, store), name, options, asked["speedup"], asked["threads"])
        return solve_budget(meter, name, options, asked["flops_cut"])

    def make(folder: Path) -> None:
        solution = solve()
        (folder / "solution.json").write_text(json.dumps(dataclasses.asdict(solution)), encoding="utf-8")

    if store is None:
        solution = solve()
    else:
        folder = store.get_or_make("budget", _budget_inputs(trial, meter), make)
        solution = Solution(**json.loads((folder / "solution.json").read_text(encoding="utf-8")))
    return METHODS.build(name, {**options, solution.knob: solution.value}, "method"), solution


def _dense_subject(trial: Trial, meter: Meter, store: Store | None) -> Subject:
    """The trial before its method is built: what timing a knob needs."""
    seeds = seeds_of(trial)
    return Subject(trial=trial, backbone=meter.backbone, student=meter.backbone, method=METHODS.build("dense", {}), meter=meter,
                   sampler=build_config(SamplerConfig, trial["sampler"], "sampler"), prompts=prompts_of(trial["data"], seeds),
                   seeds=seeds, store=store, progress=lambda stage, done, total: None)


def _budget_inputs(trial: Trial, meter: Meter) -> dict[str, Any]:
    parts = [type(meter.backbone), METHODS.get(trial["method"]["name"])]
    code = [code_hash(budget, *parts)]
    if "speedup" in trial["budget"]:  # of this machine, with this clock
        machine = [provenance.cpu_model(), provenance.num_cpus(), provenance.device_name(meter.device)]
        code = [*machine, code_hash(speedup, *parts)]
    return {"backbone": meter.backbone.fingerprint, "calibration": meter.calibration[0],
            **{key: trial[key] for key in ("sampler", "method", "budget")}, "code": code}


def subject_of(trial: Trial, store: Store, clock: Clock, progress: Progress) -> tuple[Subject, dict[str, Any]]:
    """Everything built, trained and fitted; and what that left for the part."""
    with clock.stage("build"):
        backbone, meter = backbone_of(trial)
    with clock.stage("budget"):
        method, solution = method_of(trial, meter, store)
    student, series, executed, notes = backbone, {}, {}, {}
    if solution is not None and solution.unit == "speedup":  # by its key the results folder finds it, to have it solved again
        found = store.path("budget", _budget_inputs(trial, meter)).name
        notes["budget"] = {"contaminated": solution.contaminated, "solution": found}
    if method.trainable and trial["backbone"].get("weights") == "shape_only":  # there is nothing to learn from random weights
        method.begin(dataclasses.replace(meter.run, device=meter.device))
        notes["train"] = {"untrained": "random weights: shapes and budget alone are the method's"}
    elif method.trainable:
        with clock.stage("train"):
            method, student, series, notes["train"] = trained(trial, backbone, method, store, progress)
    if solution is not None:
        with clock.stage("fit budget"):
            executed = _fit(method, meter, solution, store, {**_budget_inputs(trial, meter), "train": notes.get("train")})
    seeds = seeds_of(trial)
    subject = Subject(trial=trial, backbone=backbone, student=student, method=method, meter=meter, seeds=seeds, store=store,
                      sampler=build_config(SamplerConfig, trial["sampler"], "sampler"), prompts=prompts_of(trial["data"], seeds),
                      progress=progress)
    return subject, {"series": series, "executed": executed, "environment": notes}


def trained(trial: Trial, backbone: Backbone, method: Method, store: Store,
           progress: Progress) -> tuple[Method, Backbone, dict[str, Any], dict[str, Any]]:
    """The trained method, the backbone to run it on, curves and facts."""
    found = training_of(trial, backbone, method, store, progress).run(store, progress)
    fresh = type(method)(method.config)  # what is measured is what was saved: nothing that training left in memory
    fresh.begin(Loop(backbone, SamplerConfig()).run)
    fresh.load_state_dict(method.state_dict())
    return fresh, found.backbone, found.series, found.info


def training_of(trial: Trial, backbone: Backbone, method: Method, store: Store,
              progress: Progress) -> Training:
    """The training of a trial, with its images."""
    require(trial["train"] is not None, f"train: method '{method.name}' has parameters and must be trained; add a train section")
    images = training_set(backbone, data.load_training(trial["data"]), store, progress)
    return Training(backbone, method, build_config(TrainConfig, trial["train"], "train"), images)


def _fit(method: Method, meter: Meter, solution: Solution, store: Store, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The budget as asked and as executed; a method with its own table fits it once more, now that it is trained."""
    executed = solution.executed
    if solution.unit == "speedup":  # the schedule keeps the mean ratio that was timed
        method.begin(dataclasses.replace(meter.run, device=meter.device))
        return {"knob": solution.knob, "knob_solved": solution.value, "speedup_asked": solution.asked,
                "speedup_calibrated": solution.executed, "flops_cut": meter.cut(method)}
    if isinstance(method, TrainableMethod):
        method.begin(dataclasses.replace(meter.run, device=meter.device))

        def make(folder: Path) -> None:
            fitted = method.fit_budget(lambda: meter.cut(method), solution.asked)
            found = {"fitted": fitted, "cut": executed if fitted is None else meter.cut(method)}
            (folder / "fit.json").write_text(json.dumps(found), encoding="utf-8")

        found = json.loads((store.get_or_make("fit", inputs, make) / "fit.json").read_text(encoding="utf-8"))
        if found["fitted"] is not None:
            method.load_fit(found["fitted"])
        executed = found["cut"]
    return {"knob": solution.knob, "knob_solved": solution.value, "flops_cut_asked": solution.asked, "flops_cut": executed,
            **({"keep_ratio_solved": solution.value} if solution.knob == "keep_ratio" else {})}
