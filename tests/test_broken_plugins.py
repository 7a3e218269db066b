"""A broken plug-in stops nobody who does not use it, and is named with its distribution where it is used."""

from types import SimpleNamespace

import pytest

from harness.api import ConfigError, Registry, registry


def entry(name: str, load) -> SimpleNamespace:
    """An entry point of a package."""
    return SimpleNamespace(name=name, value=f"pack.{name}", load=load, dist=SimpleNamespace(name="pack", version="1.2"))


@pytest.fixture
def plugged(monkeypatch):
    """A registry with a method of ours, a good plug-in and two broken ones."""
    made = Registry("method")
    made.register("ours")(type("Ours", (), {}))

    def broken():
        raise ImportError("no module named 'gone'")

    def leave():
        raise SystemExit(1)

    entries = [entry("wrecked", broken), entry("quitting", leave),
               entry("good", lambda: made.register("good")(type("Good", (), {})))]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == "dit_harness.methods" else [])
    return made


def test_a_broken_plugin_does_not_stop_what_does_not_use_it(plugged):
    assert plugged.names() == ["good", "ours"]
    assert plugged.get("ours").name == "ours" and plugged.get("good").name == "good"


def test_a_broken_plugin_that_is_used_is_named_with_its_distribution(plugged):
    said = r"methods\[0\]: method 'wrecked' cannot be used: plug-in 'wrecked' \(pack.wrecked\) of pack 1.2 cannot be loaded "
    with pytest.raises(ConfigError, match=said + r"\(ImportError: no module named 'gone'\); mend, update or uninstall it"):
        plugged.get("wrecked", "s.yaml: methods[0]")


def test_an_unknown_name_says_which_plugins_are_missing(plugged):
    with pytest.raises(ConfigError, match=r"'other'.*Known: good, ours\. Not among them: plug-in 'wrecked'.*quitting"):
        plugged.get("other")
