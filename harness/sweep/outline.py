"""What the classes behind the names accept, read from their source: options are checked before torch is imported.

Of a module only what its options need is kept: the classes with their `Config` and plain attributes, dataclasses, functions,
constants, and imports that cost nothing. It is the same source that the real check runs a moment later, so it can only say the
same; where it needs something that was left out, it says nothing. (`tests/test_outline.py` compares all of them.)
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.abc
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.api.registry import ConfigError, Registry

ROOT = Path(__file__).parents[2]
_PREFIX = "_outline."
_LIGHT = ("harness.api", "harness.api.registry")
"""Modules of ours that import nothing heavy: taken as they are."""
_REGISTERED = re.compile(r'^@([A-Z]+)\.register\("([^"]+)"\)', re.MULTILINE)
_PLACES = {"METHODS": "methods", "BACKBONES": "harness/backbones", "METRICS": "harness/metrics"}


class CannotTell(Exception):
    """Only the class itself knows."""


class Outlines(Registry):
    """A registry of outlines, with the names of `real`. What is registered there already is taken from there."""

    def __init__(self, group: str, real: Registry) -> None:
        super().__init__(real.kind)
        self._real = real
        self._classes = _Lazy(_files(group), real._classes)  # type: ignore[assignment]

    def get(self, name: str, where: str = "") -> type:
        """The outline. Raises CannotTell for a name that a plug-in may bring."""
        if name not in self._classes and self._real.has_plugins():
            raise CannotTell
        found = super().get(name, where)
        if getattr(found, "Config", None) is None:
            raise CannotTell
        return found

    def config(self, name: str, options: Mapping[str, Any], where: str = "") -> Any:
        """The checked options. Raises CannotTell where that needs more than the outline."""
        try:
            return super().config(name, options, where)
        except (ConfigError, CannotTell):
            raise
        except Exception:  # what it needs was left out; the class itself will say what is wrong, if anything is
            raise CannotTell from None

    def _load_plugins(self) -> None:
        """Never: they may import anything."""


class _Lazy(dict):
    """Name -> class, made when it is asked for."""

    def __init__(self, files: Mapping[str, str], known: Mapping[str, type]) -> None:
        super().__init__({**files, **known})

    def __getitem__(self, name: str) -> type:
        found = super().__getitem__(name)
        if isinstance(found, str):
            kept = (cls for cls in vars(outline(found)).values() if isinstance(cls, type) and vars(cls).get("name") == name)
            found = next(kept, None)
            if found is None:
                raise CannotTell
            self[name] = found
        return found


@cache
def _files(group: str) -> dict[str, str]:
    """{registered name: module} of a folder of ours, by the decorators in its files."""
    found = {}
    for file in sorted((ROOT / _PLACES[group]).rglob("*.py")):
        for registry, name in _REGISTERED.findall(file.read_text(encoding="utf-8")):
            if registry == group:
                found[name] = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return found


# ---------------------------------------------------------------------------------------------- modules


def outline(name: str) -> ModuleType:
    """The outline of a module of ours, made once. It is no module of that name, and imports none of ours that is heavy."""
    if _PREFIX + name in sys.modules:
        return sys.modules[_PREFIX + name]
    place = ROOT / name.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    spec = importlib.util.spec_from_loader(_PREFIX + name, _Loader(file), origin=str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and type hints look names up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise CannotTell from error
    return module


class _Loader(importlib.abc.InspectLoader):
    """Loads what is kept of a file, past Python's cache of compiled modules, which is the real module's."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get_source(self, fullname: str) -> str:
        """The kept statements; what they import was put into the module before."""
        known = vars(sys.modules[fullname])
        kept = list(_kept(_Unannotated().visit(ast.parse(self.file.read_text(encoding="utf-8"))), known))
        return ast.unparse(ast.fix_missing_locations(ast.Module(kept, [])))

    def is_package(self, fullname: str) -> bool:
        """Never: nothing is imported from it."""
        return False


class _Unannotated(ast.NodeTransformer):
    """Functions without annotations, which may name what is left out."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Arguments and result."""
        spec = node.args
        for argument in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))):
            argument.annotation = None
        node.returns = None
        self.generic_visit(node)
        return node


def _kept(tree: ast.Module, known: dict[str, Any]) -> Iterator[ast.stmt]:
    """The statements of a module that can be run with `known` and each other; imported names are put into `known`."""
    names = {*vars(builtins), *known}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _import(node, known)
            names |= known.keys()
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                yield node
        elif isinstance(node, ast.ClassDef):
            pruned = node if _is_dataclass(node) else _bare(node, names)
            pruned.bases = [base for base in pruned.bases if _needs(base) <= names]
            if _needs(pruned) <= names:
                names.add(node.name)
                yield pruned
        elif isinstance(node, ast.FunctionDef) and _needs(node) <= names:
            names.add(node.name)  # if its body needs what is left out, asking it tells nothing
            yield node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _needs(node) <= names:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            yield node


def _import(node: ast.Import | ast.ImportFrom, known: dict[str, Any]) -> None:
    """Put what an import gives into `known`: of the standard library, of light modules, and of outlines of ours."""
    for alias in node.names:
        source = node.module if isinstance(node, ast.ImportFrom) else alias.name
        root = str(source).split(".")[0]
        if root in sys.stdlib_module_names or str(source).startswith(_LIGHT):
            module: Any = importlib.import_module(str(source))
        elif root in ("harness", "methods") and isinstance(node, ast.ImportFrom):
            module = outline(str(source))
        else:
            continue
        if isinstance(node, ast.Import):
            known[alias.asname or root] = module if alias.asname else sys.modules[root]
        elif hasattr(module, alias.name):
            known[alias.asname or alias.name] = getattr(module, alias.name)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _bare(node: ast.ClassDef, names: set[str]) -> ast.ClassDef:
    """A class with its plain attributes and its Config alone; a registered one with its name."""
    body: list[ast.stmt] = []
    for part in node.body:
        config = isinstance(part, ast.ClassDef) and part.name == "Config"
        if (config or isinstance(part, ast.Assign | ast.AnnAssign)) and _needs(part) <= names:
            body.append(part)
        elif config:
            body += ast.parse("Config = None").body
    for decorator in node.decorator_list:
        found = _REGISTERED.match(f"@{ast.unparse(decorator)}".replace("'", '"'))
        if found:
            body += ast.parse(f"name = {found[2]!r}").body
    return ast.ClassDef(node.name, list(node.bases), [], body or [ast.Pass()], [], **_no_type_parameters())


def _no_type_parameters() -> dict[str, Any]:
    return {"type_params": []} if sys.version_info >= (3, 12) else {}


def _needs(node: ast.AST) -> set[str]:
    """Names that running a statement reads: of a function its decorators and defaults, of a class all but its own names."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        outside = [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
        return set().union(*map(_needs, outside))
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    read = set().union(*map(_needs, ast.iter_child_nodes(node)))
    if isinstance(node, ast.ClassDef):
        return read - {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    bound = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return read - bound if isinstance(node, ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp) else read


def options_of(module: str, name: str) -> type:
    """The dataclass `name` of a module. Raises CannotTell where it could not be kept."""
    found = getattr(outline(module), name, None)
    if not isinstance(found, type):
        raise CannotTell
    return found
