"""Files are whole or not there, never lead elsewhere, and arrays are read only where they are what they say."""

import io
import os
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from harness.storage import arrays, durable
from harness.storage.durable import copied, link_between, link_in, put_text, sweep_up, unwritable, writing
from harness.storage.store import Store, content_key
from harness.storage.strict_json import Unreadable

ROOT = Path(__file__).parent.parent


def run(code, argument):
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code, str(argument)], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


def test_a_file_is_replaced_whole_and_nothing_is_left(tmp_path):
    path = tmp_path / "new" / "a.json"
    put_text(path, "one")
    put_text(path, "two é", durable=False)
    assert path.read_text(encoding="utf-8") == "two é" and os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a"
    put_text(path, "old")
    with pytest.raises(error), writing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_what_is_written_is_durable_before_it_is_in_place(tmp_path, monkeypatch):
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append(f"replace {Path(b).name}") or replace(a, b))
    arrays.save(tmp_path / "images.npz", images=IMAGES)
    assert seen == ["fsync", "replace images.npz", "fsync"]


def test_a_link_is_replaced_and_its_target_is_not_touched(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    for make in (os.symlink, os.link):
        path = tmp_path / "images.npz"
        make(target, path)
        arrays.save(path, images=IMAGES)
        assert target.read_text() == "precious" and not path.is_symlink() and arrays.flaw(path) == ""
        path.unlink()
    predictable = tmp_path / f".a.{os.uname().nodename}.{os.getpid()}.tmp"
    predictable.symlink_to(target)
    put_text(tmp_path / "a", "new")
    assert target.read_text() == "precious"


def test_a_copy_is_a_file_of_its_own(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3 * 2**20))
    copied(tmp_path / "a", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").read_bytes() == bytes(3 * 2**20)


@pytest.mark.parametrize("place", ["x", "a/x", "a/b/c/x"])
def test_a_link_is_found_at_any_depth(tmp_path, place):
    root = tmp_path / "root"
    (root / "a" / "b" / "c").mkdir(parents=True)
    assert link_in(root) is None and link_between(root, root / "a" / "new" / "file") is None
    (root / place).symlink_to(tmp_path)
    assert link_in(root) == root / place == link_between(root, root / place / "deeper")


def test_old_unfinished_files_are_swept_and_young_ones_are_not(tmp_path):
    for name, age in ((".a.json.host.1.tmp", 2 * durable.OLD_S), (".b.json.host.2.tmp", 10), ("c.tmp", 2 * durable.OLD_S)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep_up(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".b.json.host.2.tmp", "c.tmp"]


def test_what_cannot_hold_results_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path) == "" == unwritable(tmp_path / "new" / "deep")
    assert "is a file" in unwritable(tmp_path / "file") and "is a file" in unwritable(tmp_path / "file" / "x")
    assert "too long" in unwritable(tmp_path / ("x" * 300))


# ---------------------------------------------------------------------------------------------- arrays


def whole(tmp_path):
    path = tmp_path / "a.npz"
    arrays.save(path, images=IMAGES, prompts=np.array(["a", "b"]), seeds=np.arange(4), none=np.zeros((0, 3)), one=np.array(3.0))
    return path


def test_arrays_are_read_back(tmp_path):
    path = whole(tmp_path)
    found = arrays.load(path)
    assert np.array_equal(found["images"], IMAGES) and found["prompts"].tolist() == ["a", "b"] and found["one"] == 3
    assert arrays.flaw(path) == ""
    np.savez_compressed(path, images=IMAGES)
    assert np.array_equal(arrays.load(path)["images"], IMAGES) and arrays.flaw(path) == ""


def bomb():
    """A file of 70 KB that holds 64 MiB of zeros."""
    stream = io.BytesIO()
    np.savez_compressed(stream, images=np.zeros((64, 2**20), np.uint8))
    return stream.getvalue()


def boaster():
    """An array that says it is a terabyte."""
    stream = io.BytesIO()
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 9)
    return stream.getvalue()


def pickled():
    stream = io.BytesIO()
    np.savez(stream, images=np.array([{"a": 1}], dtype=object))
    return stream.getvalue()


DAMAGE = {
    "empty": lambda content: b"", "half": lambda content: content[: len(content) // 2], "no end": lambda content: content[:-30],
    "zeros": lambda content: bytes(len(content)), "a zeroed page": lambda content: content[:200] + bytes(100) + content[300:],
    "a flipped bit": lambda content: content[:400] + bytes([content[400] ^ 1]) + content[401:], "text": lambda content: b"hello",
    "bomb": lambda content: bomb(), "boaster": lambda content: boaster(), "objects": lambda content: pickled(),
    "an empty archive": lambda content: b"PK\5\6" + bytes(18), "deflate": lambda content: zlib.compress(content)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_unreadable_and_nothing_else_is_raised(tmp_path, damage):
    path = whole(tmp_path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(Unreadable):
        arrays.load(path)
    assert arrays.flaw(path) or damage in ("boaster", "objects")  # these are whole as files; only reading them tells


def test_arrays_cut_or_flipped_anywhere_are_told(tmp_path):
    path = whole(tmp_path)
    content = path.read_bytes()
    for at in range(0, len(content), 37):
        path.write_bytes(content[:at])
        with pytest.raises(Unreadable):
            arrays.load(path)
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1:])
        try:
            arrays.load(path)  # a name or a date in the archive may differ and nothing be lost
        except Unreadable:
            pass


def test_a_bomb_costs_no_memory(tmp_path):
    (tmp_path / "a.npz").write_bytes(bomb())
    code = ("import sys, resource, pathlib\nimport numpy\nfrom harness.storage import arrays\n"
            "resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2**31,) * 2)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try:\n    arrays.load(pathlib.Path(sys.argv[1]))\nexcept arrays.Unreadable as error:\n"
            "    print('20 times' in str(error), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20000)\n")
    assert run(code, tmp_path / "a.npz").split() == ["True", "True"]


# ---------------------------------------------------------------------------------------------- the cache


def test_damaged_arrays_in_the_cache_are_made_again(tmp_path, caplog):
    store, made = Store(tmp_path), []

    def make(folder):
        made.append(1)
        arrays.save(folder / "images.npz", images=IMAGES)

    path = store.get_or_make("dense", {"a": 1}, make) / "images.npz"
    path.write_bytes(path.read_bytes()[:400] + bytes(50) + path.read_bytes()[450:])  # of the same size
    assert np.array_equal(arrays.load(store.get_or_make("dense", {"a": 1}, make) / "images.npz")["images"], IMAGES)
    assert len(made) == 2 and "computed again" in caplog.text


def test_leftovers_in_the_cache_are_swept_when_they_are_old_and_nobody_makes_the_same(tmp_path):
    store, old = Store(tmp_path), 2 * durable.OLD_S
    entry = store.get_or_make("dense", {"a": 1}, lambda folder: (folder / "x").write_text("x"))
    keys = {name: content_key({"b": name}) for name in ("old", "young", "busy", "work")}
    for name, key in keys.items():
        folder = entry.with_name(f".{key}.{'abc.tmp' if name != 'work' else 'work'}")
        folder.mkdir()
        (folder / "half").write_text("half")
        os.utime(folder, (time.time() - (10 if name == "young" else old),) * 2)
    from filelock import FileLock

    with FileLock(entry.with_name(f".{keys['busy']}.lock")):
        swept = run("import sys, pathlib\nfrom harness.storage.store import Store\n"
                    "print(Store(pathlib.Path(sys.argv[1])).sweep_up())", tmp_path)
    assert swept.strip() == "1"
    left = {path.name.split(".")[1] for path in entry.parent.glob(".*") if path.is_dir()}
    assert left == {keys["young"], keys["busy"], keys["work"]} and store.has("dense", {"a": 1})
    assert Store(tmp_path / "none").sweep_up() == 0
