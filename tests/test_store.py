"""The store never hands out what it cannot vouch for, and never computes a thing twice."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.storage import store as store_module
from harness.storage.store import Store, content_key


def _writer(text: str, calls: list[str]):
    def make(folder: Path) -> None:
        calls.append(text)
        (folder / "value.txt").write_text(text)

    return make


def test_a_complete_entry_is_returned_without_making_it_again(tmp_path):
    store, calls = Store(tmp_path), []
    first = store.get_or_make("thing", {"a": 1}, _writer("x", calls))
    again = store.get_or_make("thing", {"a": 1}, _writer("y", calls))
    assert first == again and (again / "value.txt").read_text() == "x" and calls == ["x"]
    assert store.has("thing", {"a": 1}) and not store.has("thing", {"a": 2}) and not store.has("other", {"a": 1})


def test_the_key_ignores_the_order_of_inputs_and_nothing_else():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert content_key({"a": 1}) != content_key({"a": "1"})
    assert content_key({"a": [1, 2]}) != content_key({"a": [2, 1]})


def test_a_maker_that_fails_leaves_no_entry(tmp_path):
    store = Store(tmp_path)

    def broken(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        store.get_or_make("thing", {"a": 1}, broken)
    assert not store.has("thing", {"a": 1})
    assert [p for p in (tmp_path / "thing").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "inputs", "foreign"])
def test_a_damaged_entry_is_computed_again_with_a_warning(tmp_path, caplog, damage):
    store, calls = Store(tmp_path), []
    entry = store.get_or_make("thing", {"a": 1}, _writer("good", calls))
    if damage == "truncate":
        (entry / "value.txt").write_text("go")
    elif damage == "remove":
        (entry / "value.txt").unlink()
    elif damage == "inputs":
        (entry / "inputs.json").write_text("{")
    else:
        text = (entry / "inputs.json").read_text()
        (entry / "inputs.json").write_text(text.replace('"a": 1', '"a": 2'))
    assert not store.has("thing", {"a": 1})
    with caplog.at_level(logging.WARNING):
        store.get_or_make("thing", {"a": 1}, _writer("good", calls))
    assert calls == ["good", "good"] and store.has("thing", {"a": 1})
    assert "computed again" in caplog.text


@pytest.mark.processes
def test_a_killed_maker_leaves_nothing_that_counts(tmp_path):
    program = ("import os, pathlib, sys\nfrom harness.storage.store import Store\n"
               "def make(folder):\n    (folder / 'value.txt').write_text('half')\n    os._exit(9)\n"
               "Store(pathlib.Path(sys.argv[1])).get_or_make('thing', {'a': 1}, make)\n")
    root = Path(store_module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == 9
    store, calls = Store(tmp_path), []
    assert not store.has("thing", {"a": 1})
    store.get_or_make("thing", {"a": 1}, _writer("whole", calls))
    assert calls == ["whole"]
    assert [p.name for p in (tmp_path / "thing").iterdir() if p.is_dir()] == [content_key({"a": 1})]


def test_the_same_key_asked_for_twice_at_once_is_made_once(tmp_path):
    store, calls, results = Store(tmp_path), [], []

    def slow(folder: Path) -> None:
        calls.append("made")
        time.sleep(0.2)
        (folder / "value.txt").write_text("x")

    threads = [threading.Thread(target=lambda: results.append(store.get_or_make("thing", {"a": 1}, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["made"] and len(set(results)) == 1 and len(results) == 4


def test_inputs_that_are_not_json_are_refused(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        Store(tmp_path).get_or_make("thing", {"a": {1, 2}}, lambda folder: None)
    with pytest.raises(ValueError):
        Store(tmp_path).get_or_make("thing", {"a": float("nan")}, lambda folder: None)
