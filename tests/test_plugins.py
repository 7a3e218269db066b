"""Plug-ins of other packages: a distribution that declares an entry point is known by name, and loaded once."""

import sys

import pytest

from harness.api.registry import ConfigError, Registry


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution with one method and one metric; its module counts how often it was imported."""
    (tmp_path / "their_package.py").write_text(
        "import sys\nsys.their_package_imports = getattr(sys, 'their_package_imports', 0) + 1\n"
        "from their_registries import methods, metrics\n"
        "@methods.register('theirs')\nclass Theirs: Config = None\n")
    (tmp_path / "their_metrics.py").write_text(
        "from their_registries import metrics\n@metrics.register('sharpness')\nclass Sharpness: Config = None\n")
    folder = tmp_path / "their_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[dit_harness.methods]\ntheirs = their_package\n\n"
                                             "[dit_harness.metrics]\nsharpness = their_metrics\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registries = type(sys)("their_registries")
    registries.methods, registries.metrics = Registry("method"), Registry("metric")
    monkeypatch.setitem(sys.modules, "their_registries", registries)
    yield registries
    for name in ("their_package", "their_metrics"):
        sys.modules.pop(name, None)
    del sys.their_package_imports


def test_a_plug_in_is_known_by_name_and_imported_once(installed):
    assert not hasattr(sys, "their_package_imports") or sys.their_package_imports == 0
    assert "theirs" in installed.methods.names() and "sharpness" not in installed.methods.names()
    assert installed.methods.get("theirs").__name__ == "Theirs" and "theirs" in installed.methods.names()
    assert sys.their_package_imports == 1


def test_a_plug_in_is_found_by_the_first_question_of_any_kind(installed):
    assert installed.methods.get("theirs").name == "theirs"
    assert installed.metrics.get("sharpness").name == "sharpness"
    with pytest.raises(ConfigError, match="unknown method 'their'.*theirs"):
        installed.methods.get("their")
