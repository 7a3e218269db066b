"""Hash of the code that shapes a number, found from its imports: what a trial or a stored thing was made by.

One rule for all code. From the modules given, every import of this project is followed, wherever it stands, and the syntax of
what is found is hashed without docstrings and comments. Not followed: an import of a module whose name the importing file never
uses, which is made to register what is in it (the trial says by name what it takes of that); what is imported for types only;
and the packages of OUTSIDE. Code of another distribution, a plug-in, is taken whole: every import of its own is followed.
Nothing is imported for this, and a file is parsed once.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.api import ConfigError
from harness.storage.fingerprints import Remembered, settle, stamp

OURS = ("harness", "methods")
OUTSIDE = ("sweep", "storage", "trial.identity", "trial.ids", "reporting", "tracking", "execution", "bench", "study")
"""Packages and modules below `harness` that decide what runs, where it is kept or how it is shown: edits change no number."""
Part = ModuleType | type | str
"""A module, a class, or the dotted name of a module."""


def code_hash(*parts: Part) -> str:
    """12 hex digits over the code of `parts` and of what they import."""
    walk = _Walk(dict.fromkeys(map(_name, parts)))
    digest = hashlib.sha256()
    for name, syntax in sorted(walk.found.items()):
        digest.update(f"{name}\n{syntax}\n".encode())
    return digest.hexdigest()[:12]


def modules_of(*parts: Part) -> dict[str, Path]:
    """{dotted name: file} of what `code_hash` covers."""
    walk = _Walk(dict.fromkeys(map(_name, parts)))
    return {name: walk.files[name][0] for name in sorted(walk.found)}


def _name(part: Part) -> str:
    if isinstance(part, str):
        return part
    return part.__name__ if isinstance(part, ModuleType) else part.__module__


class _Walk:
    """found: {module: hash of its syntax}, from the modules `roots`. files: {module: its file and whether it is a package}."""

    def __init__(self, roots: Iterable[str]) -> None:
        self.found: dict[str, str] = {}
        self.files: dict[str, tuple[Path, bool] | None] = {}
        self._tops: dict[str, tuple[Path | None, tuple[Path, ...]]] = {}
        self._known, self._learnt, queue = Remembered(f"code-{sys.version_info[0]}.{sys.version_info[1]}"), False, list(roots)
        self._plugins = {root.split(".")[0] for root in queue} - set(OURS)
        for root in queue:
            if self._locate(root) is None:
                raise ConfigError(f"the source of '{root}' cannot be found, so results by it could not be told from those of an "
                                  "edited one; put the class into a module that can be imported")
        while queue:
            name = queue.pop()
            place = self._locate(name)
            if name not in self.found and place is not None:
                facts = self._facts(place[0])
                self.found[name] = facts["syntax"]
                queue += [target for target in self._targets(name, place[1], facts) if target not in self.found]
        if self._learnt:
            self._known.save()

    def _facts(self, file: Path) -> dict[str, Any]:
        facts = self._known.get(file)
        if facts is None:
            settle([file])
            mark = stamp(file)
            facts, self._learnt = _facts_of(file), True
            self._known.put(file, mark, facts)
        return facts

    def _targets(self, name: str, is_package: bool, facts: dict[str, Any]) -> Iterator[str]:
        """The modules that `name` brings in: its parents, and what it imports."""
        top, *rest = name.split(".")
        yield from (".".join([top, *rest[:depth]]) for depth in range(len(rest)))
        for level, module, alias, used in facts["imports"]:
            base = _absolute(name if is_package else name.rpartition(".")[0], level, module)
            if not self._belongs(base):
                continue
            inner = f"{base}.{alias}" if alias else base
            is_module = self._locate(inner) is not None
            if is_module and (used or top not in OURS):
                if self._belongs(inner):
                    yield inner
            elif not is_module:
                yield base

    def _belongs(self, name: str) -> bool:
        top, _, rest = name.partition(".")
        if top in OURS:
            return not (top == "harness" and any(f"{rest}.".startswith(f"{one}.") for one in OUTSIDE))
        return bool(self._plugins) and top in _kin(frozenset(self._plugins), top)

    def _locate(self, name: str) -> tuple[Path, bool] | None:
        if name not in self.files:
            top = name.partition(".")[0]
            if top not in self._tops:
                self._tops[top] = _top(top)
            self.files[name] = _located(name, *self._tops[top])
        return self.files[name]


def _absolute(package: str, level: int, module: str) -> str:
    if not level:
        return module
    parts = package.split(".")
    return ".".join([*parts[:len(parts) - level + 1], *([module] if module else [])])


# ---------------------------------------------------------------------------------------------- where modules are


def _located(name: str, origin: Path | None, folders: Iterable[Path]) -> tuple[Path, bool] | None:
    """(file, whether it is a package) of a module, without importing it; None where there is no file of it. See `_top`."""
    rest = name.split(".")[1:]
    if not rest:
        return None if origin is None else (origin, bool(folders))
    for folder in folders:
        place = os.path.join(folder, *rest)
        for file, is_package in ((f"{place}.py", False), (os.path.join(place, "__init__.py"), True)):
            if os.path.isfile(file):
                return Path(file), is_package
    return None


def _top(name: str) -> tuple[Path | None, tuple[Path, ...]]:
    """(file, folders of its submodules) of a top-level module."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: it runs as a script or was made by hand
        file = getattr(sys.modules.get(name), "__file__", None)
        return (Path(file) if file else None), ()
    if spec is None:
        return None, ()
    origin = Path(spec.origin) if spec.has_location and spec.origin else None
    return origin, tuple(map(Path, spec.submodule_search_locations or ()))


def _kin(plugins: frozenset[str], top: str) -> frozenset[str]:
    """`plugins` and, where `top` comes with one of them, `top`: of one distribution, or files side by side in a project."""
    return plugins | {top} if any(top == own or _same_project(own, top) for own in plugins) else plugins


@cache
def _same_project(own: str, other: str) -> bool:
    homes = [_home(name) for name in (own, other)]
    if None in homes or other in sys.stdlib_module_names:
        return False
    if homes[0] == homes[1] and not any(homes[0].glob("*.dist-info")):
        return True
    distributions = _distributions()
    return bool(set(distributions.get(own, ())) & set(distributions.get(other, ())))


def _home(name: str) -> Path | None:
    """The folder that a top-level module lies in."""
    origin, folders = _top(name)
    place = folders[0] if folders else origin
    return None if place is None else place.resolve().parent


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


# ---------------------------------------------------------------------------------------------- one file


def _facts_of(file: Path) -> dict[str, Any]:
    """{'syntax': hash, 'imports': [[level, module, name or '', whether its name is used], ...]} of a source file."""
    content = file.read_bytes()
    if file.suffix != ".py":
        return {"syntax": hashlib.sha256(content).hexdigest(), "imports": []}
    tree = _Runtime().visit(ast.parse(content))
    reader = _Imports({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
    tree = reader.visit(tree)
    return {"syntax": hashlib.sha256(ast.dump(tree).encode()).hexdigest(), "imports": reader.imports}


class _Runtime(ast.NodeTransformer):
    """Leaves out docstrings, and what only type checkers read."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return super().generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        if getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING":
            return [self.visit(one) for one in node.orelse] or None
        return self.generic_visit(node)


class _Imports(ast.NodeTransformer):
    """Collects imports, and leaves out of the tree those whose name is not used there: by themselves they make no number."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.imports = names, []

    def visit_Import(self, node: ast.Import) -> Any:
        kept = []
        for alias in node.names:
            used = (alias.asname or alias.name.split(".")[0]) in self.names
            self.imports.append([0, alias.name, "", used])
            kept += [alias] if used else []
        node.names = kept
        return node if kept else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        kept = []
        for alias in node.names:
            used = alias.name == "*" or node.module == "__future__" or (alias.asname or alias.name) in self.names
            self.imports.append([node.level, node.module or "", "" if alias.name == "*" else alias.name, used])
            kept += [alias] if used else []
        node.names = kept
        return node if kept else None
