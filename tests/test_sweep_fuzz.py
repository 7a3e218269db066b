"""Whatever a sweep file holds: it is read, or it is refused in words that name the file and a place. Nothing else happens.

No other exception, no hang, no memory, and nothing written. `python -m pytest tests/test_sweep_fuzz.py` tries 2900 files, the
same ones each time.
"""

import copy
import json
import re
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from harness.api import ConfigError
from harness.storage.fingerprints import cache_folder
from harness.sweep.file import KEYS, MAX_TRIALS, RESERVED, load
from harness.sweep.grid import AXIS
from harness.sweep.resolve import resolve

ROOT = Path(__file__).parent.parent
CPU_SECONDS = 5.0  # against a file that takes minutes; a second was too little on a crowded machine
"""Of one file; processor time, for a busy machine is no fault of the reader."""
SHIPPED = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "sweeps").rglob("*.yaml"))]
WORDS = sorted({*KEYS, *RESERVED, AXIS, "name", "keep_ratio", "stride", "blocks", "num_steps", "dtype", "device", "weights",
                "steps", "threads", "workers", "gpu", "rounds", "split", "adapter",
                "estimator", "ratio_policy", "kees",
                "algorithm", "num_trials", "space", "objectives", "parallel", "choice", "uniform", "log_uniform", "int", "value",
                "when", "cases", "rungs", "reduction_factor", "random", "optuna", "method.name", "method.keep_ratio",
                "train.steps", "budget.flops_cut",
                "../../x", "<<", "", "dense", "sd3", "latency", "emoji"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder; all imports behind `resolve` are made, so that what is opened later is opened by reading."""
    folder = tmp_path_factory.mktemp("fuzz")
    resolve(load(ROOT / "sweeps" / "smoke.yaml"))
    return folder


_watching: list[str] | None = None


def _audit(event, arguments):
    if _watching is None:
        return
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _watching.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.system", "subprocess.Popen",
                   "socket.connect"):
        _watching.append(f"{event} {arguments}")


sys.addaudithook(_audit)


def read(place: Path, content: bytes):
    """The sweep of a file with `content`, or the ConfigError; everything else fails the test."""
    global _watching
    path = place / "s.yaml"
    path.write_bytes(content)
    _watching, began = [], time.process_time()
    try:
        outcome = resolve(load(path))
    except ConfigError as error:
        outcome = error
    finally:
        touched, _watching = _watching, None
    touched = [what for what in touched if str(cache_folder()) not in what]  # hashes of known files are kept there, as docs say
    assert not touched, f"reading a sweep touched {touched}"
    assert time.process_time() - began < CPU_SECONDS
    if isinstance(outcome, ConfigError):
        check_refusal(str(outcome))
    else:
        check_sweep(outcome)
    return outcome


def check_refusal(text: str) -> None:
    """Names the file and, within it, a line or a key; and can be read."""
    assert "s.yaml" in text and len(text) < 3000, text[:300]
    rest = text.partition("s.yaml")[2]
    places = r", line \d+|: not a text file|: larger than|: the file is empty|: expected keys|: unknown key|: \S+"
    assert re.match(places, rest), text


def check_sweep(sweep) -> None:
    """What every valid sweep is."""
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", sweep.name) and ".." not in sweep.name
    assert 1 <= len(sweep.entries) <= MAX_TRIALS
    assert len(set(sweep.trial_ids)) == len(sweep.trial_ids)
    for entry in sweep.entries:
        assert re.fullmatch("[0-9a-f]{12}", entry.trial_id)
        assert json.loads(json.dumps(entry.trial, allow_nan=False)) == entry.trial
        first, last = entry.trial["seeds"]
        assert 0 <= first <= last < 2**63


# ---------------------------------------------------------------------------------------------- mutated sweeps

NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 10**6, 10**12, 2**63, -2**63, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, -0.5,
                           float("nan"), float("inf"), float("-inf")])
TEXTS = st.sampled_from(["", " ", "0-99999999999", "9-3", "0-3", "0-9999999999999999999999", "-5-3", "../../x", "/etc/passwd",
                         "~", ".", "..", "con.", "x/y", "\x00", "\ud800", "é", "5e-1", "yes", "a" * 3000, "{}", "$(id)",
                          "{x!r}", "%s",
                         "\n", "​", "1" * 5000, "2024-01-01", "²-٣"])
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.sampled_from(WORDS))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner,
                                                                                                  max_size=3)), max_leaves=6)
GRIDS = st.builds(lambda values: {AXIS: values}, st.one_of(st.lists(LEAVES, max_size=4), TREES,
                                                           st.just(list(range(60))), st.just([{AXIS: [1, 2]}])))


def paths(tree, path=()):
    """Every place in a tree, the root excepted."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated(draw):
    """A shipped sweep with some of its methods and one to four faults."""
    base = draw(st.sampled_from(SHIPPED))
    methods = draw(st.lists(st.sampled_from(range(len(base["methods"]))), min_size=1, max_size=3))
    tree = copy.deepcopy({**base, "methods": [base["methods"][index] for index in methods]})
    for _ in range(draw(st.integers(1, 4))):
        places = list(paths(tree))
        if not places:
            break
        path = draw(st.sampled_from(places))
        holder, key = at(tree, path[:-1]), path[-1]
        what = draw(st.sampled_from(("replace", "grid", "drop", "add", "misspell", "wrap", "twice")))
        if what == "drop":
            del holder[key]
        elif what == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(WORDS))] = copy.deepcopy(draw(TREES))
        elif what == "misspell" and isinstance(key, str) and key:
            holder[key[:-1] + draw(st.sampled_from("sx _"))] = holder.pop(key)
        elif what == "wrap":
            holder[key] = draw(st.sampled_from((lambda v: [v], lambda v: {AXIS: [v, v]}, lambda v: {"name": v})))(holder[key])
        else:
            holder[key] = copy.deepcopy(draw(GRIDS if what == "grid" else TREES))
    return json.dumps(tree).replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf").encode()


TEXT_BASE = [re.sub(r"(?m)^\s*#.*\n", "", path.read_text()).encode() for path in sorted((ROOT / "sweeps").glob("*.yaml"))]
PIECES = [b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf", b"&a ", b"*a", b"<<: *a\n", b"!!python/object:os.system ", b"!x ", b"{",
          b"}", b"[", b"]", b": ", b"- ", b"\n", b"\n---\n", b"...\n", b"%YAML 9.9\n", b"? ", b"|", b">", b"'", b'"', b"# ",
          b"@", b"`", b",",
          b"0x_", b"\xc2\x85", b"\xe2\x80\xa8", b"\\", b"  ", b"name: s\n", b"!!binary a", b"1:99:99", b".nan", b"~", b"\r",
          b"[[[[[[[["]


@st.composite
def damaged(draw):
    """The text of a shipped sweep with pieces put in, cut out, or put for others."""
    text = draw(st.sampled_from(TEXT_BASE))[:draw(st.integers(300, 1500))]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(st.sampled_from(PIECES)) + text[start + draw(st.integers(0, 12)):]
    return text


WHOLE = st.fixed_dictionaries(
    {"name": st.one_of(TEXTS, st.just("s")), "seeds": st.one_of(LEAVES, st.just(4)), "backbone": st.one_of(st.just("sd3"), TREES),
     "metrics": st.one_of(st.just(["flops"]), TREES), "methods": st.one_of(TREES, st.lists(st.one_of(TREES, st.just("dense")),
                                                                                            max_size=3))},
    optional={key: st.one_of(TREES, GRIDS) for key in KEYS if key not in ("name", "seeds", "backbone", "metrics", "methods")})
METHOD_NAMES = st.sampled_from(["dense", "tomesd", "random_drop"])
OPERANDS = st.one_of(LEAVES, st.lists(st.one_of(NUMBERS, METHOD_NAMES, LEAVES), max_size=3))
CONDITIONS = st.dictionaries(st.sampled_from(["method.name", "method.ffn", "uniform"]), OPERANDS, max_size=2)
PARAMETERS = st.one_of(LEAVES, st.dictionaries(
    st.sampled_from(["choice", "uniform", "log_uniform", "int", "value", "cases", "when"]), st.one_of(OPERANDS, CONDITIONS),
    max_size=2))
SPACES = st.one_of(TREES, st.dictionaries(
    st.sampled_from(["method.name", "method.ffn", "method.keep_ratio", "method.stride", "train.steps", "sampler.num_steps",
                     "budget.flops_cut", "budget.x", "method.label"]), PARAMETERS, max_size=4))
RATIOS = {"method.name": {"choice": ["random_drop", "tomesd"]}, "method.keep_ratio": {"uniform": [0.3, 0.9]}}
SEARCHES = st.fixed_dictionaries(
    {"algorithm": st.sampled_from(["grid", "random", "optuna", "hyperband", 3]), "space": st.one_of(
        SPACES, st.builds(lambda more: {**RATIOS, **more} if isinstance(more, dict) else RATIOS, SPACES))},
    optional={"num_trials": st.one_of(st.integers(1, 20), LEAVES), "seed": st.one_of(st.integers(0, 3), LEAVES),
              "parallel": st.one_of(st.just(2), LEAVES), "sampler": st.sampled_from(["tpe", "nsga2", "", 1]),
              "objectives": st.one_of(TREES, st.just([{"metric": "compute/flops_cut", "direction": "maximize"}]))})
RUNGS = st.one_of(TREES, st.fixed_dictionaries({}, optional={
    "rungs": st.lists(NUMBERS, max_size=3), "reduction_factor": NUMBERS, "metric": TEXTS,
    "synchronous": st.one_of(st.booleans(), NUMBERS, TEXTS)}))


COMMON = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
              phases=(Phase.generate, Phase.shrink))  # without Phase.explain, which traces every line


@settings(max_examples=1100, **COMMON)
@given(content=mutated())
def test_a_sweep_with_faults_is_read_or_refused(place, content):
    read(place, content)


@settings(max_examples=700, **COMMON)
@given(content=damaged())
def test_a_damaged_text_is_read_or_refused(place, content):
    read(place, content)


@settings(max_examples=600, **COMMON)
@given(tree=st.one_of(WHOLE, TREES), style=st.sampled_from((None, True, False)))
def test_a_random_tree_is_read_or_refused(place, tree, style):
    text = yaml.safe_dump(tree, default_flow_style=style, allow_unicode=True)
    read(place, text.encode("utf-8", "surrogatepass"))


@settings(max_examples=500, **COMMON)
@given(search=SEARCHES, rungs=st.one_of(st.none(), RUNGS), method=st.sampled_from(("dense", "shiva")))
def test_a_random_search_is_read_or_refused(place, search, rungs, method):
    tree = {"name": "s", "seeds": 4, "backbone": "sd3", "metrics": ["flops"], "methods": [method], "search": search,
            "train": {"steps": 40, "validate_every": 10}, **({} if rungs is None else {"asha": rungs})}
    read(place, yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------------------------------------- the classics

HEAD = "name: s\nseeds: 4\nbackbone: sd3\nmetrics: [flops]\n"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
RANGE = f"{{{AXIS}: [{', '.join(map(str, range(1, 101)))}]}}"
LONG, MANY = f"[{', '.join('1' * 14000)}]", f"{{{AXIS}: {list(range(1990))}}}"
LISTED = HEAD + f"sampler: {{compile: {LONG}}}\n"
CLASSICS = {
    "billion laughs": (LAUGHS, "anchors"),
    "a loop": (HEAD + "methods: &m [*m]\n", "anchors"),
    "merge key": (HEAD + "methods:\n  - {name: dense, <<: {label: x}}\n", "unknown option '<<'"),
    "python object": (HEAD + "methods: !!python/object/apply:os.system [id]\n", "tags are not possible"),
    "binary": (HEAD + "methods: [{name: dense, label: !!binary aGk=}]\n", "tags are not possible"),
    "brackets": ("[" * 60000, "nested deeper"),
    "braces": ("{a: " * 15000, "nested deeper"),
    "dashes": ("- " * 30000, "nested deeper"),
    "a book": ("# " + "x" * 70000, "larger than"),
    "a number of 60000 digits": (HEAD.replace("4", "9" * 60000) + "methods: [dense]\n", "seeds"),
    "a product": (HEAD + f"sampler: {{num_steps: {RANGE}, batch_size: {RANGE}, guidance_scale: {RANGE}}}\nmethods: [dense]\n",
                  "100 x 100 x 100"),
    "a sum": (HEAD + f"sampler: {{num_steps: {RANGE}}}\nmethods: [{', '.join(['dense'] * 30)}]\n", "more than 2000 trials"),
    "a list in every trial": (LISTED + f"methods: [{{name: random_drop, keep_ratio: {MANY}}}]\n",
                              "1990 x 1"),
    "a text in every trial": (LISTED.replace(LONG, "x" * 50000) + f"methods: [{{name: random_drop, keep_ratio: {MANY}}}]\n",
                              "values together"),
    "a list in every entry": (LISTED + f"methods: [{', '.join(['dense'] * 1000)}]\n",
                              "values together"),
    "a list in every draw": (LISTED + "methods: [dense]\nsearch: {algorithm: random, num_trials: 900, "
                             "space: {method.name: random_drop, method.keep_ratio: {uniform: [0.1, 0.9]}}}\n", "copied for each"),
    "a list in every point": (LISTED + "methods: [dense]\nsearch: {algorithm: grid, space: {method.name: random_drop, "
                              f"method.stride: {{choice: {list(range(199))}}}}}}}\n", "copied for each"),
    "as many seeds as stars": (HEAD.replace("4", "0-99999999999") + "methods: [dense]\n", "at most 1000000"),
    "a count of seeds": (HEAD.replace("4", "99999999999") + "methods: [dense]\n", "at most 1000000"),
    "a seed beyond 64 bits": (HEAD.replace("4", "'9999999999999999999-9999999999999999999'") + "methods: [dense]\n", "seeds"),
    "threads below none": (HEAD + "methods: [dense]\nresources: {threads: -1}\n", "threads must be at least 1"),
    "threads beyond all": (HEAD + "methods: [dense]\nresources: {threads: 1000000000}\n", "at most 4096"),
    "gpu below none": (HEAD + "methods: [dense]\nresources: {gpu: -1}\n", "gpu must not be negative"),
    "a path": (HEAD.replace("name: s", "name: ../../x") + "methods: [dense]\n", "folder name"),
    "a hidden folder": (HEAD.replace("name: s", "name: .cache") + "methods: [dense]\n", "folder name"),
    "a null byte": (HEAD + "methods: [dense]\0\n", "#x0000"),
    "an escaped null byte": (HEAD + 'methods: [{name: dense, label: "a\\0b"}]\n', "control characters"),
    "half a character": (HEAD + 'methods: [{name: dense, label: "\\ud800"}]\n', "control characters"),
    "nan": (HEAD + "methods: [{name: random_drop, keep_ratio: .nan}]\n", "finite"),
    "base sixty": (HEAD + "methods: [{name: random_drop, keep_ratio: 0:31}]\n", "write 31 if that is meant"),
    "base eight": (HEAD.replace("4", "010") + "methods: [dense]\n", "seeds: 010: a number is written in decimal"),
    "infinity as a budget": (HEAD + "methods: [dense]\nbudget: {speedup: .inf}\n", "finite"),
    "a search without end": (HEAD + "methods: [dense]\nsearch: {algorithm: random, num_trials: 1000000000, space: {}}\n",
                             "at most 1000"),
    "a search of nothing": (HEAD + "methods: [dense]\nsearch: {algorithm: random, num_trials: 900, space: {method.name: "
                            "dense}}\n",
                            "draws found no other"),
    "a grid of a search": (HEAD + "methods: [dense]\nsearch: {algorithm: grid, space: {method.name: dense, "
                           + ", ".join(f"sampler.{key}: {{choice: {list(range(1, 201))}}}" for key in "abcd") + "}}\n",
                           "more than 1999 points"),
    "code in a space": (HEAD + "methods: [dense]\nsearch: {algorithm: random, num_trials: 2, space: {method.name: dense, "
                        "method.x: {eval: 1 + 1}}}\n", "unknown operator 'eval'"),
    "two documents": (HEAD + "methods: [dense]\n---\n" + HEAD, "single document"),
}


@pytest.mark.parametrize("case", CLASSICS)
def test_a_classic_is_refused_at_once(place, case):
    text, says = CLASSICS[case]
    outcome = read(place, text.encode())
    assert isinstance(outcome, ConfigError) and says in str(outcome), outcome


def test_what_is_odd_but_clear_is_read(place):
    text = "﻿" + HEAD + "question: 2024-01-01\nmethods: [dense, dense]\n"
    assert len(read(place, text.encode()).entries) == 1
    largest = HEAD + f"sampler: {{num_steps: {RANGE}, batch_size: {{{AXIS}: {list(range(1, 11))}}}}}\nmethods: [dense]\n"
    assert len(read_slow(place, largest)) == 1000


def read_slow(place: Path, text: str) -> list:
    (place / "s.yaml").write_text(text)
    began = time.process_time()
    entries = resolve(load(place / "s.yaml")).entries
    assert time.process_time() - began < 10 * CPU_SECONDS
    return entries
