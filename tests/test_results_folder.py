"""A results folder that a power cut, another program or a stranger changed: what fits counts, the rest is named."""

import json
import logging
import os
import shutil
from pathlib import Path

import fake_sweep
import numpy as np
import pytest
from fake_reports import sweep_folder as sweep_folder
from fake_reports import table_line, text_of
from fake_results import make_sweep
from test_run import ALL
from test_run import sweep as sweep

from harness import run as command
from harness.api import ConfigError
from harness.execution import driver
from harness.execution.driver import DONE, REFUSED
from harness.execution.results_folder import ResultsFolder
from harness.reporting import report
from harness.reporting.report import write_report
from harness.storage import arrays, records


def with_images(job, trial, store, progress, out_dir):
    """`fake_sweep.run_job`, whose score jobs leave pictures."""
    part = fake_sweep.run_job(job, trial, store, progress, out_dir)
    if job == "score":
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        arrays.save(out_dir / "images.npz", images=images, prompts=np.array(["p"] * 4), seeds=np.arange(4))
        part["artifacts"] = {"images": "/".join((out_dir / "images.npz").parts[-3:])}
    return part


def half(path):
    path.write_bytes(path.read_bytes()[:200])


def zeroed(path):
    path.write_bytes(path.read_bytes()[:300] + bytes(64) + path.read_bytes()[364:])


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("damage", [half, zeroed, lambda path: path.write_bytes(b""), Path.unlink])
def test_damaged_pictures_are_made_again_and_nothing_else_is(sweep, damage, caplog):
    assert sweep(run_job=with_images) == DONE == sweep(run_job=with_images)
    assert fake_sweep.diary(sweep.results) == ALL
    trial = sweep.rows()["random_drop keep_ratio=0.5"]["trial_id"]
    damage(sweep.folder / "artifacts" / trial / "images.npz")
    assert sweep(run_job=with_images) == DONE
    assert fake_sweep.diary(sweep.results) == [*ALL, "score 0.5"] and "images.npz" in caplog.text
    assert arrays.flaw(sweep.folder / "artifacts" / trial / "images.npz") == ""


def test_pictures_that_somebody_removed_to_make_room_are_not_made_again(sweep):
    sweep(run_job=with_images)
    shutil.rmtree(sweep.folder / "artifacts")
    assert sweep(run_job=with_images) == DONE and fake_sweep.diary(sweep.results) == ALL


@pytest.mark.parametrize("damage", [half, lambda path: np.savez(path, images=np.zeros((2, 3))),
                                    lambda path: np.savez_compressed(path, images=np.zeros((2**26,), np.uint8))],
                         ids=["half", "no images", "bomb"])
def test_damaged_pictures_cost_their_own_cell_of_the_report(tmp_path, damage):
    folder = tmp_path / "ablation"
    results = make_sweep(folder, images=4)
    damage(folder / results[0]["artifacts"]["images"])
    damage(folder / results[2]["artifacts"]["images"])
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Some pictures cannot be read" in text and text.count("images.npz") == 2 and "grid.png" in text
    assert all(f"- `{results[index]['label']}`: artifacts/" in text for index in (0, 2))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert [f'"{results[index]["trial_id"]}":["data:' in page for index in range(4)] == [False, True, False, True]


# ---------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("link", [".locks/x.score.lock", "parts/x.score.json", "artifacts/x/images.npz", "artifacts/x/deep/a",
                                  "x.json"])
def test_a_link_at_any_depth_is_refused(sweep, tmp_path, link):
    sweep()
    (tmp_path / "target").write_text("precious")
    (sweep.folder / link).parent.mkdir(parents=True, exist_ok=True)
    (sweep.folder / link).symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="is a link"):
        sweep()
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("place", ["artifacts", "artifacts/{}", "artifacts/{}/score.log", ".locks/{}.score.lock", "parts"])
def test_a_link_that_comes_while_a_sweep_runs_is_not_written_through(sweep, tmp_path, place):
    target, linked = tmp_path / "target", []
    target.mkdir()

    def job(kind, trial, store, progress, out_dir):
        if not linked:  # the first job turns the place of the second into a link
            other = next(entry for entry in driver.resolved(sweep.file).entries if entry.trial_id != out_dir.name)
            linked.append(sweep.folder / place.format(other.trial_id))
            if linked[0].is_dir():
                shutil.rmtree(linked[0])
            linked[0].parent.mkdir(parents=True, exist_ok=True)
            linked[0].unlink(missing_ok=True)
            linked[0].symlink_to(target if "." not in place.rpartition("/")[2] else target / "file")
        return fake_sweep.run_job(kind, trial, store, progress, out_dir)

    with pytest.raises(ConfigError, match="is a link"):
        sweep(run_job=job)
    assert linked and not any(target.iterdir())


@pytest.mark.parametrize("link", ["images.npz", "deep/file", "."])
def test_nothing_is_taken_over_from_a_neighbour_with_links(sweep, tmp_path, link, caplog):
    sweep(run_job=with_images)
    trial = sweep.rows()["random_drop keep_ratio=0.5"]["trial_id"]
    folder = sweep.folder / "artifacts" / trial
    secret = tmp_path / "secret.npz"
    shutil.copy(folder / "images.npz", secret)
    if link == ".":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(secret)
    sweep.file.write_text(fake_sweep.TEXT.replace("name: fake", "name: other"))
    assert sweep(run_job=with_images) == DONE
    scores = [job for job in fake_sweep.diary(sweep.results)[6:] if job.startswith("score")]
    assert scores == ["score 0.5"] and "is a link" in caplog.text


def test_what_killed_processes_left_a_day_ago_is_swept_at_the_start(sweep):
    sweep()
    left = [sweep.folder / "parts" / ".x.score.json.host.1.tmp", sweep.folder / ".sweep.json.host.1.tmp",
            sweep.results / ".cache" / "dense" / ".0123456789abcdef.xyz.tmp"]
    left[2].mkdir(parents=True)
    for path in left:
        (path / "half" if path.is_dir() else path).write_text("half")
        os.utime(path, (1, 1))
    assert sweep() == DONE and not any(path.exists() for path in left)


# ---------------------------------------------------------------------------------------------- JSON


FOREIGN = {"nothing": b"", "half": b'{"trial": {', "a list": b"[1, 2]", "deep": b"[" * 200_000,
           "deep mapping": b'{"a":' * 100_000, "latin": "{\"é\": 1}".encode("latin-1"),
           "utf-16": '{"trial": {}}'.encode("utf-16"), "huge": b'{"trial": ' + b"9" * 10_000 + b"}",
           "surrogate": b'{"trial": "\\ud800"}', "twice": b'{"trial": {}, "trial": {}}', "NaN": b'{"schema": 1, "metrics": NaN}',
           "another program": b'{"schema": 1, "trial": 3, "metrics": [], "trial_id": {}, "status": "fine"}', "NUL": b"\0" * 100}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_json_in_any_place_counts_as_missing_and_is_named(sweep, case, caplog):
    sweep()
    rows = sweep.rows()
    first, second = (rows[f"random_drop keep_ratio={ratio}"]["trial_id"] for ratio in (0.9, 0.5))
    (sweep.folder / "parts" / f"{first}.score.json").write_bytes(FOREIGN[case])
    (sweep.folder / f"{second}.json").write_bytes(FOREIGN[case])
    (sweep.folder / "sweep.json").write_bytes(FOREIGN[case])
    (sweep.folder / "stranger.json").write_bytes(FOREIGN[case])
    folder = ResultsFolder(sweep.folder)
    with caplog.at_level(logging.WARNING):
        assert folder.part(f"{first}.score") is None is folder.part(f"{first}.score")
    assert caplog.text.count("counts as missing") == 1 and f"{first}.score.json" in caplog.text
    assert sweep() == DONE
    assert fake_sweep.diary(sweep.results) == [*ALL, "score 0.9"]
    assert all(row["status"] == "done" for row in sweep.rows().values())


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_result_is_a_row_that_says_so(sweep_folder, case):
    folder, results = sweep_folder
    (folder / f"{results[3]['trial_id']}.json").write_bytes(FOREIGN[case])
    try:
        assert "counts as missing" in table_line(text_of(folder), results[3]["label"])
    except ConfigError as error:
        assert "schema" in str(error)  # of another version: the whole folder is
    (folder / f"{results[3]['trial_id']}.json").write_text(json.dumps(results[4]))  # the file of another trial
    assert "trial_id should be" in table_line(text_of(folder), results[3]["label"])
    (folder / "sweep.json").write_bytes(FOREIGN[case])
    try:
        text_of(folder)
    except ConfigError as error:
        assert "sweep.json" in str(error) and "Run the sweep again" in str(error)


def test_every_kind_of_record_that_we_write_fits(tmp_path, sweep):
    sweep.orders("score 0.9 raise")
    sweep(run_job=with_images)
    for path in (sweep.folder / "parts").glob("*.json"):
        records.load(path, records.PART)
    records.load(sweep.folder / "sweep.json", records.HEADER)
    for row in sweep.rows().values():
        records.load(sweep.folder / f"{row['trial_id']}.json", records.result_of(row["trial_id"]))


@pytest.mark.parametrize("value", [float("nan"), "fast", None])
def test_a_part_that_no_one_could_read_is_a_failure_and_not_made_for_ever(sweep, value):
    def job(kind, trial, store, progress, out_dir):
        part = fake_sweep.run_job(kind, trial, store, progress, out_dir)
        if value is None:
            raise OSError("no such file: caf\udce9")
        next(iter(part["metrics"].values()))["value"] = value
        return part

    assert sweep(run_job=job) == driver.FAILED
    errors = {row["error"]["message"] for row in sweep.rows().values()}
    assert errors == {"no such file: caf?"} if value is None else all("value should be a number" in text for text in errors)


# ---------------------------------------------------------------------------------------------- the file system


def refused(capsys, *arguments):
    assert command.main([str(argument) for argument in arguments]) == REFUSED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_what_the_system_refuses_is_told_with_a_remedy(sweep, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for wrong in ("file", "file/deep", "x" * 300):
        for more in ([], ["--dry-run"]):
            assert "name a folder that you may write to" in refused(capsys, sweep.file, "--results", tmp_path / wrong, *more)
    assert "name a sweep file" in refused(capsys, tmp_path / ("x" * 300), "--dry-run")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(capsys, tmp_path / "pipe")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert "may read" in refused(capsys, sweep.file)


@pytest.mark.parametrize("place", ["parts", "sweep.json", ".lock", "sweep.yaml", "artifacts"])
def test_what_is_in_the_way_is_named(sweep, capsys, place):
    sweep.folder.mkdir(parents=True)
    if place in ("parts", "artifacts"):
        (sweep.folder / place).write_text("a file")
    else:
        (sweep.folder / place / "a folder").mkdir(parents=True)
    said = refused(capsys, sweep.file, "--local", "--results", sweep.results)
    assert place in said and "--results" in said


@pytest.mark.parametrize("place", ["report.md", "report.html", "table.csv"])
def test_a_report_that_cannot_be_written_is_told(sweep_folder, tmp_path, place, caplog):
    folder, _ = sweep_folder
    (folder / place / "a folder").mkdir(parents=True)
    assert report.main([str(folder)]) == 2 and place in caplog.text and "in the way" in caplog.text
    assert report.main([str(tmp_path / ("x" * 300))]) == 2
    (tmp_path / "file").write_text("")
    assert report.main([str(folder), str(folder.parent), "--out", str(tmp_path / "file")]) == 2
