"""Numbers of a sweep file are those that its reader sees: decimal, or refused with the decimal form."""

import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.api import ConfigError
from harness.sweep.yaml import parse

SWEEPS = sorted((Path(__file__).parent.parent / "sweeps").rglob("*.yaml"))
READ = {"0": 0, "12": 12, "-7": -7, "-0": 0, "0.5": 0.5, "-1.25": -1.25, "1e-3": 0.001, "1E5": 1e5, "2.5e+3": 2500.0, "1e5": 1e5,
        "-0.0": -0.0, "true": True, "False": False, "null": None, "~": None, "0-63": "0-63", "2024-01-01": "2024-01-01", "y": "y",
        "n": "n", "1.2.3": "1.2.3", "1:99": "1:99", "v1": "v1", "'010'": "010", '"yes"': "yes", "'1:31'": "1:31", "١٢": "١٢",
        "_1": "_1"}
REFUSED = {"1:31": "91", "010": "8", "0x20": "32", "4:30.5": "270.5", "1_000": "1000", "0b11": "3", "0o17": "15", "+1": "1",
           ".5": "0.5", "1.": "1.0", "-010": "-8", "-1:30": "-90", "16:9": "969", "1:00:00": "3600", "09": "9", "00": "0",
           "+.5e+1": "5.0", "1.e3": "1000.0", "1_0.5": "10.5", ".inf": "finite", "-.INF": "finite", ".NaN": "finite",
           "yes": "true", "No": "false", "ON": "true", "off": "false", "0x_": "decimal"}


@pytest.mark.parametrize("text", READ)
def test_what_is_written_plainly_is_read(text):
    value = parse(f"a: {text}", "s.yaml")["a"]
    assert value == READ[text] and type(value) is type(READ[text])


@pytest.mark.parametrize(("form", "place"), [("x: 1\na: {}", "a"), ("x: 1\na: [1, {}]", "a[1]"), ("a:\n  - b: {}", "a[0].b")])
@pytest.mark.parametrize("text", REFUSED)
def test_a_number_in_disguise_is_refused_with_its_decimal_form(text, form, place):
    with pytest.raises(ConfigError) as error:
        parse(form.format(text), "s.yaml")
    head, _, remedy = str(error.value).partition(f": {text}: ")
    assert head == f"s.yaml, line 2: {place}" and REFUSED[text] in remedy and "quotes" in remedy


@pytest.mark.parametrize("text", REFUSED)
def test_a_key_is_no_number_in_disguise(text):
    with pytest.raises(ConfigError, match="line 1.*is no text; put it in quotes"):
        parse(f"{text}: 1", "s.yaml")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_a_shipped_sweep_means_what_yaml_says(path):
    text = path.read_text(encoding="utf-8")
    assert parse(text, str(path)) == yaml.safe_load(text)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from("0123456789_.:+-eExXoObB" + "ainfysn"), min_size=1, max_size=12))
def test_no_plain_text_becomes_another_number_than_it_says(text):
    try:
        value = parse(f"a: {text}", "s.yaml")["a"]
    except ConfigError:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert set(text) <= set(string.digits + "-+.eE") and value == float(text)
    else:
        try:
            theirs = yaml.safe_load(f"a: {text}")["a"]
        except ValueError:  # such as 0b_, which PyYAML cannot read either
            return
        assert not isinstance(theirs, int | float) or value is theirs, "YAML takes it for a number: it must be refused"
