"""docs/adding.md: its package is installed and its sweep runs; it names every hook of the contract, and no other."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import harness.api as api
import harness.backbones as _backbones  # noqa: F401  (these fill the registries, before the page's package is added to them)
import harness.metrics as _metrics  # noqa: F401
import methods as _methods  # noqa: F401
from harness.api import BACKBONES, METHODS, METRICS
from harness.storage.store import Store
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.trial import build
from harness.trial.job import run_job

PAGE = (Path(__file__).parent.parent / "docs" / "adding.md").read_text(encoding="utf-8")
BLOCKS = [(kind, *re.match(r"# (\S+).*\n", text).groups(), text)
          for kind, text in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)]
REGISTRIES = (METHODS, BACKBONES, METRICS)
CLASSES = ("Method", "TrainableMethod", "Stage", "Reduction", "Site", "Call", "Run", "Backbone", "Metric", "Measure", "Subject",
           "Planned", "DataSet", "Content")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's files in an empty folder, which is the working directory; its package as if pip had installed it."""
    for registry in REGISTRIES:
        registry.names()  # plug-ins that are installed here are loaded before
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    for _, name, text in BLOCKS:
        (tmp_path / name).write_text(text, encoding="utf-8")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    groups = {group: "".join(f"{name} = {place}\n" for name, place in names.items())
              for group, names in project["entry-points"].items()}
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{names}\n" for group, names in groups.items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for registry in REGISTRIES:  # what the page registers is gone after the test
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
        monkeypatch.setattr(registry, "_plugins_loaded", False)
    yield tmp_path
    build._held.clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def test_the_package_of_the_page_runs_its_sweep(installed):
    from my_package.pixels import PixelTransformer

    PixelTransformer().save_pretrained("pixel_model")
    Path("prompts.txt").write_text("a red apple\na cat\n", encoding="utf-8")
    parts = {}
    for entry in resolve(load("mine.yaml")).entries:
        parts[entry.label] = run_job("score", entry.trial, Store(installed / "store"), lambda *state: None,
                                     installed / "artifacts" / entry.trial_id)
    cuts = {label: part["metrics"]["compute/flops_cut"]["value"] for label, part in parts.items()}
    assert len(parts) == 5 and cuts["dense"] == 0
    peaky = sorted(cut for label, cut in cuts.items() if label.startswith("peaky"))
    assert peaky == pytest.approx([0.2, 0.4], abs=0.02)
    assert all(cut > 0.05 for label, cut in cuts.items() if label != "dense"), cuts
    assert all(part["metrics"]["image/sharpness_2"]["value"] > 0 for part in parts.values())
    assert all(part["metrics"]["dense/psnr_db"]["value"] < 60 for label, part in parts.items() if label != "dense")


def hooks(cls: type) -> set[str]:
    """Public names that a class of the contract has of its own."""
    return {name for name in {*vars(cls), *vars(cls).get("__annotations__", ())} if not name.startswith("_")} - {"name"}


@pytest.mark.parametrize("name", CLASSES)
def test_the_page_names_every_hook_of(name):
    written = set(re.findall(r"`(\w+)`", PAGE)) | set(re.findall(r"`(\w+)`s", PAGE))
    lost = hooks(getattr(api, name)) - written
    assert not lost, f"docs/adding.md says nothing of {name}.{', '.join(sorted(lost))}"


def test_the_tables_of_the_page_name_no_hook_that_is_not_there():
    classes = {name: getattr(api, name) for name in CLASSES}
    for head, rows in re.findall(r"^\| of `(\w+)` \|.*?\|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        named = {word for row in rows.splitlines() for word in re.findall(r"`(\w+)`", row.split("|")[1])}
        lost = {word for word in named if not hasattr(classes[head], word)
                and word not in {key for one in classes[head].__mro__ for key in vars(one).get("__annotations__", ())}}
        assert not lost, f"docs/adding.md: {head} has no {sorted(lost)}"
