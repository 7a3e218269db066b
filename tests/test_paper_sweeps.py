"""Every sweep that judges a claim of the paper is whole: checked options, three trainings of a setting, a control, one budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.sweep.file import load
from harness.sweep.resolve import resolve

FILES = sorted((Path(__file__).parents[1] / "sweeps" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_claim_is_tested_over_seeds_at_one_budget_beside_chance(path):
    sweep = resolve(load(path))
    assert sweep.name == path.stem and sweep.question.endswith("?")
    assert f"({len(sweep.entries)} trials;" in sweep.text, "the header tells another number of trials"
    names = [entry.trial["method"]["name"] for entry in sweep.entries]
    assert names[0] == "dense" and "random_drop" in names
    assert {json.dumps(entry.trial["budget"]) for entry in sweep.entries[1:]} == {'{"flops_cut": 0.41}'}
    seeds: dict[str, list[int]] = {}
    for trial in (entry.trial for entry in sweep.entries if entry.trial["train"]):
        setting = json.dumps({**trial, "train": {**trial["train"], "seed": None}}, sort_keys=True)
        seeds.setdefault(setting, []).append(trial["train"]["seed"])
    assert len(seeds) > 1 and all(found == [0, 1, 2] for found in seeds.values())


def test_there_is_a_sweep_for_each_claim():
    assert len(FILES) >= 8


SWEEPS = Path(__file__).parents[1] / "sweeps"


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("table*.yaml")), ids=lambda path: path.stem)
def test_the_papers_tables_have_every_column_of_the_paper(path):
    sweep = load(path)
    assert sweep.name == path.stem
    names = {metric if isinstance(metric, str) else metric["name"] for metric in sweep.drafts[0].shared["metrics"]}
    assert {"fid", "image_reward", "clip_score", "clip_iqa", "flops", "latency"} <= names
    assert {"dense", "finetuned", "shiva"} <= {draft.method["name"] for draft in sweep.drafts}


def test_table_1_is_asked_of_both_models_that_the_papers_versions_name():
    old, new = ((SWEEPS / f"table1_{model}.yaml").read_text().partition("\nname: ")[2] for model in ("sd35", "sd3m"))
    changes = {"table1_sd35": "table1_sd3m", "SD3.5-Medium": "SD3-Medium",
               "stable-diffusion-3.5-medium": "stable-diffusion-3-medium-diffusers"}
    for before, after in changes.items():
        assert before in old
        old = old.replace(before, after)
    assert old == new


FAMILIES = sorted((Path(__file__).parents[1] / "sweeps" / "families").glob("*.yaml"))


def test_the_families_are_asked_the_same():
    rows = {}
    for path in FAMILIES:
        sweep = load(path)
        assert sweep.name == f"families_{path.stem}" and f"({len(sweep.drafts)} trials;" in sweep.text
        rows[path.stem] = {draft.method["name"]: {**draft.method, "budget": draft.budget} for draft in sweep.drafts}
        shared = {key: draft.shared[key] for draft in sweep.drafts[:1] for key in ("sampler", "data", "metrics", "seeds")}
        rows[path.stem][""] = shared
    assert rows["sd3"] == rows["pixart"]
    assert rows["flux"] == {name: row for name, row in rows["sd3"].items() if name not in ("tomesd", "tofu", "toma")}
