"""report.html holds what the rows hold, needs no network, trusts no text; several sweeps are merged without mixing protocols."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_results import SHIVA, fake_result, make_seeded_sweep, make_sweep, write_result
from PIL import Image

from harness.api import ConfigError
from harness.reporting import html, page_data
from harness.reporting.html import inline, page
from harness.reporting.merge import merge
from harness.reporting.page_data import pictures_data, rows_data
from harness.reporting.report import main, write_merged, write_report
from harness.reporting.rows import load_sweep

HOSTILE = "</script><img src=x onerror=alert(1)> **a `b** c` | d"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """A page's text, addresses, tags in order, and the JSON of its parts; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.tags, self.handlers, self.data, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "poster", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        tag, attrs = self.open[-1] if self.open else ("", {})
        if tag == "script" and attrs.get("type") == "application/json":
            self.data.append(json.loads(data))
        elif tag not in ("script", "style"):
            self.text += data


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep over training seeds with its report: read, never changed."""
    folder = tmp_path_factory.mktemp("results") / "policy"
    make_seeded_sweep(folder, images=6)
    write_report(folder)
    return folder


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr("harness.reporting.report._figures", lambda *sweeps: set())


def small(folder: Path, results: list[dict], question: str = "Which?") -> Path:
    """A results folder of `results`, labelled as they are."""
    folder.mkdir(parents=True)
    for result in results:
        write_result(folder, {**result, "sweep": folder.name})
    header = {"name": folder.name, "trial_ids": [r["trial_id"] for r in results], "question": question,
              "labels": {r["trial_id"]: r["label"] for r in results}}
    (folder / "sweep.json").write_text(json.dumps(header), encoding="utf-8")
    return folder


def changed(result: dict, **groups) -> dict:
    """The result of another trial: with groups of the trial replaced, and so another id."""
    new_id = hashlib.sha256(json.dumps([result["trial_id"], groups], sort_keys=True).encode()).hexdigest()[:12]
    return {**result, "trial": {**result["trial"], **groups}, "trial_id": new_id}


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_and_asks_nothing_of_a_network(finished):
    shown = read(finished)
    assert shown.addresses and all(address.startswith(("data:image/", "#")) for address in shown.addresses)
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    assert not shown.handlers and len(text) < 8_000_000


def test_the_page_says_what_the_markdown_says(finished):
    shown = " ".join(read(finished).text.split())
    for line in (finished / "report.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(("- ", "## ")):
            assert " ".join(re.sub(r"[*`#]|^- ", "", line).split()) in shown
    assert "What the paper says" in shown and "Protocol" in shown


def test_its_links_lead_somewhere(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    for anchor in re.findall(r'href="#([^"]+)"', text):
        assert f'id="{anchor}"' in text


def test_its_data_equals_the_rows(finished):
    from harness.reporting.seeds import over_seeds

    data, sweep = read(finished).data[0], over_seeds(load_sweep(finished))
    assert {row["id"] for row in data["rows"]} == {row.trial_id for row in sweep.rows}
    for row in sweep.rows:
        mine = next(one for one in data["rows"] if one["id"] == row.trial_id)
        assert mine["label"] == row.label and mine["method"] == row.method
        assert set(mine["values"]) == {name for name in sweep.metrics if row.value(name) is not None}
        for name, found in mine["values"].items():
            assert found["value"] == row.value(name)
            assert (found["interval"] and tuple(found["interval"])) == row.interval(name)
            assert (found["spread"] and tuple(found["spread"])) == row.spread(name)
        if mine["kept"]:
            np.testing.assert_allclose(mine["kept"], row.result["executed"]["kept_attention"], atol=6e-4)
    assert any(row["kept"] for row in data["rows"])


def test_what_was_measured_otherwise_is_in_another_set(tmp_path):
    make_sweep(tmp_path / "a", artifacts=False)
    path = next(p for p in sorted((tmp_path / "a").glob("*.json")) if "tomesd" in p.read_text())
    result = json.loads(path.read_text())
    name = next(key for key in result["metrics"] if key.startswith("fidelity/fd"))
    result["environment"]["score"][name] = {"reference_id": "another"}
    path.write_text(json.dumps(result))
    rows = rows_data(load_sweep(tmp_path / "a"))["rows"]
    assert {row["values"][name]["set"] for row in rows if row["id"] != result["trial_id"]} == {0}
    assert next(row for row in rows if row["id"] == result["trial_id"])["values"][name]["set"] == 1


def test_hostile_text_stays_text(tmp_path):
    folder = tmp_path / "hostile"
    results = make_sweep(folder, images=3)
    for result in results[:3]:
        result["label"] = HOSTILE + result["trial_id"]
        path = folder / result["artifacts"]["images"]
        with np.load(path) as arrays:
            np.savez(path, images=arrays["images"], seeds=arrays["seeds"], prompts=np.array([HOSTILE] * 3))
        write_result(folder, result)
    broken = {**results[3], "status": "failed", "metrics": {}, "label": HOSTILE, "error": {
        "job": "score", "type": "ValueError", "message": HOSTILE, "traceback": f"line\n{HOSTILE}\nValueError"}}
    write_result(folder, broken)
    write_report(folder)
    shown = read(folder)  # tags nest, so nothing broke out of its place
    assert shown.tags.count("img") == (folder / "report.html").read_text().count("<img src=\"data:") and not shown.handlers
    assert "</script><img src=x onerror=alert(1)>" in shown.text
    assert shown.data[0]["rows"][0]["label"] == results[0]["label"]
    assert shown.data[0]["pictures"]["prompts"] == [HOSTILE] * 3
    assert "Trials that are not whole" in shown.text and f"line\n{HOSTILE}\nValueError" in shown.text


@pytest.mark.parametrize("text", ["**a `b** c` d**", "*a **b* c**", "`**`**`", "***", "a * b * c", "\0000\0", "*a `x* y` b*"])
def test_inline_tags_never_cross(text):
    shown = Page(f"<p>{inline(text)}</p>")
    assert shown.text.replace("*", "").replace("`", "") == text.replace("*", "").replace("`", "").replace("\0", "")


# ---------------------------------------------------------------------------------------------- pictures


def test_small_pictures_are_embedded_without_loss(finished):
    found, sweep = read(finished).data[0]["pictures"], load_sweep(finished)
    assert found["of"] == 6 and found["lossless"] and len(found["seeds"]) == 6
    row = next(row for row in sweep.rows if row.method == "random_drop")
    with np.load(finished / row.result["artifacts"]["images"]) as arrays:
        for index, uri in enumerate(found["rows"][row.trial_id]):
            picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
            np.testing.assert_array_equal(np.asarray(picture), arrays["images"][index])
            assert found["prompts"][index] == str(arrays["prompts"][index])


@pytest.mark.parametrize("cap", [0, 5_000, 60_000, 200_000])
def test_pictures_keep_to_their_cap_and_say_how_many_they_are(finished, cap):
    found = pictures_data(load_sweep(finished), cap)
    uris = [uri for mine in found["rows"].values() for uri in mine]
    assert sum(map(len, uris)) <= cap and found["of"] == 6
    assert all(len(mine) == len(found["seeds"]) == len(found["prompts"]) for mine in found["rows"].values())
    assert bool(uris) == (cap >= 60_000)


def test_large_pictures_become_thumbnails(finished, monkeypatch):
    monkeypatch.setattr(page_data, "LOSSLESS_SIDE_PX", 32)
    monkeypatch.setattr(page_data, "THUMBNAIL_SIDE_PX", 40)
    found = pictures_data(load_sweep(finished), 1_000_000)
    uri = next(iter(found["rows"].values()))[0]
    assert uri.startswith("data:image/jpeg;base64,") and not found["lossless"] and found["side"] == 40
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (40, 40)


def test_a_page_keeps_to_its_size_and_names_what_it_leaves_out(finished, monkeypatch):
    monkeypatch.setattr(html, "FIGURES_BYTES", 10)
    monkeypatch.setattr(html, "PAGE_BYTES", 200_000)
    write_report(finished)
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert len(text) <= 200_000 and "training.png is left out" in text and "data:image/jpeg;base64," in text
    monkeypatch.undo()
    write_report(finished)


# ---------------------------------------------------------------------------------------------- several sweeps


def results_of(*variants, images=24):
    return [fake_result("x", method, cut, images) for method, cut in variants]


DENSE, DROP, TOME = ({"name": "dense"}, None), ({"name": "random_drop"}, 0.41), ({"name": "tomesd"}, 0.41)


def test_an_equal_trial_of_two_sweeps_is_one_row(tmp_path, without_figures):
    dense, drop, tome = results_of(DENSE, DROP, TOME)
    a, b = small(tmp_path / "a", [dense, drop]), small(tmp_path / "b", [dense, tome], "And that?")
    (merged,) = merge([a, b], tmp_path / "out")
    assert [row.label for row in merged.rows] == ["dense", "random_drop -41%", "tomesd -41%"]
    assert merged.question == "Which? And that?" and any("`dense`" in note for note in merged.notes)
    text = write_merged([a, b], tmp_path / "out").read_text(encoding="utf-8")
    assert "tomesd -41%` is not shown to beat `random_drop`" in text  # the two meet only in the merged report
    assert {row["label"] for row in read(tmp_path / "out").data[0]["rows"]} == {row.label for row in merged.rows}


def test_what_only_one_of_two_equal_trials_measured_is_kept(tmp_path):
    (dense,) = results_of(DENSE)
    timing = {name: value for name, value in dense["metrics"].items() if name.startswith("latency/")}
    older = {**changed(dense, metrics=[{"name": "latency"}]), "timestamp_ms": 1, "label": "dense", "metrics": timing}
    newer = {**dense, "metrics": {name: value for name, value in dense["metrics"].items() if name not in timing}}
    (merged,) = merge([small(tmp_path / "a", [older]), small(tmp_path / "b", [newer])], tmp_path / "out")
    (row,) = merged.rows
    assert {name: row.measure(name) for name in dense["metrics"]} == dense["metrics"]
    other_code = {**older, "code": "another"}
    (merged,) = merge([small(tmp_path / "c", [other_code]), tmp_path / "b"], tmp_path / "out")
    assert merged.rows[0].value("latency/ratio_to_dense") is None


def test_equal_trials_with_other_numbers_are_told(tmp_path):
    (dense,) = results_of(DENSE)
    name = next(name for name in dense["metrics"] if name.startswith("fidelity/fd"))
    moved = {**dense, "metrics": {**dense["metrics"], name: {**dense["metrics"][name], "value": 1.0}},
             "timestamp_ms": dense["timestamp_ms"] + 1}
    (merged,) = merge([small(tmp_path / "a", [dense]), small(tmp_path / "b", [moved])], tmp_path / "out")
    assert merged.rows[0].value(name) == 1.0
    assert any("gave other numbers" in note and name in note for note in merged.notes)


def protocols():
    dense, drop, tome = results_of(DENSE, DROP, TOME)
    yield "seeds", results_of(DENSE, TOME, images=32)
    yield "sampler", [changed(r, sampler={"num_steps": 50, "guidance_scale": 3.0, "batch_size": 8}) for r in (dense, tome)]
    notes = {name: {"reference_id": "emoji-other"} for name in dense["environment"]["score"] if name.startswith("fidelity/")}
    yield "reference", [{**r, "environment": {**r["environment"], "score": {**r["environment"]["score"], **notes}}}
                        for r in (dense, tome)]


@pytest.mark.parametrize(("kind", "others"), protocols(), ids=lambda value: value if isinstance(value, str) else "")
def test_rows_of_different_protocols_never_share_a_table(tmp_path, without_figures, kind, others):
    a, b = small(tmp_path / "a", results_of(DENSE, DROP)), small(tmp_path / "b", others)
    text = write_merged([a, b], tmp_path / "out").read_text(encoding="utf-8")
    assert "2 protocols" in text and kind in text.split("# Setting 1")[0]
    assert not re.search(r"(beats|shown to beat)\W+`random_drop`", text)
    first, second = read(tmp_path / "out").data
    assert [row["method"] for row in first["rows"]] == ["dense", "random_drop"]
    assert [row["method"] for row in second["rows"]] == ["dense", "tomesd"]
    assert (tmp_path / "out/setting-1/table.csv").exists() and (tmp_path / "out/setting-2/table.csv").exists()


def test_two_settings_of_one_label_are_told_apart_and_not_taken_for_an_ablation(tmp_path):
    (shiva,) = results_of(({"name": "shiva", **SHIVA}, 0.41))
    longer = changed(shiva, train={"seed": 0, "steps": 999})
    (merged,) = merge([small(tmp_path / "a", [shiva]), small(tmp_path / "b", [longer])], tmp_path / "out")
    assert [row.label for row in merged.rows] == ["shiva -41% (a)", "shiva -41% (b)"]
    assert [row.varied["train.steps"] for row in merged.rows] == [210, 999]


def test_seeds_of_one_setting_from_two_sweeps_are_one_setting(tmp_path):
    from harness.reporting.seeds import over_seeds

    method = {"name": "shiva", **SHIVA}
    first, second = (fake_result("x", method, 0.41, 24, (seed, 0.1)) for seed in (0, 1))
    (merged,) = merge([small(tmp_path / "a", [first]), small(tmp_path / "b", [second])], tmp_path / "out")
    (row,) = over_seeds(merged).rows
    assert len(row.members) == 2 and row.label == "shiva -41%"


def test_pictures_are_found_from_the_merged_folder(tmp_path, finished):
    write_merged([finished, small(tmp_path / "b", results_of(TOME, images=6))], tmp_path / "out")
    data = read(tmp_path / "out").data[0]
    assert len(data["pictures"]["rows"]) == 7 and (tmp_path / "out/pareto.png").exists()
    assert str(tmp_path) not in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_a_trial_without_a_file_is_a_row_of_the_merged_report(tmp_path):
    results = results_of(DENSE, DROP)
    a = small(tmp_path / "a", results)
    (a / f"{results[1]['trial_id']}.json").unlink()
    (merged,) = merge([a, small(tmp_path / "b", results_of(TOME))], tmp_path / "out")
    assert [row.status for row in merged.rows] == ["done", "done", "missing"]


def test_a_merged_report_overwrites_no_sweep(tmp_path, caplog):
    a, b = small(tmp_path / "a", results_of(DENSE)), small(tmp_path / "b", results_of(TOME))
    for out in (a, b):
        with pytest.raises(ConfigError, match="own folder"):
            merge([a, b], out)
    with pytest.raises(ConfigError, match="named twice"):
        merge([a, a], tmp_path / "out")
    assert main([str(a), str(b)]) == 2 and "--out" in caplog.text


def test_an_installed_package_has_the_page():
    import tomllib

    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["harness"]
    packaged = {path.name for pattern in patterns for path in (root / "harness").glob(pattern)}
    assert packaged >= set(html.ASSETS) and callable(page)
