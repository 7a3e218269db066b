"""What of a result goes where in MLflow: names, params, metrics, tags, notes. Pure; imports no mlflow.

Params are few, flat and of one type per key, because the compare page makes an axis of every param that differs. Everything
else is in the artifact result.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.api import Result, Traits, brief, disturbance
from harness.reporting.markup import as_markdown, mark
from harness.reporting.rows import CUT, LATENCY, headline_metric
from harness.storage.measures import traits
from harness.tracking.limits import DATA_SET, NAME, PARAM, SOURCE, TAG, fit, fit_lines, key

STATUS = {"done": "FINISHED", "failed": "FAILED", "partial": "RUNNING", "stopped": "KILLED"}
VIEW = "overview"
VIEW_TAG = "mlflow.sharedViewState."
"""Start of an experiment's tag in which MLflow keeps a saved view of the chart page; its name follows."""
MODE = "workflowType=machine_learning"
"""In a link: MLflow's pages for models, where it would open those for language model applications."""
UNAVAILABLE = "unavailable: "
CONSTANTS = ("sampler.num_steps", "sampler.guidance_scale", "backbone.name")
"""Params of every run, whether the sweep varied them or not."""
_CONTAMINATED = {"clean": "false", "disturbed": "true", "unknown": "unknown"}
TRIALS = "trials.md"
"""Artifact with a link to every trial, where the description is too short for them."""
ATTACHED = ("report.md", "report.html", "table.csv", "table.tex", "sweep.yaml", "sweep.json")
"""Files of a report that the sweep's run holds, beside its figures."""
COMPARED = 50
"""Trials that one link compares: their ids are in it."""


def digest(result: Result) -> str:
    """Hash of everything in a result but its label: one run holds one such result, and another is another run."""
    measured = {name: value for name, value in result.items() if name != "label"}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


def is_empty(result: Result) -> bool:
    """Nothing of the trial has been done, or nothing that still counts."""
    return result["status"] == "partial" and not any(result.get(part) for part in ("stages", "metrics", "series", "error"))


def span(result: Result) -> tuple[int, int]:
    """(ms when its first job began, ms when its last one ended); where the first is not known, it is the second."""
    end = int(result.get("timestamp_ms") or 0)
    times = list((result.get("times") or {}).values())
    began = [one[0] for one in times] or [use["began_ms"] for use in (result.get("usage") or {}).values() if use.get("began_ms")]
    return int(min([*began, end])), end


def run_name(result: Result) -> str:
    """The name of a trial's run."""
    return fit(result["label"], NAME)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: leaf}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves.update(flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return leaves


def params(result: Result) -> dict[str, str]:
    """{short key: text}: the method, the asked budget, what the sweep varied, and a few constants."""
    trial = flat(result["trial"])
    chosen = {"method": trial.get("method.name"), "flops_cut": trial.get("budget.flops_cut", 0.0 if _is_dense(result) else None)}
    names = dict.fromkeys([*result.get("varied", {}), *CONSTANTS])
    short = [name.rsplit(".", 1)[-1] for name in names]
    for name, last in zip(names, short, strict=True):
        if name not in ("method.name", "budget.flops_cut", "method", "seeds"):
            chosen[last if short.count(last) == 1 and last not in ("name", "weights") else name] = trial.get(name)
    first, last = result["trial"].get("seeds") or (0, -1)
    chosen["num_images"] = last - first + 1
    return {key(name): fit(brief(value), PARAM) for name, value in chosen.items() if value is not None}


def _is_dense(result: Result) -> bool:
    return (result["trial"].get("method") or {}).get("name") == "dense"


def metrics(result: Result) -> Iterator[tuple[str, float, int]]:
    """(key, value, step): measured values, the headline first (the compare page opens with it), then the series.

    Non-finite values are left out. Intervals are in the table `measures.json`: as metrics they would treble the charts. A series
    that bears the name of a metric (its values by step) gets another one: MLflow would show its last point as the value.
    """
    measures = result.get("metrics") or {}
    first = headline_metric(known_metrics([result]))
    for name in sorted(measures, key=lambda name: name != first):
        yield from _finite(key(name), measures[name].get("value"), 0)
    yield from _finite("tokens/keep_ratio_solved", (result.get("executed") or {}).get("keep_ratio_solved"), 0)
    for name, points in (result.get("series") or {}).items():
        shown = f"series/{name.replace('/', '.')}" if name in measures else name
        for step, value in points:
            yield from _finite(key(shown), value, int(step))


def known_metrics(results: Sequence[Result]) -> dict[str, Traits]:
    """{name: what it says of itself} of every metric that some of `results` has a value of."""
    known: dict[str, Traits] = {}
    for result in results:
        for name, measure in (result.get("metrics") or {}).items():
            if measure.get("value") is not None and name not in known:
                known[name] = traits(name, measure)
    return known


def system_metrics(result: Result) -> Iterator[tuple[str, float, int, int]]:
    """(key, value, second of the job, time in ms) of what each job used of its machine: MLflow draws these over time."""
    for job, usage in (result.get("usage") or {}).items():
        for name, points in (usage.get("curves") or {}).items():
            for second, value in points:
                for shown in _finite(key(f"system/{job}/{name}"), value, int(second)):
                    yield *shown, usage["began_ms"] + 1000 * int(second)


def _finite(name: str, value: Any, step: int) -> Iterator[tuple[str, float, int]]:
    if value is not None and math.isfinite(value):
        yield name, float(value), step


def tags(result: Result, parent: str | None) -> dict[str, str]:
    """Bookkeeping: ids, provenance, environment, error. parent: id of the sweep's run."""
    environment = _environment(result)
    chosen = {"trial_id": result["trial_id"], "sweep": result["sweep"], "kind": "trial", "status": result["status"],
              "label": result["label"], "contaminated": _CONTAMINATED[disturbance(result.get("environment") or {})],
              "mlflow.source.name": "harness.run",
              "mlflow.source.type": "LOCAL", **({"mlflow.parentRunId": parent} if parent else {})}
    for name, value in flat({part: result["trial"].get(part) for part in ("data", "backbone")}).items():
        chosen[name] = brief(value)
    chosen |= {f"env.{name}": brief(value) for name, value in environment.items()}
    commits = [value for name, value in environment.items() if re.search(r"(^|\.)(git_)?commit$", name) and value]
    if commits:
        chosen["mlflow.source.git.commit"] = str(commits[0])
    chosen |= unavailable(result)
    error = result.get("error")
    if error:
        chosen["error"] = error_line(error)
    return {key(name): fit(text, TAG, "error.txt" if name == "error" else "result.json") for name, text in chosen.items()}


def error_line(error: Mapping[str, Any]) -> str:
    """Which job failed, and how."""
    return f"{error.get('job')}: {error.get('type')}: {error.get('message')}"


def data_sets(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """(context, name, digest, source) of what a trial is compared with and, where it trains, of what it is trained on.

    digest: 12 hex digits over every option of the data set, its files' fingerprint among them. source: these options as JSON.
    """
    options = dict((result.get("trial") or {}).get("data") or {})
    train = options.pop("train", None)
    splits = [("reference", options, options.get("split", "reference"))] if options else []
    if options and result["trial"].get("train"):
        splits.append(("train", train or options, "train"))
    for context, one, split in splits:
        source = json.dumps({**one, "split": split}, sort_keys=True)
        code = hashlib.sha256(source.encode()).hexdigest()[:12]
        yield context, fit(f"{one.get('name')}/{split}", DATA_SET), code, fit(source, SOURCE)


def unavailable(result: Result) -> dict[str, str]:
    """{metric: 'unavailable: reason'} of what could not be measured: tags, for MLflow's metrics are numbers."""
    return {key(name): f"{UNAVAILABLE}{measure['unavailable']}" for name, measure in (result.get("metrics") or {}).items()
            if measure.get("unavailable")}


def _environment(result: Result) -> dict[str, Any]:
    """Scalars of the environment; a job's name stands before a key only where the jobs of the trial differ."""
    environment = result.get("environment") or {}
    measured = result.get("metrics") or {}  # their notes are in result.json
    jobs = {job: flat({name: value for name, value in tree.items() if name not in measured}) if isinstance(tree, Mapping) else
            {job: tree} for job, tree in environment.items()}
    merged: dict[str, Any] = {}
    for job, leaves in jobs.items():
        for name, value in leaves.items():
            alike = all(other.get(name, value) == value for other in jobs.values())
            if isinstance(value, str | int | float):
                merged[name if alike else f"{job}.{name}"] = value
    return merged


def measures_table(result: Result) -> dict[str, Any]:
    """Every measured value with its 95 % interval and sample count."""
    reasons = unavailable(result)
    rows = [[name, reasons.get(key(name), m.get("value")), *(m.get("interval") or (None, None)), m.get("n"), m.get("better")]
            for name, m in (result.get("metrics") or {}).items()]
    return {"columns": ["metric", "value", "low", "high", "n", "better"],
            "data": [[None if isinstance(v, float) and not math.isfinite(v) else v for v in row] for row in rows]}


def per_image_table(result: Result, captions: Sequence[str]) -> dict[str, Any] | None:
    """A table for MLflow's table view, joined across runs by `seed`; None when nothing was measured per image."""
    per_image = {name: values for name, values in (result.get("per_image") or {}).items() if values}
    count = max(map(len, per_image.values()), default=0)
    if not per_image:
        return None
    # a metric may use the first images only
    whole = {name: [*values, *[None] * (count - len(values))] for name, values in per_image.items()}
    first = (result["trial"].get("seeds") or [0])[0]
    texts = list(captions) if len(captions) == count else [""] * count
    finite = {name: [v if v is None or math.isfinite(v) else None for v in values] for name, values in whole.items()}
    rows = [[first + i, texts[i], *(values[i] for values in finite.values())] for i in range(count)]
    return {"columns": ["seed", "prompt", *finite], "data": rows}


def view_name(results: str) -> str:
    """Name of the saved view that shows the runs of one results folder. results: its id."""
    return f"{VIEW}-{results[:8]}" if results else VIEW


def charts_link(experiment: str, results: str) -> str:
    """Page of all runs with charts, opened in the view of the results folder. results: its id."""
    return f"#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey={view_name(results)}&{MODE}"


def compare_link(experiment: str, runs: Sequence[str]) -> str:
    """Page that compares `runs`, within the UI."""
    ids, experiments = (quote(json.dumps(list(values), separators=(",", ":"))) for values in (runs, [experiment]))
    return f"#/compare-runs?runs={ids}&experiments={experiments}&{MODE}"


def run_link(experiment: str, run: str, page: str = "") -> str:
    """Page of one run. page: of its tabs, such as 'artifacts/report.md'; the overview where there is none."""
    return f"#/experiments/{experiment}/runs/{run}{'/' * bool(page)}{page}?{MODE}"


def is_attached(file: str) -> bool:
    """Whether the sweep's run holds a file of this name."""
    return file in ATTACHED or file.endswith(".png")


def attached(report: Path) -> list[Path]:
    """Files in the folder of a report that the sweep's run holds."""
    return sorted(path for path in report.iterdir() if is_attached(path.name)) if report.is_dir() else []


def trial_links(experiment: str, runs: Mapping[str, str]) -> list[str]:
    """A line for each trial. runs: label -> run id, in the order of the sweep."""
    return [f"- [{as_markdown(mark(label))}]({run_link(experiment, run)})" for label, run in runs.items()]


def sweep_note(title: str, experiment: str, runs: Mapping[str, str], results: str) -> str:
    """The sweep run's description, no longer than MLflow takes. runs: label -> run id, in the order of the sweep."""
    some = list(runs.values())[:COMPARED]
    which = "the trials" if len(some) == len(runs) else f"the first {COMPARED} of {len(runs)} trials"
    links = [f"[all trials with charts]({charts_link(experiment, results)})",
             f"[compare {which}]({compare_link(experiment, some)})"]
    head = [f"**{as_markdown(mark(fit(title, 1000, 'sweep.yaml')))}**", "", " · ".join(links), ""]
    end = ["", "Tables and figures: see the artifacts of the sweep's run, `report.md`."]
    return fit_lines(head, trial_links(experiment, runs), end, TRIALS)


def view(names: Mapping[str, Traits], results: str) -> str:
    """The saved view of a results folder: every run visible, dense first, the charts worth opening on top of MLflow's bars.

    names: see `known_metrics`.
    """
    quality = headline_metric(names)
    costs = [name for name in (CUT, LATENCY) if name in names]
    charts = [_chart("SCATTER", xaxis=_axis(cost), yaxis=_axis(quality)) for cost in costs if quality]
    if quality:  # only params that every run has: the chart leaves out runs that lack one
        charts.append(_chart("PARALLEL", selectedParams=["method", "flops_cut"], selectedMetrics=[*costs[1:], quality],
                             showAllRuns=True))
    bars = dict.fromkeys(name for name in (quality, headline_metric(names, ("dense",))) if name)
    charts += [_chart("BAR", metricKey=name, displayName=name) for name in bars]
    charts.append(_chart("IMAGE", imageKeys=["pictures"], step=0))
    return _view([{**chart, "uuid": f"{VIEW}-{i}"} for i, chart in enumerate(charts)], f"tags.results_id = '{results}'")


def _view(charts: list[dict[str, Any]], shown: str) -> str:
    """As many of `charts` as a tag can hold."""
    section = {"uuid": VIEW, "name": VIEW, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    text = json.dumps({"compareRunsMode": "CHART", "orderByKey": "attributes.start_time", "orderByAsc": True,
                       "searchFilter": shown,
                       "runsHiddenMode": "SHOW_ALL", "isAccordionReordered": True, "compareRunSections": [section],
                       "compareRunCharts": charts})
    return text if len(text) <= TAG or not charts else _view(charts[:-1], shown)


def _chart(kind: str, **options: Any) -> dict[str, Any]:
    return {"type": kind, "runsCountToCompare": 100, "metricSectionId": VIEW, "deleted": False, "isGenerated": False, **options}


def _axis(metric: str) -> dict[str, Any]:
    return {"key": metric, "index": 0, "type": "METRIC"}


def summary_metrics(results: Sequence[Result]) -> dict[str, float]:
    """What a sweep run shows in a list of sweeps."""
    seconds = sum(value for result in results for name, value in flat(result.get("stages") or {}).items()
                  if isinstance(value, int | float))
    counts = {f"trials/{status}": float(sum(result["status"] == status for result in results)) for status in STATUS}
    return counts | {"trials/compute_hours": seconds / 3600}
