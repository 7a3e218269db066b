"""Which code a result rests on is found from imports: an edit of any of it counts, and an edit of anything else does not."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import methods as methods
from harness.api import BACKBONES, DATASETS, METHODS, METRICS, ConfigError
from harness.storage import code_hash as module
from harness.storage.code_hash import OURS, code_hash, modules_of
from harness.trial.identity import JOB, code_of

ROOT = Path(__file__).parent.parent
PARTS = ("harness.backbones.sd3", "methods.shiva", "harness.metrics.fidelity.fid", "harness.data.folder")
EDIT = "\nEDITED = 1\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module._distributions.cache_clear(), module._same_project.cache_clear()


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The folder of a copy of our own packages, which the hash is taken of."""
    for name in OURS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=lambda folder, names: [
            one for one in names if not one.endswith(".py") and not (Path(folder) / one).is_dir() or one == "__pycache__"])
    real = module._top
    monkeypatch.setattr(module, "_top", lambda name: (tmp_path / name / "__init__.py", (tmp_path / name,)) if name in OURS
                        else real(name))
    return tmp_path


def test_editing_any_module_that_a_trial_imports_changes_the_hash_and_editing_another_does_not(copied):
    before, used = code_hash(JOB, *PARTS), set(modules_of(JOB, *PARTS).values())
    assert len(used) > 50
    for file in sorted((*copied.glob("harness/**/*.py"), *copied.glob("methods/**/*.py"))):
        text = file.read_text()
        file.write_text(text + EDIT)
        assert (code_hash(JOB, *PARTS) != before) == (file in used), file
        file.write_text(text)
    assert code_hash(JOB, *PARTS) == before


def test_a_trial_rests_on_the_engine_and_not_on_what_makes_models_runs_sweeps_or_draws_reports():
    found = modules_of(JOB, *PARTS)
    for name in ("api", "engine.sampler", "engine.injection", "engine.tokens", "engine.ports", "engine.finite", "cost.flops",
                 "cost.budget", "cost.speedup", "trial.job", "trial.build", "trial.images", "training.train", "training.stage",
                 "backbones.pipeline", "backbones.loading", "backbones.shapes", "metrics.extractors.inception",
                 "hardware.neighbours", "data.files"):
        assert f"harness.{name}" in found
    for name in ("sweep", "execution", "run", "report", "reporting", "tracking", "bench", "study", "storage", "trial.identity",
                 "embedded", "backbones.flux", "metrics.dense.lpips", "data.mjhq"):
        assert not any(one == f"harness.{name}" or one.startswith(f"harness.{name}.") for one in found), name
    assert "methods.dydit" not in found and "methods.shiva.router" in found


def test_what_is_imported_by_a_name_made_at_run_time_would_be_missed_so_nothing_is():
    plugged = [".".join(file.relative_to(ROOT).with_suffix("").parts) for kind in ("metrics", "backbones", "data")
               for file in sorted((ROOT / "harness" / kind).rglob("*.py"))
               if file.stem != "__init__" and "external" not in file.parts]
    for file in modules_of(JOB, *plugged).values():
        assert not re.search(r"import_module|__import__", file.read_text()), file


@pytest.mark.parametrize(("change", "counts"), [
    (lambda text: text.replace('"""The sampling', '"""Words about the sampling').replace("# ", "# more "), False),
    (lambda text: "# a comment\n" + text, False),
    (lambda text: text.replace("import math\n", "import math\nimport json\n"), False),
    (lambda text: text.replace("return 2", "return 3"), True)], ids=["docstring", "comment", "unused import", "value"])
def test_words_are_no_code(tmp_path, monkeypatch, change, counts):
    monkeypatch.syspath_prepend(tmp_path)
    text = ('"""The sampling of nothing."""\nimport math\n\n\ndef two():\n    """The sampling."""\n    # why\n'
            '    return 2 * math.pi\n')
    (tmp_path / "wordy.py").write_text(text)
    before = code_hash("wordy")
    (tmp_path / "wordy.py").write_text(change(text))
    assert change(text) != text and (code_hash("wordy") != before) == counts


def trial(metrics=("fd",), **changes):
    return {"method": {"name": "random_drop"}, "backbone": {"name": "sd3"}, "data": {"name": "emoji"},
            "metrics": [{"name": name} for name in metrics]} | changes


@pytest.mark.parametrize(("file", "stale"), [
    ("harness/metrics/dense/lpips.py", [False, True, False, False]), ("harness/metrics/fidelity/fd.py", [True, True, True, True]),
    ("methods/tofu.py", [False, False, True, False]), ("methods/dense.py", [True, True, True, True]),
    ("harness/backbones/flux.py", [False] * 4), ("harness/data/mjhq.py", [False, False, False, True]),
    ("harness/data/__init__.py", [True] * 4), ("harness/metrics/__init__.py", [True] * 4),
    ("harness/reporting/report.py", [False] * 4)])
def test_an_edit_makes_those_trials_stale_that_take_what_was_edited(copied, file, stale):
    BACKBONES.names(), METHODS.names(), METRICS.names(), DATASETS.names()
    import harness.metrics  # noqa: F401

    trials = [trial(), trial(("fd", "lpips")), trial(method={"name": "tofu"}),
              trial(data={"name": "folder", "train": {"name": "mjhq"}})]
    before = code_of(trials)
    (copied / file).write_text((copied / file).read_text() + EDIT)
    assert [a != b for a, b in zip(before, code_of(trials), strict=True)] == stale


def test_registering_one_more_metric_makes_nothing_stale(copied):
    before = code_hash(JOB, *PARTS)
    (copied / "harness/metrics/brightness.py").write_text("VALUE = 1\n")
    catalogue = copied / "harness/metrics/__init__.py"
    catalogue.write_text(catalogue.read_text() + "from harness.metrics import brightness as brightness\n")
    assert code_hash(JOB, *PARTS) == before


# ---------------------------------------------------------------------------------------------- plug-ins

PROJECTS = {
    "a module with helpers beside it": {"plug.py": "import plug_helper\n\n\nclass Plug:\n    value = plug_helper.VALUE\n",
                                        "plug_helper.py": "from plug_more import VALUE\n", "plug_more.py": "VALUE = 1\n"},
    "a package": {"plug/__init__.py": "from . import core\nfrom .core import Plug as Plug\n",
                  "plug/core.py": "from ._inner.deep import VALUE\n\n\nclass Plug:\n    value = VALUE\n",
                  "plug/_inner/__init__.py": "SIDE = 1\n", "plug/_inner/deep.py": "import plug.registered\nVALUE = 1\n",
                  "plug/registered.py": "VALUE = 1\n"},
}


def written(folder: Path, files: dict[str, str]) -> list[Path]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [folder / name for name in files]


@pytest.mark.parametrize("installed", [False, True], ids=["project folder", "site-packages"])
@pytest.mark.parametrize("project", PROJECTS)
def test_a_plug_in_is_in_it_whole_and_what_lies_beside_it_is_not(tmp_path, monkeypatch, project, installed):
    folder = tmp_path / "place"
    files = written(folder, PROJECTS[project])
    if installed:
        tops = sorted({name.split("/")[0].removesuffix(".py") for name in PROJECTS[project]})
        written(folder, {"plug-1.0.dist-info/METADATA": "Name: plug\nVersion: 1.0\n",
                         "plug-1.0.dist-info/top_level.txt": "\n".join(tops), "stranger.py": "VALUE = 1\n",
                         "stranger-1.0.dist-info/METADATA": "Name: stranger\nVersion: 1.0\n",
                         "stranger-1.0.dist-info/top_level.txt": "stranger"})
        files[-1].write_text(files[-1].read_text() + "import stranger\nimport numpy\n")
    monkeypatch.syspath_prepend(folder)
    before = code_hash("harness.statistics.intervals", "plug")
    for file in files:
        text = file.read_text()
        file.write_text(text + EDIT)
        assert code_hash("harness.statistics.intervals", "plug") != before, file
        file.write_text(text)
    if installed:
        (folder / "stranger.py").write_text("VALUE = 2\n")
    assert code_hash("harness.statistics.intervals", "plug") == before
    assert "plug" not in sys.modules, "nothing is imported for it"


def test_a_class_whose_source_cannot_be_found_is_refused():
    with pytest.raises(ConfigError, match="source of 'nowhere_at_all' cannot be found"):
        code_hash(JOB, type("Loose", (), {"__module__": "nowhere_at_all"}))


def test_it_costs_no_import_of_torch_and_a_blink():
    code_hash(JOB, *PARTS)
    began = time.process_time()
    code_hash(JOB, *PARTS)
    assert time.process_time() - began < 0.3
    code = (f"import sys; from harness.storage.code_hash import code_hash; code_hash({JOB!r}, *{PARTS!r}); "
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
