"""From what a sweep file says to what a trial is: options checked against the registered classes, defaults filled in.

The only part of reading a sweep that imports model code, for the classes own their options. Nothing is built and nothing is
computed here, so a misspelt key costs seconds and not a night.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from harness import data
from harness.api import BACKBONES, METHODS, METRICS, ConfigError, Method, Trial, build_config, did_you_mean, named, require, show
from harness.api.registry import Registry
from harness.sweep.file import BUDGETS, RESERVED, Draft, Entry, Resources, Sweep
from harness.sweep.labels import labels_of, varied_defaults, varied_of
from harness.sweep.search.checks import check_rungs, check_space
from harness.sweep.search.space import Point
from harness.trial import identity
from harness.trial.identity import code_of, identified
from harness.trial.ids import trial_id

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]{0,29}")


def resolve(sweep: Sweep) -> Sweep:
    """The sweep with its `entries`: every trial complete, checked, in order (dense first), and none twice."""
    _fill_registries()
    data.forget()
    identity.forget()
    if sweep.search:  # first: a bound names the mistake, a draw beyond it only a number
        check_space(sweep.search, lambda point: _trial(sweep.draft(point, 1), sweep.resources), f"{sweep.path}: search")
    resolved = _resolved(sweep)
    if sweep.asha:
        check_rungs(sweep.asha, resolved.trials, f"{sweep.path}: asha")
    return resolved


def grown(sweep: Sweep, points: list[Point], first: int) -> tuple[Sweep, list[str | ConfigError]]:
    """The sweep with points `first`, `first` + 1, ... of its search as trials, and the id of each.

    A point tried before has its old trial. In place of an id: why a point is no trial, its options being good alone and not
    together.
    """
    drafts, ids = [], []
    for number, point in enumerate(points, first):
        try:
            draft = sweep.draft(point, number)
            ids.append(trial_id(_trial(draft, sweep.resources)))
            drafts.append(draft)
        except ConfigError as error:
            ids.append(error)
    return _resolved(dataclasses.replace(sweep, drafts=[*sweep.drafts, *drafts])), ids


def _resolved(sweep: Sweep) -> Sweep:
    trials: dict[str, tuple[dict[str, Any], Draft]] = {}
    for draft in sweep.drafts:
        trial = _trial(draft, sweep.resources)
        trials.setdefault(trial_id(trial), (trial, draft))
    ordered = sorted(trials.items(), key=lambda item: item[1][0]["method"]["name"] != "dense")  # stable: the file's order
    varied = varied_of([trial for _, (trial, _) in ordered])
    labels = labels_of([(trial, draft) for _, (trial, draft) in ordered], varied)
    entries = [Entry(key, trial, label, values, code, draft.number, draft) for (key, (trial, draft)), label, values, code
               in zip(ordered, labels, varied, code_of(trial for _, (trial, _) in ordered), strict=True)]
    names = {trial["method"]["name"] for trial, _ in trials.values()}
    return dataclasses.replace(sweep, entries=entries, defaults={name: varied_defaults(name, varied) for name in names})


def _fill_registries() -> None:
    import harness.backbones  # noqa: F401
    import harness.metrics  # noqa: F401
    import methods  # noqa: F401


# ---------------------------------------------------------------------------------------------- one trial


def _trial(draft: Draft, resources: Resources) -> Trial:
    from harness.engine.compiling import check_graphs
    from harness.engine.sampler import SamplerConfig

    method, budget, cls = _method(draft, resources)
    shared, file = draft.shared, draft.file
    backbone = _component(BACKBONES, shared["backbone"], f"{file}: backbone")
    trial = {
        "backbone": backbone,
        "sampler": _options(build_config(SamplerConfig, shared["sampler"] or {}, f"{file}: sampler")),
        "data": _data(shared["data"], f"{file}: data", backbone, cls),
        "seeds": shared["seeds"],
        "method": method,
        "budget": budget,
        "train": None if backbone.get("weights") == "shape_only" else _train(draft, cls),
        "metrics": _metrics(shared, f"{file}: metrics"),
        "threads": resources.threads,
    }
    check_graphs(trial["sampler"]["compile"], str(backbone.get("device", "cpu")), f"{file}: sampler.compile")
    _check_reference(trial, f"{file}: metrics")
    trial = identified(trial, file)  # last: what is misspelt is refused before gigabytes are read
    return json.loads(json.dumps(trial, allow_nan=False))  # tuples become lists, as they will be when read back


def _method(draft: Draft, resources: Resources,
            methods: Registry = METHODS) -> tuple[dict[str, Any], dict[str, Any] | None, type[Method]]:
    where, written = draft.where, dict(draft.method)
    name = written.pop("name")
    cls = methods.get(name, where)
    budget = draft.budget
    if not draft.own & BUDGETS.keys() and (cls.knob is None or cls.knob in written):
        budget = {}  # a default budget yields to a method that has nothing to turn or says its own
    for kind, asked in budget.items():
        require(cls.knob is not None,
                f"{where}.{kind}: {asked} cannot be met, '{name}' has no option that changes its compute; remove {kind}")
        require(cls.knob not in written,
                f"{where}.{cls.knob}: {written.get(cls.knob or '')!r} contradicts {kind} {asked}, from which the harness solves "
                f"{cls.knob}; remove one of the two")
    known = [field.name for field in dataclasses.fields(cls.Config)]
    for key in written:
        require(key in known, f"{where}: unknown option '{key}'.{did_you_mean(key, [*known, *RESERVED])}")
    preset = {key: value for key, value in draft.preset_options(cls).items() if not budget or key != cls.knob}
    options = _options(methods.config(name, {**preset, **written}, where))
    if budget:
        options.pop(cls.knob)
    if "speedup" in budget:
        budget = {**budget, "threads": resources.timing_threads}  # what a speed-up is measured with is part of its meaning
    return {"name": name, **options}, budget or None, cls


def _train(draft: Draft, cls: type[Method]) -> dict[str, Any] | None:
    if not cls.trainable:
        require("train" not in draft.own, f"{draft.where}.train: '{cls.name}' is not trained; remove train")
        return None
    from harness.training.config import TrainConfig

    where = f"{draft.where}.train" if "train" in draft.own else f"{draft.file}: train"
    options = _options(build_config(TrainConfig, draft.train, where))
    require(not cls.needs_adapters or options["adapter"] != "none",
            f"{where}.adapter: 'none' leaves '{cls.name}' nothing to train; take dora or lora")
    return options


def _data(written: Any, where: str, backbone: Mapping[str, Any], cls: type[Method]) -> dict[str, Any]:
    """Where prompts and real images come from, identified by a fingerprint; see `harness.data`."""
    options = data.resolve(_named(written or {}, where), where, backbone.get("resolution"), lambda: _drawn(backbone))
    if cls.trainable:
        require(options.get("train") is not None or options["split"] != "train", f"{where}.split: '{cls.name}' is trained on the "
                "'train' pairs, and no trial is judged by what it was trained on; take split: reference")
        require(data.can_train(options), f"{where}: '{cls.name}' must be trained, and '{options['name']}' has no pair to train "
                "on; set reference_share below 1, or name another data set: train: {name: folder, path: ...}")
    return options


def _drawn(backbone: Mapping[str, Any]) -> int | None:
    """Pixels of a side that the model draws where the file says nothing of it; None where that cannot be told here."""
    name, options = named(backbone)
    cls = BACKBONES.get(name)
    try:
        sketch = cls.sketch(build_config(cls.Config, options, ""))
    except ConfigError:
        return None  # a model that cannot be made is refused for that, by the checks
    return sketch and sketch.resolution


def _check_reference(trial: Trial, where: str) -> None:
    needing = [metric["name"] for metric in trial["metrics"] if METRICS.get(metric["name"]).needs_reference]
    require(not needing or data.has_images(trial["data"]), f"{where}: {', '.join(needing)} compares with real images, and data "
            f"'{trial['data']['name']}' is prompts alone; remove it, or take a data set with images")


def _metrics(shared: Mapping[str, Any], where: str, metrics: Registry = METRICS) -> list[dict[str, Any]]:
    written, backbone = shared["metrics"], shared["backbone"]
    require(isinstance(written, list) and bool(written), f"{where}: expected a list such as [fd, latency], got {show(written)}")
    resolved = [_metric(item, f"{where}[{index}]", metrics) for index, item in enumerate(written)]
    if metrics is METRICS:  # outlines of classes cannot be asked what they measure
        _check_names(resolved, shared["seeds"], where)
    if isinstance(backbone, Mapping) and backbone.get("weights") == "shape_only":
        shapes_do = [name for name in metrics.names() if not metrics.get(name).needs_weights]
        for index, metric in enumerate(resolved):
            require(metric["name"] in shapes_do, f"{where}[{index}]: metric '{metric['name']}' judges what a model learned, "
                    f"and backbone.weights 'shape_only' are random; remove it. Valid there: {', '.join(shapes_do)}.")
    return resolved


def _metric(written: Any, where: str, metrics: Registry) -> dict[str, Any]:
    """As `_component`, with the name that the entry's numbers get by `as`, where one is written."""
    options = _named(written, where)
    alias = options.pop("as", None)
    require(alias is None or (isinstance(alias, str) and _ALIAS.fullmatch(alias) is not None), f"{where}.as: {show(alias)} "
            "cannot name a metric; use up to 30 letters, digits, '_' and '.'")
    return {**_component(metrics, options, where), **({"as": alias} if alias else {})}


def _check_names(metrics: list[dict[str, Any]], seeds: list[int], where: str) -> None:
    """ConfigError where two entries would give a number of one name, for one of them would be lost without a word."""
    owners: dict[str, int] = {}
    for index, entry in enumerate(metrics):
        name, options = named(entry)
        cls = METRICS.get(name)
        metric = cls(METRICS.config(name, options, f"{where}[{index}]"))
        metric.alias = entry.get("as") or ""
        require(entry not in metrics[:index], f"{where}[{index}]: metric '{name}' is listed twice; remove one")
        for measured in map(metric.called, metric.names(seeds[1] - seeds[0] + 1)):
            other = owners.setdefault(measured, index)
            require(other == index, f"{where}[{index}]: '{measured}' is measured by metrics[{other}] too, and one would replace "
                    f"the other; remove one, or name this one's numbers apart: {{name: {name}, as: other, ...}}")


def _component(registry: Any, written: Any, where: str) -> dict[str, Any]:
    """{'name': ..., every option of its Config} from 'name' or {'name': ..., some options}."""
    options = _named(written, where)
    require(isinstance(options.get("name"), str), f"{where}: a {registry.kind} needs a name, such as {{name: "
            f"{registry.names()[0]}}}; got {show(written)}")
    name = options.pop("name")
    return {"name": name, **_options(registry.config(name, options, where))}


def _named(written: Any, where: str) -> dict[str, Any]:
    if isinstance(written, str):
        return {"name": written}
    require(isinstance(written, Mapping),
            f"{where}: expected a name or a mapping with a name, got {show(written)}")
    return dict(written)


def _options(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
