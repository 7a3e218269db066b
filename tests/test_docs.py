"""What the documents name exists: paths, modules and their names, links, commands and their options, targets of make."""

import ast
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
from test_layers import LAYERS

from harness.storage.code_hash import OUTSIDE

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT) for pattern in ("README.md", "docs/*.md", "results/README.md", "harness/**/*.md")
               for path in ROOT.glob(pattern))
OTHERS = sorted(path.relative_to(ROOT) for pattern in ("sweeps/**/*.yaml", "Makefile", "pyproject.toml", ".ci/run")
                for path in ROOT.glob(pattern))
CODE = sorted(path.relative_to(ROOT) for pattern in ("harness/**/*.py", "methods/**/*.py", "tests/**/*.py")
              for path in ROOT.glob(pattern))
TEXTS = [*PAGES, *OTHERS, *CODE]
MADE_BY_RUNS = {"sweep.yaml"}
"""Files that a text names and that lie in no checkout."""
PATHS = re.compile(r"(?<![\w./<>~$-])(?:harness|methods|tests|sweeps|docs|results/published)/[\w./*$<>{}-]*[\w*>}]")
MODULES = re.compile(r"(?<![\w./-])(?:harness|methods)(?:\.\w+)+")
LINKS = re.compile(r"\]\(([^)\s]+)\)")
COMMANDS = re.compile(r"(?:python3?|-)\s+-?m (harness[\w.]*)([^`\n#|;]*)|python -m (pytest)([^`\n#|;]*)")
FILES = re.compile(r"`([\w./-]+\.(?:py|yaml))`")
COLUMNS = re.compile(r"columns?\s+\*([^*]+)\*(?:\s+and\s+\*([^*]+)\*)?")
WITH_SUBCOMMANDS = ("harness.bench", "harness.study")


@cache
def text_of(file: Path) -> str:
    """All of a page; of code its comments and docstrings, and of what is no test its messages too."""
    if file.suffix != ".py":
        return (ROOT / file).read_text(encoding="utf-8")
    with open(ROOT / file, "rb") as lines:
        comments = [token.string for token in tokenize.tokenize(lines.readline) if token.type == tokenize.COMMENT]
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    nodes = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)] if file.parts[0] == "tests" else ast.walk(tree)
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join([*comments, *strings])


def exists(path: str) -> bool:
    """Whether something lies at a path of the tree; '<name>', '$name', 'NAME' and '*' stand for anything."""
    pattern = re.sub(r"<[^>]*>|\$\w+|\{\w*\}|NAME|FAMILY", "*", path)
    return any(True for _ in ROOT.glob(pattern))


@cache
def bound(file: Path) -> dict[str, ast.AST]:
    """Names that a module or a class binds at its top."""
    return names_in(ast.parse(file.read_text(encoding="utf-8")))


def names_in(body: ast.AST) -> dict[str, ast.AST]:
    """Names bound in the body of a module or class."""
    found: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.If | ast.Try):
            found |= names_in(node)
    return found


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or a name in one, or a member of a class in one."""
    place, parts = ROOT, dotted.split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if parts and (place / f"{parts[0]}.py").is_file():
        file = place / f"{parts.pop(0)}.py"
    else:
        file = place / "__init__.py"
    if not parts:
        return True
    node = bound(file).get(parts[0]) if file.is_file() else None
    return node is not None and (len(parts) == 1 or not isinstance(node, ast.ClassDef) or parts[1] in names_in(node))


@pytest.mark.parametrize("file", TEXTS, ids=str)
def test_every_path_and_module_that_a_text_names_exists(file):
    text = text_of(file)
    lost = [path for path in PATHS.findall(text) if not exists(path.rstrip("."))]
    lost += [name for name in MODULES.findall(text) if not resolves(name)
             and not name.endswith((".example", ".py", ".git")) and not exists(name)]
    lost += [name for name in FILES.findall(text) if name not in MADE_BY_RUNS and not (ROOT / file.parent / name).exists()
             and not any(f"/{known}".endswith(f"/{name}") for known in (*CODE, *OTHERS))]
    assert not lost, f"{file} names what is not there: {sorted(set(lost))}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=str)
def test_every_column_that_a_page_names_has_a_heading_of_that_name(page):
    rooms = ("reporting", "study", "metrics", "storage")
    sources = "".join((ROOT / file).read_text(encoding="utf-8") for file in CODE if file.parts[1] in rooms)
    named = {" ".join(name.split()) for found in COLUMNS.findall(text_of(page)) for name in found if name}
    lost = {name for name in named if f'"{name}"' not in sources}
    assert not lost, f"{page} names columns that no table has: {lost}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_relative_link_of_a_page_leads_somewhere(page):
    lost = []
    for link in LINKS.findall(text_of(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost, f"{page}: links that lead nowhere: {lost}"


def arguments_of(command: str) -> str:
    """The source in which a command reads its arguments: its own, its package's, and what it imports of ours; '' for none."""
    file = ROOT / command.replace(".", "/")
    files = [*file.glob("*.py")] if (file / "__main__.py").is_file() else [file.with_suffix(".py")]
    if not files[0].is_file():
        return ""
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    used = [ROOT / f"{name.replace('.', '/')}.py" for name in re.findall(r"^from (harness[\w.]+) import", text, re.MULTILINE)]
    return text + "".join(path.read_text(encoding="utf-8") for path in used if path.is_file())


def unknown_in(command: str, rest: str) -> list[str]:
    """Words behind `python -m command` that it does not know."""
    known = arguments_of(command)
    if not known:
        return [command]
    lost = [option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest) if f'"{option}"' not in known]
    name = re.match(r"\s+([a-z][\w-]*)", rest)
    if command in WITH_SUBCOMMANDS and name and f'"{name[1]}"' not in known:
        lost.append(name[1])
    return [f"{command} {word}" for word in lost]


@pytest.mark.parametrize("file", TEXTS, ids=str)
def test_every_command_that_a_text_names_is_there_with_its_options(file):
    lost = []
    for command, rest, _, tests in COMMANDS.findall(text_of(file)):
        lost += unknown_in(command.rstrip("."), rest) if command else []
        lost += [name for name in re.findall(r"tests/\w+\.py", tests) if not (ROOT / name).is_file()]
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {word for target in targets for word in target.split()}
    lost += [f"make {name}" for name in re.findall(r"(?:^|`)make ([\w-]+)", text_of(file), re.MULTILINE) if name not in targets]
    assert not lost, f"{file} names commands or options that are not there: {lost}"


def test_the_number_of_fuzzed_sweep_files_is_the_one_that_pages_name():
    tried = sum(map(int, re.findall(r"max_examples=(\d+)", (ROOT / "tests/test_sweep_fuzz.py").read_text(encoding="utf-8"))))
    named = [(str(page), number) for page in PAGES
             for number in re.findall(r"([\d,]+) (?:bad|generated sweep) files", text_of(page))]
    assert named and {number for _, number in named} == {f"{tried:,}"}, f"{tried} are tried; pages say {named}"


def test_the_table_of_rooms_is_the_one_that_the_layers_are_tested_by():
    page = text_of(Path("docs/architecture.md"))
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", page[page.index("| room |"):], re.MULTILINE)
    written = [(room, " ".join(re.findall(r"`(\w+)`", names))) for room, names in rows]
    assert written == list(LAYERS.items()), "docs/architecture.md, The rooms: not the table of tests/test_layers.py"
    for place, (room, names) in enumerate(written):
        assert set(names.split()) <= {above for above, _ in written[:place]}, f"{room} imports from a room below it"


def test_the_pages_name_all_code_that_changes_no_number():
    page = text_of(Path("results/README.md"))
    lost = [name for name in OUTSIDE if f"`{name}`" not in page]
    assert not lost, f"results/README.md, What a result rests on: says nothing of {lost}"


@pytest.mark.parametrize("kind, page", [("METHODS", "methods"), ("METHODS", "backbones"), ("BACKBONES", "backbones"),
                                        ("METRICS", "metrics"), ("DATASETS", "data")])
def test_every_name_of_the_registries_is_on_its_page(kind, page):
    sources = "".join((ROOT / file).read_text(encoding="utf-8") for file in CODE if file.parts[0] != "tests")
    text = text_of(Path(f"docs/{page}.md"))
    lost = [name for name in re.findall(rf'@{kind}\.register\("(\w+)"\)', sources) if f"`{name}`" not in text]
    assert not lost, f"docs/{page}.md says nothing of {lost}"


def test_the_readme_stays_short_and_those_of_the_embedded_models_are_as_their_templates():
    assert len(text_of(Path("README.md")).split()) <= 900
    for template in (ROOT / "harness" / "embedded").glob("*_readme.md"):
        made = (template.with_name(template.stem.removesuffix("_readme")) / "README.md").read_text(encoding="utf-8").splitlines()
        lost = [line for line in template.read_text(encoding="utf-8").splitlines() if "$" not in line and line not in made]
        assert not lost, f"{template.name} says what the model's README does not: {lost}"
