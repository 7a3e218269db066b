"""JSON is read as it says, or refused in one line; nothing else is raised."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.storage import strict_json
from harness.storage.strict_json import MAX_DEPTH, MAX_INT, Unreadable, parse

REFUSED = {
    "nothing": ("", "not JSON"), "half": ('{"a": 1', "not JSON"), "more": ("{} {}", "not JSON"), "NaN": ("[NaN]", "NaN"),
    "infinity": ('{"a": -Infinity}', "Infinity"), "too large a float": ("[1e999]", "a float holds"),
    "too large a float among others": ("[1.0, 1e999, 2.0]", "a float holds"), "65 bits": (f"[{2 * MAX_INT + 2}]", "64 bits"),
    "as a key": ('{"\\ud800": 1}', "half characters"), "half a character": ('["a\\udfff"]', "half characters"),
    "digits": ("9" * 10_000, "not JSON"), "a key twice": ('{"a": {"b": 1, "c": 2, "b": 1}}', "'b' is written twice"),
    "deep": ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested deeper"),
    "deeper than Python": ("[" * 10**6, "nested deeper"),
    "deep mappings": ('{"a":' * 100 + "1" + "}" * 100, "nested deeper")}


@pytest.mark.parametrize("case", REFUSED)
def test_a_trap_is_refused_in_one_line(case):
    text, says = REFUSED[case]
    with pytest.raises(Unreadable) as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


def test_what_python_writes_of_numbers_is_read_where_it_is_asked_for():
    text = json.dumps([float("inf"), [1.0, float("-inf")], MAX_INT, -MAX_INT])
    assert parse(text, nonfinite=True) == json.loads(text)
    assert parse("[NaN]", nonfinite=True)[0] != parse("[NaN]", nonfinite=True)[0]


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-MAX_INT, MAX_INT), st.floats(allow_nan=False, allow_infinity=False),
                   st.text(st.characters(exclude_categories=["Cs"])))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=5), inner)), max_leaves=20)


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES, ascii=st.booleans())
def test_what_python_writes_is_read_as_it_was(tree, ascii):
    assert parse(json.dumps(tree, ensure_ascii=ascii)) == tree


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(content=st.one_of(st.binary(max_size=60), st.text(st.sampled_from('{}[]",:0123456789.eE-+ \\untrfalsNI\ufeff'),
                                                              max_size=40).map(str.encode)))
def test_any_bytes_are_read_or_unreadable(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "a.json"
    path.write_bytes(content)
    try:
        json.dumps(strict_json.read(path), allow_nan=False).encode()
    except Unreadable as error:
        assert str(error)


def test_what_is_no_file_is_unreadable_and_a_missing_file_is_missing(tmp_path):
    for wrong in (tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(Unreadable):
            strict_json.read(wrong)
    with pytest.raises(FileNotFoundError):
        strict_json.read(tmp_path / "none.json")
