"""What a search in a sweep file means, what is drawn and suggested, and what is refused before anything is computed."""

import csv
import json
import re
from pathlib import Path

import fake_sweep
import pytest
import yaml
from fake_search import ASHA, OBJECTIVES, OPTUNA, SPACE, space

from harness import run as command
from harness.api import METRICS, ConfigError
from harness.execution import preview
from harness.execution.driver import DONE
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.sweep.search.checks import measured
from harness.sweep.search.config import parse_search
from harness.sweep.search.draws import grid_points, probes, random_points
from harness.sweep.search.suggest import Suggestions

ROOT = Path(__file__).parent.parent


def test_a_parameter_is_there_only_where_its_condition_holds_and_takes_the_case_that_holds():
    points = random_points(space(), 200, 0, "s.yaml: search")
    assert {point["method.name"] for point in points} == {"random_drop", "tomesd", "learner"}
    for point in points:
        name = point["method.name"]
        assert ("method.keep_ratio" in point) == (name != "learner") and ("method.ffn" in point) == (name == "tomesd")
        assert ("method.stride" in point) == (name == "tomesd" and point["method.ffn"])
        assert ("method.width" in point) == ("train.adapter_lr" in point) == (name == "learner")
        assert point["sampler.num_steps"] == 4
        if name != "learner":
            assert (0.6 if name == "tomesd" else 0.4) <= point["method.keep_ratio"] <= 0.9
        else:
            assert point["method.width"] in (2, 3, 4, 5) and 1e-5 <= point["train.adapter_lr"] <= 0.1
    rates = [point["train.adapter_lr"] for point in points if "train.adapter_lr" in point]
    assert 0.3 < sum(rate < 1e-3 for rate in rates) / len(rates) < 0.7, "a logarithmic draw has its median in the middle decade"
    assert {point["method.width"] for point in points if "method.width" in point} == {2, 3, 4, 5}


def test_draws_are_the_same_tomorrow_and_more_of_them_leave_the_first_as_they_are():
    first = random_points(space(), 3, 0, "s.yaml: search")
    assert first == random_points(space(), 40, 0, "s.yaml: search")[:3] != random_points(space(), 3, 1, "s.yaml: search")
    assert first[0] == {"method.name": "random_drop", "method.keep_ratio": 0.7387, "sampler.num_steps": 4}
    more = space(SPACE + "train.seed: {int: [0, 9], when: {method.name: learner}}\n")
    kept = [{k: v for k, v in point.items() if k != "train.seed"} for point in random_points(more, 3, 0, "s.yaml: search")]
    assert kept == first


def test_a_grid_holds_every_point_once():
    points = grid_points(space("method.name: {choice: [a, b]}\nmethod.k: {choice: [1, 2, 3], when: {method.name: b}}\n"
                               "method.z: {choice: [true, 1]}"), 100, "s.yaml: search")
    assert len(points) == 2 * (1 + 3) and len({json.dumps(point) for point in points}) == 8


def test_probes_hold_every_choice_and_both_bounds():
    found = {(name, json.dumps(value)) for point in probes(space()) for name, value in point.items()}
    assert {("method.keep_ratio", "0.4"), ("method.keep_ratio", "0.6"), ("method.keep_ratio", "0.9"), ("method.width", "5"),
            ("method.ffn", "true"), ("method.ffn", "false"), ("train.adapter_lr", "0.1"), ("method.stride", "4")} <= found


HEAD = "name: s\nseeds: 4\nbackbone: nothing\nmetrics: [probe]\nmethods: [dense]\n"


def searching(space_text: str, options: str = "algorithm: random, num_trials: 3", top: str = "") -> str:
    return HEAD + top + f"search: {{{options}, space: {{{space_text}}}}}\n"


NAMED, RATIO = "method.name: random_drop", "method.name: random_drop, method.keep_ratio: {uniform: [0.4, 0.9]}"
ASK = f"algorithm: optuna, num_trials: 3, objectives: {OBJECTIVES}"
ONE = "algorithm: random, num_trials: 1"
REFUSED = {
    "no mapping": (HEAD + "search: random\n", ["search", "expected a mapping", "'random'"]),
    "unknown option": (searching(RATIO, "algorithm: random, num_trails: 3"), ["search", "'num_trails'", "'num_trials'"]),
    "algorithm": (searching(RATIO, "algorithm: hyperband, num_trials: 3"), ["search.algorithm", "'hyperband'", "random"]),
    "no number": (searching(RATIO, "algorithm: random"), ["search", "num_trials is missing", "such as 20"]),
    "number of a grid": (searching(NAMED, "algorithm: grid, num_trials: 2"), ["num_trials", "remove num_trials"]),
    "too many": (searching(RATIO, "algorithm: random, num_trials: 100000"), ["num_trials", "at most 1000", "100000"]),
    "sampler of random": (searching(RATIO, "algorithm: random, num_trials: 3, sampler: tpe"), ["search.sampler", "remove it"]),
    "no objectives": (searching(RATIO, "algorithm: optuna, num_trials: 3"), ["objectives is missing", "optuna"]),
    "unknown metric": (searching(RATIO, ASK.replace("fake_4", "fake_8")),
                       ["search.objectives[0].metric", "'fidelity/fake_8'", "Did you mean 'fidelity/fake_4'"]),
    "direction": (searching(RATIO, ASK.replace("minimize", "minimise")), ["objectives[0].direction", "'minimise'", "'minimize'"]),
    "three objectives": (searching(RATIO, ASK.replace("[{", "[{metric: x, direction: minimize}, {", 1)),
                         ["objectives", "3 are given"]),
    "objective twice": (searching(RATIO, ASK.replace("latency/fake_ms", "fidelity/fake_4")), ["given twice", "remove one"]),
    "no method": (searching("method.keep_ratio: {uniform: [0.4, 0.9]}"), ["search.space", "method.name is missing"]),
    "unknown method": (searching("method.name: {choice: [dense, random_drp]}", ONE), ["'random_drp'", "'random_drop'"]),
    "method number": (searching("method.name: {choice: [1, 2]}"), ["method.name", "expected a method"]),
    "unknown group": (searching("method.name: dense, metod.x: 3"), ["'metod.x'", "Did you mean 'method'"]),
    "no group": (searching("method.name: dense, keep_ratio: 0.5"), ["'keep_ratio'", "<group>.<option>"]),
    "misspelt option": (searching("method.name: random_drop, method.keep_raito: {uniform: [0.4, 0.9]}"),
                        ["search.space", "'keep_raito'", "Did you mean 'keep_ratio'"]),
    "budget option": (searching("method.name: random_drop, budget.flops: 0.3", ONE),
                      ["'budget.flops'", "Did you mean 'budget.flops_cut'"]),
    "label": (searching("method.name: dense, method.label: x"), ["method.label", "by its number"]),
    "operator": (searching("method.name: random_drop, method.keep_ratio: {unifrom: [0.4, 0.9]}"),
                 ["method.keep_ratio", "'unifrom'", "Did you mean 'uniform'"]),
    "two operators": (searching("method.name: random_drop, method.keep_ratio: {uniform: [0.4, 0.9], int: [1, 2]}"),
                      ["method.keep_ratio", "one operator"]),
    "grid_search": (searching("method.name: random_drop, method.keep_ratio: {grid_search: [0.4, 0.9]}"), ["write choice"]),
    "bounds": (searching("method.name: random_drop, method.keep_ratio: {uniform: [0.9, 0.4]}"),
               ["method.keep_ratio.uniform", "the smaller first", "[0.9, 0.4]"]),
    "log of 0": (searching("method.name: learner, train.adapter_lr: {log_uniform: [0, 1]}"), ["log_uniform", "positive"]),
    "text for a number": (searching("method.name: learner, train.adapter_lr: {log_uniform: ['1e-5', '1e-3']}"),
                          ["log_uniform", "'1e-5'"]),
    "int": (searching("method.name: tomesd, method.stride: {int: [1.5, 4]}"), ["method.stride.int", "whole numbers", "1.5"]),
    "float for an int": (searching("method.name: tomesd, method.stride: {uniform: [2, 4]}"),
                         ["search.space.stride", "expected int"]),
    "out of range": (searching("method.name: random_drop, method.keep_ratio: {uniform: [0.4, 1.5]}"),
                     ["keep_ratio", "(0, 1]", "1.5"]),
    "choice twice": (searching("method.name: {choice: [dense, dense]}"), ["method.name", "listed twice"]),
    "train of untrained": (searching("method.name: random_drop, train.steps: {int: [1, 9]}"),
                           ["search.space.train", "not trained"]),
    "condition below": (searching("method.name: dense, method.a: {value: 1, when: {method.b: 2}}, method.b: {choice: [1, 2]}"),
                        ["method.a.when", "'method.b'", "above"]),
    "condition never": (searching("method.name: {choice: [tomesd, dense]}, method.ffn: {value: 1, when: {method.name: tomsed}}"),
                        ["method.ffn.when.method.name", "'tomsed' is never chosen", "Did you mean 'tomesd'"]),
    "condition on a range": (searching(RATIO + ", method.first_block: {value: true, when: {method.keep_ratio: 0.5}}"),
                             ["when.method.keep_ratio", "values of a choice"]),
    "exhausted": (searching("method.name: {choice: [dense, random_drop]}"), ["num_trials", "3 different trials", "after 2"]),
    "grid of a range": (searching(RATIO, "algorithm: grid"), ["method.keep_ratio", "uniform has no grid", "random"]),
    "axis beside": (searching(RATIO, top="sampler: {num_steps: {grid_search: [4, 8]}}\n"), ["sampler.num_steps", "search.space"]),
    "rungs without training": (HEAD + "asha: {}\n", ["asha", "no row", "is trained"]),
    "rungs without validation": (HEAD.replace("[dense]", "[learner]") + "asha: {}\n",
                                 ["asha.metric", "validate_every", "such as 20"]),
    "rung before validation": (ASHA.replace("[0.25, 0.5]", "[0.1, 0.5]"), ["asha.rungs", "step 4 of 40", "at step 5"]),
    "rung order": (ASHA.replace("[0.25, 0.5]", "[0.5, 0.25]"), ["asha", "rising", "[0.5, 0.25]"]),
    "rung of another loss": (ASHA.replace("{rungs", "{metric: val/mse, rungs"), ["asha.metric", "'val/mse'", "Did you mean"]),
    "factor": (ASHA.replace("{rungs", "{reduction_factor: 1, rungs"), ["asha", "reduction_factor", "above 1"]),
    "rungs and optuna": (OPTUNA + "asha: {}\n", ["asha", "optuna", "random or grid"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_search_is_refused_with_place_value_and_remedy(case, tmp_path, monkeypatch):
    fake_sweep.install(monkeypatch)
    text, fragments = REFUSED[case]
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(load(tmp_path / "s.yaml"))
    for fragment in ["s.yaml", *fragments]:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


def test_what_metrics_declare_is_what_they_measure():
    """Against the tables of published runs, whose columns were measured; router parameters are counted otherwise now."""
    import harness.metrics  # noqa: F401

    measured = {re.sub(r"_\d+$", "_{n}", column) for path in (ROOT / "results" / "published").glob("*/table.csv")
                for column in next(csv.reader(path.open())) if "/" in column and not column.endswith((".lo", ".hi"))}
    declared = {name for metric in METRICS.names() for name in METRICS.get(metric).measures}
    assert len(measured) > 10 and measured - {"latency/dense_ms_per_image", "compute/router_parameters"} == declared & measured


def test_what_depends_on_options_may_be_an_objective_too():
    import harness.metrics  # noqa: F401

    named = ["fid", "kid", "precision_recall", "fd_dinov2", "clip_score", "clip_iqa", "lpips", "image_reward", "hps"]
    trial = {"seeds": [0, 4999], "metrics": [{"name": name} for name in named] + [{"name": "fid", "library": "clean-fid"}]}
    assert measured(trial) == [
        "fidelity/fid_5k", "fidelity/fid_inf_5k", "fidelity/kid_5k", "fidelity/precision_5k", "fidelity/recall_5k",
        "fidelity/fd_dinov2_5k", "fidelity/fd_dinov2_inf_5k",
        "prompt/clip_score_5k", "image/clip_iqa_5k", "dense/lpips_alex", "prompt/image_reward_5k", "prompt/hps_5k",
        "fidelity/fid_clean_5k", "fidelity/fid_clean_inf_5k"]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_suggestions_follow_from_the_seed_and_what_was_told(sampler):
    def play(seed: int, factor: float, conditional: bool = False) -> list:
        options = yaml.safe_load(OPTUNA)["search"] | {"sampler": sampler, "seed": seed, "num_trials": 45}
        if conditional:
            options["space"] = yaml.safe_load(SPACE)
        suggestions, found = Suggestions(parse_search(options, "s.yaml: search")), []
        for batch in range(15):
            points = suggestions.ask(3)
            found += points
            values = [(factor * point.get("method.keep_ratio", 0.5), len(point)) for point in points]
            suggestions.tell([None if batch == index == 0 else value for index, value in enumerate(values)])
        return found

    assert play(0, 1) == play(0, 1) != play(1, 1)
    assert (play(0, 1) == play(0, -1)) == (sampler == "random"), "a model learns from what it is told"
    points = play(0, 1, conditional=True)
    assert points == play(0, 1, conditional=True)
    for point in points:
        assert ("method.ffn" in point) == (point["method.name"] == "tomesd")


def test_a_search_with_a_model_finds_better_trials_than_chance():
    """Minimise (x - 0.3)^2 and what a useless choice adds; the mean of the last third, over seeds."""
    def last_third(sampler: str, seed: int) -> float:
        options = {"algorithm": "optuna", "num_trials": 30, "seed": seed, "sampler": sampler,
                   "objectives": [{"metric": "a", "direction": "minimize"}],
                   "space": {"method.name": "m", "method.x": {"uniform": [0.0, 1.0]}, "method.c": {"choice": [0, 1, 2]}}}
        suggestions, values = Suggestions(parse_search(options, "s")), []
        for _ in range(10):
            batch = [(point["method.x"] - 0.3) ** 2 + point["method.c"] for point in suggestions.ask(3)]
            suggestions.tell([[value] for value in batch])
            values += batch
        return sum(values[20:])

    assert sum(last_third("tpe", seed) for seed in range(5)) < 0.6 * sum(last_third("random", seed) for seed in range(5))


@pytest.mark.parametrize(("text", "told"), [
    (OPTUNA, ["Optuna (tpe), 3 suggestions at once, seed 5; 10 trials", "method.keep_ratio: uniform [0.1, 0.9]",
              "minimize fidelity/fake_4, hypervolume up to 1", "about 1,500 GFLOPs: 10 times the mean of 4 points"]),
    (ASHA, ["Rungs: compared by val/diffusion_mse at 0.25, 0.5 of the steps; one in 2 goes on, when all have come",
            "5 to step 10, 3 to step 20, 2 to step 40: about 90 of 150 GFLOPs of training"]),
    (ASHA.replace(", synchronous: true", ""),
     ["one in 2 goes on, as soon as it is among the best so far",
      "5 to step 10, at least 3 to step 20, at least 2 to step 40: at least 90 of 150 GFLOPs of training"])])
def test_a_dry_run_tells_the_plan(text, told, tmp_path, monkeypatch, capsys):
    fake_sweep.install(monkeypatch)
    monkeypatch.setattr(preview, "_estimate", lambda entry: (120.0, 30.0, "153 256", ""))
    monkeypatch.setattr(preview, "PROBE_S", 0.01)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(text)
    assert command.main(["s.yaml", "--dry-run"]) == DONE
    shown = capsys.readouterr().out
    for words in told:
        assert words in shown, shown
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]
