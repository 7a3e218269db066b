"""Which room may import which: a package imports from those above it in LAYERS, and of those only what its line says."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {  # from the bottom up: package -> the packages of ours that it imports
    "api": "",
    "statistics": "",
    "hardware": "",
    "storage": "api",
    "engine": "api",
    "data": "api storage",
    "backbones": "api engine storage",
    "training": "api engine storage",
    "metrics": "api data engine hardware statistics storage training",
    "cost": "api engine hardware metrics storage",
    "methods": "api engine",
    "embedded": "api backbones data engine methods metrics storage",
    "trial": "api backbones cost data engine hardware methods metrics storage training",
    "sweep": "api backbones data engine methods metrics training trial",
    "reporting": "api statistics storage",
    "tracking": "api reporting storage",
    "execution": "api backbones cost data engine hardware reporting storage sweep tracking training trial",
    "study": "api backbones cost data engine hardware methods metrics reporting statistics storage training",
    "bench": "api backbones cost engine execution hardware methods metrics statistics sweep training",
}
COMMANDS = {"run": "api execution storage sweep", "report": "reporting"}
"""The modules that lie flat in harness/, and the rooms that do their work."""
ONLY_IN = {"ray": ["harness/execution/pool.py"], "mlflow": ["harness/tracking/"],
           "diffusers": ["harness/backbones/", "harness/embedded/", "methods/diffusers_cache.py"],
           "transformers": ["harness/backbones/", "harness/embedded/", "harness/metrics/"],
           "torch_fidelity": ["harness/metrics/"], "cleanfid": ["harness/metrics/"], "peft": ["harness/engine/adapters.py"],
           "accelerate": ["harness/execution/pretrain.py"], "optuna": ["harness/sweep/search/suggest.py"]}
WITHOUT_TORCH = ("run", "report", "sweep.file", "execution.driver", "execution.results_folder", "execution.progress",
                 "execution.pool", "reporting.report", "tracking.client", "tracking.ui")
FILES = sorted(file.relative_to(ROOT) for folder in ("harness", "methods") for file in (ROOT / folder).rglob("*.py"))


def _name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(file): file for file in FILES}


class _Run(ast.NodeTransformer):
    """What is left when the program runs."""

    def visit_If(self, node):
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


@cache
def imports(file: Path, run: bool = False) -> frozenset[str]:
    """Dotted names imported anywhere in a file, also inside functions; of ours the module, where a name of it is imported.

    run: without what is imported for types only.
    """
    names: set[str] = set()
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(_Run().visit(tree) if run else tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {full if (full := f"{node.module}.{alias.name}") in MODULES or node.module not in MODULES else node.module
                      for alias in node.names}
    return frozenset(names)


def room(module: str) -> str:
    """The package of a module of ours; '' for the package harness itself."""
    parts = module.split(".")
    return "methods" if parts[0] == "methods" else parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_module_imports_only_from_the_rooms_that_its_own_may(file):
    own = room(_name(file))
    if own in COMMANDS or own == "":
        allowed = set(COMMANDS.get(own, "").split())
    else:
        assert own in LAYERS, f"{file}: say in LAYERS what '{own}' may import"
        allowed = set(LAYERS[own].split())
    for name in imports(file) & set(MODULES):
        assert room(name) in {own, "", *allowed}, f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_what_is_imported_of_ours_is_there(file):
    """Also inside functions, where a module that was left behind by a move is missed only by who calls it."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in ("harness", "methods"):
            continue
        assert node.module in MODULES, f"{file}, line {node.lineno}: no module {node.module}"
        for alias in node.names:
            assert f"{node.module}.{alias.name}" in MODULES or alias.name in names_of(node.module), f"{file}: {alias.name}"


@cache
def names_of(module: str) -> frozenset[str]:
    """What a module says at its top level: the names that it defines, assigns or imports."""
    tree = ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return frozenset(names)


def test_no_room_imports_one_above_it_and_the_table_holds_nothing_idle():
    order = list(LAYERS)
    used = {own: {room(name) for file in FILES if room(_name(file)) == own for name in imports(file) & set(MODULES)}
            for own in order}
    idle = {own: set(LAYERS[own].split()) - used[own] for own in order}
    assert not any(idle.values()), f"LAYERS permits what nobody does: { {own: rooms for own, rooms in idle.items() if rooms} }"
    seen: set[str] = set()

    def climb(own: str, way: tuple[str, ...]) -> None:
        assert own not in way, f"a circle of rooms: {' -> '.join((*way[way.index(own):], own))}"
        if own not in seen:
            for other in LAYERS[own].split():
                climb(other, (*way, own))
            seen.add(own)

    for own in order:
        climb(own, ())


def test_no_module_imports_itself_in_a_circle():
    state: dict[str, int] = {}

    def climb(name: str, way: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"a circle: {' -> '.join((*way[way.index(name):], name))}"
        if name not in state:
            state[name] = 1
            for other in sorted(imports(MODULES[name], run=True) & set(MODULES) - {name}):
                if not name.startswith(f"{other}."):  # a package that gathers its modules is entered before them
                    climb(other, (*way, name))
            state[name] = 2

    for name in MODULES:
        climb(name, ())


def test_only_the_commands_lie_flat():
    flat = {file.stem for file in FILES if len(file.parts) == 2 and file.parts[0] == "harness"} - {"__init__", "__main__"}
    assert flat == set(COMMANDS)


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "methods" and len(file.parts) > 1
                                  and file != Path("methods/__init__.py")], ids=str)
def test_a_method_imports_the_contract_the_token_algebra_and_itself(file):
    own = ".".join(("methods", file.parts[1].removesuffix(".py")))
    for name in imports(file) & set(MODULES):
        assert name.startswith(("harness.api", "harness.engine.tokens", own)), f"{file} imports {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_place_only(library):
    users = {file.as_posix() for file in FILES if any(name.split(".")[0] == library for name in imports(file))}
    assert users, f"nothing imports {library}: drop it here and in pyproject.toml"
    assert all(any(user.startswith(place) for place in ONLY_IN[library]) for user in users), users


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_the_driver_side_costs_no_import_of_torch(module):
    code = f"import sys, harness.{module}; print('torch' in sys.modules, 'ray' in sys.modules, 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False"] * 3
