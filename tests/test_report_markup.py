"""What users write is shown and is never markup: labels, questions, notes, reasons, options, names of files."""

import html
import json
import re

import pytest
from fake_reports import sweep_folder as sweep_folder
from fake_results import make_sweep

from harness.reporting.markup import as_html, as_markdown, mark
from harness.reporting.report import write_merged, write_report
from harness.tracking import mapping

EVIL = ['<script>alert("1")</script>', "[click](javascript:alert(1))", "<img src=x onerror=alert(1)>", "![x](http://tracker/x.png)",
        "`code` and ``more``", "**bold** *it*", "&lt;b&gt;", "a|b", "back\\slash\\", "<!-- hidden -->", "two\nlines\n\n# head",
        "\ue000\ue001\ue009",
        "<javascript:alert(1)>", "]: x", "~~gone~~", "\u2028- item", "$\\frac$ $x$"]


@pytest.mark.parametrize("text", EVIL)
def test_marked_text_is_only_text(text):
    shown = re.sub(r"\s+", " ", text.replace("\u2028", " "))
    shown = re.sub("[\ue000-\ue008]", "\ufffd", shown)
    assert html.unescape(as_html(mark(text))) == shown and not re.search("[<>]", as_html(mark(text)))
    prose = as_markdown(f"see {mark(text)}.")
    assert "<" not in prose and not re.search(r"(?<!\\)[\[\]*`~]", prose) and "\n" not in prose
    assert html.unescape(re.sub(r"\\(.)", r"\1", prose)) == f"see {shown}."
    code = re.fullmatch(r"(`+)(.*?)\1", as_markdown(f"`{mark(text)}`"))
    assert code and code[2].strip() == shown.strip() and code[1] not in code[2]


def poisoned(folder, results, evil):
    """The sweep with `evil` wherever a user, an exception or a machine can put text."""
    for index, result in enumerate(results):
        result["label"] = f"{result['label']} {evil}"
        result["trial"]["data"] |= {"path": evil, "name": evil}
        result["environment"]["score"]["device"] = evil
        result["metrics"][f"prompt/{evil}"] = {"value": None, "better": "none", "interval": None, "n": None, "unavailable": evil}
        if index == 3:
            result |= {"status": "failed", "error": {"job": "score", "type": evil, "message": evil, "traceback": evil}}
        (folder / f"{result['trial_id']}.json").write_text(json.dumps(result))
    header = json.loads((folder / "sweep.json").read_text())
    header |= {"question": evil, "name": evil, "labels": {key: f"{label} {evil}" for key, label in header["labels"].items()}}
    (folder / "sweep.json").write_text(json.dumps(header))
    (folder / f"{results[4]['trial_id']}.json").unlink()
    (folder / f"{results[5]['trial_id']}.json").write_text(json.dumps(evil))


def assert_harmless(text):
    bare = re.sub(r"(`+).*?\1", "", text, flags=re.S)
    assert not re.search(r"<(?!-)[a-zA-Z/!]", bare), bare[:2000]
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", bare)
    assert all(re.fullmatch(r"[\w./-]+\.png", link) for link in links), links


def test_a_report_carries_no_markup_of_its_users(sweep_folder, tmp_path):
    folder, results = sweep_folder
    evil = ' <img src=x onerror=alert(1)> [x](javascript:alert(1)) `c` <script>alert(2)</script>\n\n# head\n'
    poisoned(folder, results, evil)
    assert_harmless(write_report(folder).read_text(encoding="utf-8"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.S)
    assert "<img src=x" not in body and "alert(2)</script>" not in body and "javascript:alert" in body
    assert "href=\"javascript" not in body and not re.search("[\ue000-\ue008]", page)
    assert not re.search("[\ue000-\ue008]", (folder / "table.csv").read_text() + (folder / "report.md").read_text())
    make_sweep(tmp_path / "other", images=4, artifacts=False)
    assert_harmless(write_merged([folder, tmp_path / "other"], tmp_path / "merged").read_text(encoding="utf-8"))


def test_a_dollar_in_a_label_is_drawn(tmp_path):
    folder = tmp_path / "ablation"
    results = make_sweep(folder, images=4)
    for result in results:
        result["label"] += " $\\frac$ $x"
        (folder / f"{result['trial_id']}.json").write_text(json.dumps(result))
    assert "pareto.png" in write_report(folder).read_text()


def test_a_note_for_mlflow_links_to_our_pages_only():
    note = mapping.sweep_note("<b>[q](javascript:x)", "1", {"[a](javascript:alert(1)) <img>": "0" * 32},
                              "0" * 32)
    assert_harmless(re.sub(r"\]\(#/[^)]*\)", "](a.png)", note))
