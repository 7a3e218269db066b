"""Who may import whom. A new module needs a line here; a line that grows long says that something sits in the wrong place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file.relative_to(ROOT) for folder in ("harness", "methods") for file in (ROOT / folder).rglob("*.py"))
HARNESS = [file for file in FILES if file.parts[0] == "harness" and file.name != "__init__.py"]
METHODS = [file for file in FILES if file.parts[0] == "methods" and file != Path("methods/__init__.py")]

ENGINE = {"api", "code_hash", "fingerprints", "tokens", "ports", "injection", "sampler", "store", "stats", "provenance", "data"}
MAY = {  # module or package of harness -> what of harness it may import besides itself; longest match counts
    "registry": set(), "api": {"tokens", "registry"},
    "tokens": {"api"}, "ports": {"api"}, "rotary": {"api"}, "compiling": {"api"},
    "injection": {"api", "ports", "tokens", "rotary", "compiling"}, "sampler": {"api", "injection"},
    "fingerprints": {"api"}, "code_hash": {"api", "fingerprints"}, "identity": {"api", "code_hash", "data", "fingerprints"},
    "store": set(), "stats": set(), "provenance": set(), "adapters": set(), "data": {"api", "fingerprints"},
    "backbones": {"api", "ports", "data", "fingerprints"}, "metrics": ENGINE, "flops": ENGINE, "budget": ENGINE | {"flops"},
    "speedup": ENGINE | {"budget", "metrics"},
    "train": ENGINE | {"adapters", "training"}, "training": ENGINE | {"adapters"}, "pictures": ENGINE,
    "bench": ENGINE | {"adapters", "flops", "backbones", "metrics", "methods", "sweep", "ledger", "worker", "scheduler", "run"},
    "strict_yaml": {"api"}, "search": {"api"}, "sweep": {"api", "strict_yaml", "search"},
    "resolve": ENGINE | {"compiling", "identity", "sweep", "search", "train", "backbones", "metrics", "methods"},
    "subject": ENGINE | {"identity", "train", "flops", "budget", "speedup", "pictures", "backbones", "metrics", "methods"},
    "trial": ENGINE | {"identity", "subject", "sweep", "pictures", "metrics"},
    "rounds": {"api", "ledger", "promotions", "resolve", "search", "sweep"}, "promotions": {"ledger", "search"},
    "ledger": {"api", "search", "sweep"}, "worker": {"api", "identity", "ledger", "store", "trial", "usage"}, "usage": set(),
    "progress": {"ledger"},
    "scheduler": {"api", "ledger", "worker"}, "plan": {"resolve", "search", "sweep"},
    "unused": {"ledger", "sweep"}, "preview": {"api", "ledger", "plan", "sweep", "trial", "unused"},
    "shape_only": {"api", "sweep", "backbones", "metrics", "methods"},
    "run": {"api", "fingerprints", "ledger", "preview", "progress", "report", "resolve", "rounds", "scheduler", "shape_only",
            "sweep", "tracking", "unused", "worker"},
    "study": ENGINE | {"flops", "train", "training", "backbones", "methods", "reporting"},
    "siblings": {"api", "backbones", "data", "sampler", "methods"}, "pretrain": {"api", "run", "store", "trial"},
    "reporting": {"api"}, "report": {"api", "reporting"}, "mirror": {"api", "reporting"},
    "tracking": {"api", "mirror", "reporting", "tracking_ui"}, "tracking_ui": {"api", "mirror", "reporting", "tracking"},
}
ONLY_IN = {"ray": ["harness/execution/pool.py"], "mlflow": ["harness/tracking/client.py"],
           "diffusers": ["harness/backbones/", "harness/embedded/siblings/", "methods/diffusers_cache.py"],
           "transformers": ["harness/backbones/", "harness/embedded/siblings/", "harness/metrics/"],
           "torch_fidelity": ["harness/metrics/"], "cleanfid": ["harness/metrics/"], "peft": ["harness/engine/adapters.py"],
           "accelerate": ["harness/execution/pretrain.py"],
           "optuna": ["harness/sweep/search/suggest.py"]}
WITHOUT_TORCH = ("sweep", "ledger", "progress", "run", "report", "tracking", "scheduler")


def imports(file: Path) -> set[str]:
    """Dotted names imported anywhere in a file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", HARNESS, ids=str)
def test_a_module_of_the_harness_imports_only_what_its_layer_may(file):
    layer = file.parts[1].removesuffix(".py")
    assert layer in MAY, f"{file}: say in MAY what it may import"
    for name in imports(file):
        parts = name.split(".")
        target = parts[1] if parts[0] == "harness" and len(parts) > 1 else parts[0] if parts[0] == "methods" else layer
        assert target == layer or target in MAY[layer], f"{file} imports {name}"


@pytest.mark.parametrize("file", METHODS, ids=str)
def test_a_method_imports_the_contract_and_itself_only(file):
    own = "methods." + file.parts[1].removesuffix(".py")
    for name in imports(file):
        allowed = name.startswith(("harness.api.", "harness.engine.tokens.", own + "."))
        assert allowed or name.split(".")[0] not in ("harness", "methods"), f"{file} imports {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_place_only(library):
    users = {str(file) for file in FILES if any(name.split(".")[0] == library for name in imports(file))}
    assert users, f"nothing imports {library}: drop it here and in pyproject.toml"
    assert all(any(user.startswith(place) for place in ONLY_IN[library]) for user in users), users


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_the_driver_side_costs_no_import_of_torch(module):
    code = f"import sys, harness.{module}; print('torch' in sys.modules, 'ray' in sys.modules, 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False"] * 3
