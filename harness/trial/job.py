"""One job of one trial: build, train if the method asks for it, solve the budget, sample, measure. No Ray, no MLflow.

A trial is a plain dictionary, complete and checked (see `harness.sweep.resolve`). Its 'score' job makes the images and every
number that neighbours on the machine cannot disturb; its 'timing' job needs the machine alone. Both return a JSON-able part.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import harness.metrics as _catalogue  # noqa: F401  (this fills the registry)
from harness.api import METHODS, METRICS, Backbone, Measure, Metric, Part, Subject, Trial, Unavailable, named
from harness.engine.sampler import Loop
from harness.hardware import provenance
from harness.storage.store import Store
from harness.trial.build import Clock, Progress, backbone_of, method_of, seeds_of, subject_of, trained, training_of
from harness.trial.identity import check_content, found_out
from harness.trial.ids import trial_id
from harness.trial.images import SampledImages, dense_pictures, sample_pictures, save_grid, save_pictures
from harness.trial.sketches import known_sketch

log = logging.getLogger(__name__)

MAX_KEPT_ERROR = 0.01
RUNG = "rung"


def run_job(job: str, trial: Trial, store: Store, progress: Progress, out_dir: Path) -> Part:
    """Do one job of `trial` and return its part. Files that belong to the trial go to `out_dir`, shared ones to `store`.

    job: 'score', 'timing', or 'rung<n>', which trains the first n steps and measures nothing.
    """
    if job.startswith(RUNG):
        return _rung(job, trial, store, progress)
    clock = Clock(progress)
    metrics = _metrics(trial, job)  # first: a missing reference must not cost a night
    part = _empty_part(job, trial, clock)
    if metrics or job == "score":
        subject, found = subject_of(trial, store, clock, progress)
        subject.out_dir = out_dir
        part.update(found)
        if job == "score":
            with clock.stage("sample"):
                part["executed"] |= _sample(subject, part["executed"])
            part["artifacts"] = _save(subject, out_dir)
            if cut := subject.backbone.cut_prompts(subject.prompts):
                part["environment"]["prompts_cut"] = cut
        for metric in metrics:
            if metric.against_dense and subject.is_dense:
                continue
            with clock.stage(f"measure {metric.name}"):
                _measure(part, metric, subject)
        part["environment"] |= {**_environment(subject.backbone), **found_out(trial)}
        if subject.sampler.attention != "auto":
            part["environment"]["attention_kernels"] = subject.sampler.attention
    part["timestamp_ms"] = int(time.time() * 1000)
    return part


def _rung(job: str, trial: Trial, store: Store, progress: Progress) -> Part:
    """The part of a training that is paused: its curves so far. The checkpoint stays in `store`, from where it goes on."""
    clock = Clock(progress)
    part = _empty_part(job, trial, clock)
    with clock.stage("build"):
        backbone, meter = backbone_of(trial)
    with clock.stage("budget"):
        method, _ = method_of(trial, meter, store)
    with clock.stage("train"):
        training = training_of(trial, backbone, method, store, progress)
        part["series"] = training.curves(store, int(job.removeprefix(RUNG)), progress)
    part["environment"] |= _environment(backbone)
    part["timestamp_ms"] = int(time.time() * 1000)
    return part


def _empty_part(job: str, trial: Trial, clock: Clock) -> Part:
    return {"job": job, "trial_id": trial_id(dict(trial)), "metrics": {}, "per_image": {}, "executed": {}, "series": {},
            "artifacts": {}, "environment": {}, "stages": clock.seconds}


def _environment(backbone: Backbone) -> dict[str, Any]:
    transformer = backbone.transformer
    found = provenance.environment(str(transformer.device), str(transformer.dtype).removeprefix("torch."))
    return found | {"scheduler": type(backbone.scheduler).__name__}


def estimate(trial: Trial) -> dict[str, Any]:
    """What is known of a trial before it runs, over all its images, autoencoder apart: {'gflops_sampling', 'gflops_training',
    'dense_gflops_per_image', 'token_counts'}.

    token_counts: the distinct numbers of image tokens that attention and feed-forward will compute, ascending: the shapes of a
    fixed schedule. None where training or the images decide; with such a budget the asked cut is taken as met. A training step
    counts as one dense forward pass of the teacher and three of the trained model.
    """
    _, meter = known_sketch(trial) or backbone_of(trial)
    asked, num_images, token_counts = trial["budget"] or {}, len(seeds_of(trial)), None
    if trial["train"] or "speedup" in asked or METHODS.get(trial["method"]["name"]).dynamic:
        per_image = meter.dense.total * (1 - asked.get("flops_cut", 0.0))  # what a speed-up takes, timing will tell
    else:
        cost, kept = meter.counted(method_of(trial, meter)[0])
        per_image = cost.total
        ratios = {ratio for rows in kept.values() for row in rows for ratio in row}
        token_counts = sorted({round(ratio * meter.run.num_tokens) for ratio in ratios})
    training = 0.0
    if trial["train"]:
        options = trial["train"]
        forward = meter.dense.total / (meter.run.num_steps * meter.run.guidance_halves)
        training = 4 * forward * options["steps"] * options["batch_size"]
    return {"gflops_sampling": num_images * per_image / 1e9, "gflops_training": training / 1e9,
            "dense_gflops_per_image": meter.dense.total / 1e9, "token_counts": token_counts}


def pretrain(trial: Trial, store: Store, progress: Progress) -> dict[str, Any] | None:
    """The training of a trial alone, left in `store`, where `run_job` finds it: facts per stage; None where nothing trains."""
    backbone, meter = backbone_of(trial)
    method, _ = method_of(trial, meter, store)
    return trained(trial, backbone, method, store, progress)[3] if method.trainable else None


# ---------------------------------------------------------------------------------------------- sampling


def _sample(subject: Subject, executed: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the subject's images, the dense model's for the same seeds, and the kept fractions; returns what was executed."""
    def dense() -> SampledImages:
        return dense_pictures(subject.backbone, subject.sampler, subject.prompts, subject.seeds, subject.store, subject.progress)

    _check_counted_shapes(subject)
    promised = {} if subject.method.dynamic else subject.meter.counted(subject.method)[1]
    if subject.is_dense:
        subject.images, subject.kept = dense().images, promised
        _check_dense_pictures(subject.images, subject)
    else:
        pictures = sample_pictures(subject.student, subject.method, subject.sampler, subject.prompts, subject.seeds,
                                   lambda done, total: subject.progress("sample", done, total))
        subject.images, subject.kept = pictures.images, pictures.kept
        subject.dense_images = dense().images
        _check_dense_pictures(subject.dense_images, subject)
        if subject.method.dynamic:  # the count is of the last batch, the decisions all images
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


def _check_dense_pictures(images: np.ndarray, subject: Subject) -> None:
    """What every row is compared with must be pictures: agreement with one flat colour, or with one picture, says nothing."""
    flat = bool((images == images[:, :1, :1]).all())
    if flat or (len(images) > 1 and (images == images[:1]).all()):
        what = "are flat, of one colour each" if flat else "are one picture, though their seeds differ"
        raise RuntimeError(f"backbone '{subject.backbone.name}': all {len(images)} images of the dense model {what}, so likeness "
                           "to them would be no evidence; check backbone.weights, its scheduler and sampler.num_steps")


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


def _metrics(trial: Trial, job: str) -> list[Metric]:
    found = []
    for i, entry in enumerate(trial["metrics"]):
        metric = METRICS.build(*named(entry), where=f"metrics[{i}]")
        metric.alias = entry.get("as") or ""
        if metric.job == job:
            check_content("metric", entry, f"metrics[{i}]")
            found.append(metric)
    return found


def _measure(part: Part, metric: Metric, subject: Subject) -> None:
    """Enter what `metric` measures; what cannot be had here is entered with the reason and without a value."""
    try:
        for measure in metric.measure(subject):
            _enter(part, _told(metric, measure))
    except Unavailable as error:
        reason = " ".join(str(error).split())
        log.warning("metric '%s' is unavailable: %s", metric.name, reason)
        for name in map(metric.called, metric.names(len(subject.seeds))):
            part["metrics"].setdefault(name, {"value": None, "better": "none", "interval": None, "n": None,
                                              "group": metric.group, "unavailable": reason})


def _told(metric: Metric, measure: Measure) -> Measure:
    """The measure under the name that the sweep gives it, and in the group of its metric where it says none."""
    more = {"name": metric.called(measure.name), "group": measure.group or metric.group}
    if metric.alias:
        more |= {key: f"{text} ({metric.alias})" for key in ("heading", "title") if (text := getattr(measure, key))}
    return dataclasses.replace(measure, **more)


def _finite(measure: Measure) -> tuple[float, list[float] | None]:
    """The value and its interval; an error where any number of the measure is none."""
    value = float(measure.value)
    if not math.isfinite(value):
        raise ArithmeticError(f"{measure.name} is {value}: not a number to publish")
    interval = None if measure.interval is None else [float(end) for end in measure.interval]
    for what, values in (("its interval", interval or ()), ("one of its images", measure.per_image or ()),
                         ("its series", [y for _, y in measure.series or ()])):
        if not all(map(math.isfinite, values)):
            raise ArithmeticError(f"{measure.name} is {value}, but {what} is not finite: not a number to publish")
    return value, interval


def _enter(part: Part, measure: Measure) -> None:
    value, interval = _finite(measure)
    artifact = measure.artifact.stem if measure.artifact is not None else None
    if measure.name in part["metrics"] or artifact in part["artifacts"]:
        raise RuntimeError(f"{measure.name} is measured, or its file {artifact} written, by two metrics of this trial; what a "
                           "metric yields must be what its `names` say")
    part["metrics"][measure.name] = {"value": value, "better": measure.better, "interval": interval, "n": measure.n,
                                      **measure.traits()}
    if measure.per_image is not None:
        part["per_image"][measure.name] = [float(x) for x in measure.per_image]
    if measure.series is not None:
        part["series"][measure.name] = [[float(x), float(y)] for x, y in measure.series]
    if measure.notes:
        part["environment"][measure.name] = dict(measure.notes)
    if measure.artifact is not None:
        part["artifacts"][artifact] = _place(measure.artifact)
