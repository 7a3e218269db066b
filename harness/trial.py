"""One job of one trial: build, train if the method asks for it, solve the budget, sample, measure. No Ray, no MLflow.

A trial is a plain dictionary, complete and checked (see `harness.resolve`). Its 'score' job makes the images and every number
that neighbours on the machine cannot disturb; its 'timing' job needs the machine alone. Both return a JSON-able part.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import harness.backbones as _backbones  # noqa: F401  (these three fill the registries)
import harness.metrics as _catalogue  # noqa: F401
import methods as _methods  # noqa: F401
from harness import budget, flops, injection, provenance, speedup, tokens
from harness.api import (
    BACKBONES,
    METHODS,
    METRICS,
    Backbone,
    Measure,
    Method,
    Metric,
    Subject,
    Unavailable,
    build_config,
    require,
)
from harness.budget import Solution, solve_budget
from harness.flops import Meter
from harness.metrics import latency
from harness.pictures import Pictures, calibration_prompts, dense_pictures, prompts_of, sample_pictures, save_grid, save_pictures
from harness.sampler import Loop, SamplerConfig
from harness.speedup import solve_speedup
from harness.store import Store, code_hash, code_version
from harness.sweep import trial_id
from harness.train import TrainConfig, Training, training_set

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
MAX_KEPT_ERROR = 0.01
RUNG = "rung"


def run_job(job: str, trial: Mapping[str, Any], store: Store, progress: Progress,
            out_dir: Path) -> dict[str, Any]:
    """Do one job of `trial` and return its part. Files that belong to the trial go to `out_dir`, shared ones to `store`.

    job: 'score', 'timing', or 'rung<n>', which trains the first n steps and measures nothing.
    """
    if job.startswith(RUNG):
        return _rung(job, trial, store, progress)
    clock = _Clock(progress)
    metrics = _metrics(trial, job)  # first: a missing reference must not cost a night
    part = _empty_part(job, trial, clock)
    if metrics or job == "score":
        subject, found = _subject(trial, store, clock, progress)
        subject.out_dir = out_dir
        part.update(found)
        if job == "score":
            with clock.stage("sample"):
                part["executed"] |= _sample(subject, part["executed"])
            part["artifacts"] = _save(subject, out_dir)
        for metric in metrics:
            if metric.against_dense and subject.is_dense:
                continue
            with clock.stage(f"measure {metric.name}"):
                _measure(part, metric, subject)
        part["environment"] |= _environment(subject.backbone)
    part["timestamp_ms"] = int(time.time() * 1000)
    return part


def _rung(job: str, trial: Mapping[str, Any], store: Store, progress: Progress) -> dict[str, Any]:
    """The part of a training that is paused: its curves so far. The checkpoint stays in `store`, from where it goes on."""
    clock = _Clock(progress)
    part = _empty_part(job, trial, clock)
    with clock.stage("build"):
        backbone, meter = _backbone(trial)
    with clock.stage("budget"):
        method, _ = _build_method(trial, meter, store)
    with clock.stage("train"):
        training = _training(trial, backbone, method, store, progress)
        part["series"] = training.curves(store, int(job.removeprefix(RUNG)), progress)
    part["environment"] |= _environment(backbone)
    part["timestamp_ms"] = int(time.time() * 1000)
    return part


def _empty_part(job: str, trial: Mapping[str, Any], clock: _Clock) -> dict[str, Any]:
    return {"job": job, "trial_id": trial_id(dict(trial)), "metrics": {}, "per_image": {}, "executed": {}, "series": {},
            "artifacts": {}, "environment": {}, "stages": clock.seconds}


def _environment(backbone: Backbone) -> dict[str, Any]:
    transformer = backbone.transformer
    return provenance.environment(str(transformer.device), str(transformer.dtype).removeprefix("torch."))


def estimate(trial: Mapping[str, Any]) -> dict[str, Any]:
    """FLOPs of a trial before it runs: {'gflops_sampling', 'gflops_training'}, over all its images, autoencoder apart.

    With a budget the asked cut is taken as met; a training step counts as one dense forward pass of the teacher and three of
    the trained model.
    """
    backbone, meter = _backbone(trial)
    num_images = len(_seeds(trial))
    if trial["budget"]:
        per_image = meter.dense.total * (1 - trial["budget"].get("flops_cut", 0.0))  # what a speed-up takes, timing will tell
    else:
        per_image = meter.count(_build_method(trial, meter)[0]).total
    training = 0.0
    if trial["train"]:
        options = trial["train"]
        forward = meter.dense.total / (meter.run.num_steps * meter.run.guidance_halves)
        training = 4 * forward * options["steps"] * options["batch_size"]
    return {"gflops_sampling": num_images * per_image / 1e9, "gflops_training": training / 1e9,
            "dense_gflops_per_image": meter.dense.total / 1e9}


def pretrain(trial: Mapping[str, Any], store: Store, progress: Progress) -> dict[str, Any] | None:
    """The training of a trial alone, left in `store`, where `run_job` finds it: facts per stage; None where nothing trains."""
    backbone, meter = _backbone(trial)
    method, _ = _build_method(trial, meter, store)
    return _train(trial, backbone, method, store, progress)[3] if method.trainable else None


# ---------------------------------------------------------------------------------------------- building


def _metrics(trial: Mapping[str, Any], job: str) -> list[Metric]:
    built = [METRICS.build(*_named(options), where=f"metrics[{i}]") for i, options in enumerate(trial["metrics"])]
    return [metric for metric in built if metric.job == job]


def _named(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return options["name"], {key: value for key, value in options.items() if key != "name"}


def _seeds(trial: Mapping[str, Any]) -> list[int]:
    first, last = trial["seeds"]
    require(last >= first, f"seeds: [{first}, {last}] holds no image")
    return list(range(first, last + 1))


_held: dict[str, tuple[Backbone, dict[tuple[SamplerConfig, str], Meter]]] = {}


def _backbone(trial: Mapping[str, Any]) -> tuple[Backbone, Meter]:
    """The backbone and its meter; the last backbone stays in memory for the next trial of this process."""
    key, sampler = repr(sorted(trial["backbone"].items())), build_config(SamplerConfig, trial["sampler"], "sampler")
    if key not in _held:
        _held.clear()
        _held[key] = BACKBONES.build(*_named(trial["backbone"]), where="backbone"), {}
    backbone, meters = _held[key]
    _check_resolution(trial["data"], backbone)
    of = sampler, repr(trial["data"])  # what a method is calibrated on depends on the data
    if of not in meters:
        meters[of] = meter = Meter(backbone, sampler)
        seeds = meter.calibration[1]
        meter.calibration = calibration_prompts(trial["data"], seeds), seeds
    return backbone, meters[of]


def _check_resolution(options: Mapping[str, Any], backbone: Backbone) -> None:
    for where, one in (("data", options), ("data.train", options.get("train") or {})):
        side = one.get("resolution")
        require(side is None or side == backbone.resolution, f"{where}.resolution: {side}, but the backbone draws "
                f"{backbone.resolution if side else ''} pixels a side; write that")


def _build_method(trial: Mapping[str, Any], meter: Meter, store: Store | None = None) -> tuple[Method, Solution | None]:
    """The method of a trial and, with a budget, the solution of its knob, which is counted once for all jobs."""
    name, options = _named(trial["method"])
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


def _dense_subject(trial: Mapping[str, Any], meter: Meter, store: Store | None) -> Subject:
    """The trial before its method is built: what timing a knob needs."""
    seeds = _seeds(trial)
    return Subject(trial=trial, backbone=meter.backbone, student=meter.backbone, method=METHODS.build("dense", {}), meter=meter,
                   sampler=build_config(SamplerConfig, trial["sampler"], "sampler"), prompts=prompts_of(trial["data"], seeds),
                   seeds=seeds, store=store, progress=lambda stage, done, total: None)


def _budget_inputs(trial: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    code = [code_hash(METHODS.get(trial["method"]["name"])), code_version(budget, flops, injection, tokens)]
    if "speedup" in trial["budget"]:  # of this machine, with this clock
        machine = [provenance.cpu_model(), provenance.num_cpus(), provenance.device_name(meter.device)]
        code += [*machine, code_version(speedup, latency)]
    return {"backbone": meter.backbone.fingerprint, "calibration": meter.calibration[0],
            **{key: trial[key] for key in ("sampler", "method", "budget")}, "code": code}


def _subject(trial: Mapping[str, Any], store: Store, clock: _Clock, progress: Progress) -> tuple[Subject, dict[str, Any]]:
    """Everything built, trained and fitted; and what that left for the part."""
    with clock.stage("build"):
        backbone, meter = _backbone(trial)
    with clock.stage("budget"):
        method, solution = _build_method(trial, meter, store)
    student, series, executed, notes = backbone, {}, {}, {}
    if method.trainable and trial["backbone"].get("weights") == "shape_only":  # there is nothing to learn from random weights
        method.begin(dataclasses.replace(meter.run, device=meter.device))
        notes["train"] = {"untrained": "random weights: shapes and budget alone are the method's"}
    elif method.trainable:
        with clock.stage("train"):
            method, student, series, notes["train"] = _train(trial, backbone, method, store, progress)
    if solution is not None:
        with clock.stage("fit budget"):
            executed = _fit(method, meter, solution, store, {**_budget_inputs(trial, meter), "train": notes.get("train")})
    seeds = _seeds(trial)
    subject = Subject(trial=trial, backbone=backbone, student=student, method=method, meter=meter, seeds=seeds, store=store,
                      sampler=build_config(SamplerConfig, trial["sampler"], "sampler"), prompts=prompts_of(trial["data"], seeds),
                      progress=progress)
    return subject, {"series": series, "executed": executed, "environment": notes}


def _train(trial: Mapping[str, Any], backbone: Backbone, method: Method, store: Store,
           progress: Progress) -> tuple[Method, Backbone, dict[str, Any], dict[str, Any]]:
    """The trained method, the backbone to run it on, curves and facts."""
    trained = _training(trial, backbone, method, store, progress).run(store, progress)
    fresh = type(method)(method.config)  # what is measured is what was saved: nothing that training left in memory
    fresh.begin(Loop(backbone, SamplerConfig()).run)
    fresh.load_state_dict(method.state_dict())
    return fresh, trained.backbone, trained.series, trained.info


def _training(trial: Mapping[str, Any], backbone: Backbone, method: Method, store: Store,
              progress: Progress) -> Training:
    """The training of a trial, with its images."""
    from harness import data

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
    if hasattr(method, "fit_budget"):
        method.begin(dataclasses.replace(meter.run, device=meter.device))

        def make(folder: Path) -> None:
            fitted = method.fit_budget(lambda: meter.cut(method), solution.asked)
            (folder / "fit.json").write_text(json.dumps({"fitted": fitted, "cut": meter.cut(method)}), encoding="utf-8")

        found = json.loads((store.get_or_make("fit", inputs, make) / "fit.json").read_text(encoding="utf-8"))
        method.load_fit(found["fitted"])
        executed = found["cut"]
    return {"knob": solution.knob, "knob_solved": solution.value, "flops_cut_asked": solution.asked, "flops_cut": executed,
            **({"keep_ratio_solved": solution.value} if solution.knob == "keep_ratio" else {})}


# ---------------------------------------------------------------------------------------------- sampling


def _sample(subject: Subject, executed: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the subject's images, the dense model's for the same seeds, and the kept fractions; returns what was executed."""
    def dense() -> Pictures:
        return dense_pictures(subject.backbone, subject.sampler, subject.prompts, subject.seeds, subject.store, subject.progress)

    _check_counted_shapes(subject)
    promised = {} if subject.method.dynamic else subject.meter.counted(subject.method)[1]
    if subject.is_dense:
        subject.images, subject.kept = dense().images, promised
    else:
        pictures = sample_pictures(subject.student, subject.method, subject.sampler, subject.prompts, subject.seeds,
                                   lambda done, total: subject.progress("sample", done, total))
        subject.images, subject.kept = pictures.images, pictures.kept
        subject.dense_images = dense().images
        if subject.method.dynamic:  # the ledger holds the last batch, the decisions all images
            subject.cost, promised = subject.meter.counted(subject.method)
            subject.kept = promised
        _check_work_was_saved(subject, promised)
    return {**executed, "kept_attention": _rounded(subject.kept["attention"]), "kept_ffn": _rounded(subject.kept["ffn"])}


def _check_counted_shapes(subject: Subject) -> None:
    """FLOPs are counted on a twin of the backbone; its text must be as long as the real one's."""
    real = Loop(subject.backbone, subject.sampler).conditioning([""])
    for name, counted in subject.meter.loop.conditioning([""]).items():
        if real[name].shape != counted.shape:
            raise RuntimeError(f"backbone '{subject.backbone.name}': FLOPs are counted with {name} of shape "
                               f"{tuple(counted.shape)}, but the model runs with {tuple(real[name].shape)}; correct its on_meta")


def _check_work_was_saved(subject: Subject, promised: Mapping[str, list[list[float]]]) -> None:
    """A method that silently did nothing, or something else than was counted, must not become a row of a table."""
    name = subject.method.name
    if all(ratio == 1 for kind in subject.kept.values() for row in kind for ratio in row) \
            and np.array_equal(subject.images, subject.dense_images):
        raise RuntimeError(f"method '{name}' changed nothing: it computed every token, and all {len(subject.images)} images "
                           "equal the dense model's; check that it acts on this backbone at these options")
    for kind, rows in subject.kept.items():
        error = float(np.abs(np.asarray(rows) - np.asarray(promised[kind])).max())
        if error > MAX_KEPT_ERROR:
            raise RuntimeError(f"method '{name}' computed other tokens than were counted: at some {kind} the executed fraction "
                               f"is off by {error:.3f}, so its FLOPs would be wrong; its token counts must not depend on values")


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in rows]


def _save(subject: Subject, out_dir: Path) -> dict[str, str]:
    out_dir.mkdir(parents=True, exist_ok=True)
    save_pictures(out_dir / "images.npz", subject.images, subject.prompts, subject.seeds)
    save_grid(out_dir / "grid.png", subject.images, subject.prompts)
    return {name: _place(out_dir / file) for name, file in (("images", "images.npz"), ("grid", "grid.png"))}


def _place(file: Path) -> str:
    """A trial's file relative to the sweep's folder."""
    return "/".join(file.parts[-3:])


# ---------------------------------------------------------------------------------------------- the part


def _measure(part: dict[str, Any], metric: Metric, subject: Subject) -> None:
    """Enter what `metric` measures; what cannot be had here is entered with the reason and without a value."""
    try:
        for measure in metric.measure(subject):
            _enter(part, measure)
    except Unavailable as error:
        reason = " ".join(str(error).split())
        log.warning("metric '%s' is unavailable: %s", metric.name, reason)
        for name in metric.names(subject):
            part["metrics"].setdefault(name, {"value": None, "better": "none", "interval": None, "n": None,
                                              "unavailable": reason})


def _enter(part: dict[str, Any], measure: Measure) -> None:
    value = float(measure.value)
    if not math.isfinite(value):
        raise ArithmeticError(f"{measure.name} is {value}: not a number to publish")
    interval = None if measure.interval is None else [float(end) for end in measure.interval]
    part["metrics"][measure.name] = {"value": value, "better": measure.better, "interval": interval, "n": measure.n}
    if measure.per_image is not None:
        part["per_image"][measure.name] = [float(x) for x in measure.per_image]
    if measure.series is not None:
        part["series"][measure.name] = [[float(x), float(y)] for x, y in measure.series]
    if measure.notes:
        part["environment"][measure.name] = dict(measure.notes)
    if measure.artifact is not None:
        part["artifacts"][measure.artifact.stem] = _place(measure.artifact)


class _Clock:
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
