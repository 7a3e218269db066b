"""The suite itself: what a developer runs all the time starts nothing heavy, and every failure can be told."""

import ast
import re
from pathlib import Path

import pytest
from conftest import printable

HERE = Path(__file__).parent
STARTS = re.compile(r"Popen\(|mlflow_server\(|with server\(|SIGKILL|os\._exit|ray\.init|cluster_utils"
                    r"|execution\.pool import Cluster|CHROMIUM|\.kill\(\)|run_sweep\(sys\.argv|multiprocessing\.spawn|_CONNECT")
FILES = sorted(path.name for path in HERE.glob("test_*.py") if path != Path(__file__))


def parts_of(path: Path) -> dict[str, ast.stmt]:
    """Name -> statement, of what is defined or assigned at the top level of a file."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        found |= dict.fromkeys([node.name] if hasattr(node, "name") else targets, node)
    return found


def used_by(node: ast.stmt) -> set[str]:
    """The names that a statement reads, and its arguments, which may be fixtures."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} \
        | {one.arg for one in ast.walk(node) if isinstance(one, ast.arg)}


@pytest.mark.parametrize("file", FILES)
def test_what_starts_processes_that_are_killed_or_serve_is_marked(file):
    """What a test uses of its file counts as its own, so that a helper or a script in a string is seen too."""
    parts = parts_of(HERE / file)
    for name, node in parts.items():
        if not name.startswith("test_") or "mark.processes" in ast.unparse(node):
            continue
        used, open_ends = {name}, [name]
        while open_ends:
            more = used_by(parts[open_ends.pop()]) & set(parts) - used
            used |= more
            open_ends += more
        found = [part for part in used if STARTS.search(ast.unparse(parts[part]))]
        assert not found, f"{file}: {name} starts processes by way of {', '.join(found)}: give it @pytest.mark.processes"


def test_a_report_that_holds_no_utf_8_is_told_with_escapes():
    report = {"longrepr": ("a \udce9", [None, 3, {"\udcff": True}]), "when": "call"}
    assert printable(report) == {"longrepr": ("a \\udce9", [None, 3, {"\\udcff": True}]), "when": "call"}
