"""Nobody can foretell where our Ray keeps its files, put a link or folder in our way, or have a living driver's files removed."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.api import ConfigError
from harness.execution import private_folder
from harness.execution.private_folder import PREFIX, UNLOCKED_S, PrivateFolder, remove_leftovers

ROOT = Path(__file__).parent.parent
DRIVER = """
import sys
from pathlib import Path
from harness.execution.private_folder import PrivateFolder

folder = PrivateFolder(Path(sys.argv[1]))
print(folder.path, flush=True)
sys.stdin.read()
if "--close" in sys.argv:
    folder.close()
"""


def driver(place: Path, *options: str) -> subprocess.Popen:
    """A process that holds a folder until its stdin ends."""
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(place), *options], cwd=ROOT, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_it_is_new_private_short_and_gone_at_the_end(tmp_path):
    one, other = PrivateFolder(tmp_path), PrivateFolder(tmp_path)
    assert one.path != other.path and one.path.parent == tmp_path
    assert stat.S_IMODE(one.path.stat().st_mode) == 0o700 and one.path.stat().st_uid == os.geteuid()
    assert str(os.getpid()) not in one.path.name.removeprefix(PREFIX) or len(str(os.getpid())) < 3
    for folder in (one, other):
        folder.close()
    assert not list(tmp_path.iterdir())
    default = PrivateFolder()
    sockets = default.path / "r12" / "session_2026-01-01_00-00-00_000000_4194304" / "sockets" / "plasma_store.1"
    default.close()
    assert len(str(sockets)) <= 103


@pytest.mark.processes
def test_a_killed_drivers_folder_is_removed_and_a_living_ones_is_not(tmp_path):
    """Whatever process ids say: in another container the same ones are other processes."""
    living, killed = driver(tmp_path), driver(tmp_path)
    try:
        paths = [Path(process.stdout.readline().strip()) for process in (living, killed)]
        killed.kill()
        killed.wait()
        remove_leftovers(tmp_path)
        assert [path.exists() for path in paths] == [True, False]
        living.communicate()
        remove_leftovers(tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        living.kill()
        living.wait()


@pytest.mark.processes
def test_drivers_that_start_together_leave_each_other_alone(tmp_path):
    for _ in range(3):
        dead = driver(tmp_path)
        dead.stdout.readline()
        dead.kill()
        dead.wait()
    together = [driver(tmp_path, "--close") for _ in range(6)]
    held = [process.stdout.readline().strip() for process in together]
    assert len(set(held)) == 6 and all(map(os.path.isdir, held))
    assert {str(path) for path in tmp_path.iterdir()} == set(held), "what the dead ones left is gone"
    for process in together:
        process.communicate(timeout=60)
    assert [process.returncode for process in together] == [0] * 6 and not list(tmp_path.iterdir())


def test_planted_links_and_folders_are_neither_followed_nor_removed(tmp_path):
    base, victim = tmp_path / "tmp", tmp_path / "victim"
    base.mkdir()
    victim.mkdir(mode=0o700)
    (victim / "lock").touch()
    (victim / "precious").touch()
    (base / f"{PREFIX}link").symlink_to(victim)
    (base / f"{PREFIX}gone").symlink_to(tmp_path / "nowhere")
    (base / f"{PREFIX}file").touch(mode=0o600)
    (base / f"{PREFIX}open").mkdir()
    (base / f"{PREFIX}open").chmod(0o755)
    inside = base / f"{PREFIX}inside"
    inside.mkdir(mode=0o700)
    (inside / "lock").symlink_to(victim / "lock")
    before = sorted(base.iterdir())
    folder = PrivateFolder(base)
    folder.close()
    assert sorted(base.iterdir()) == before and (victim / "precious").exists()


def test_a_folder_of_another_user_is_left_alone(tmp_path, monkeypatch):
    planted = tmp_path / f"{PREFIX}planted"
    planted.mkdir(mode=0o700)
    (planted / "lock").touch()
    mine = os.geteuid()
    monkeypatch.setattr(private_folder.os, "geteuid", lambda: mine + 1)
    PrivateFolder(tmp_path).close()
    assert planted.is_dir()
    monkeypatch.setattr(private_folder.os, "geteuid", lambda: mine)
    remove_leftovers(tmp_path)
    assert not planted.exists()


def test_a_folder_that_is_being_made_is_not_taken_for_a_leftover(tmp_path):
    young = tmp_path / f"{PREFIX}young"
    young.mkdir(mode=0o700)
    remove_leftovers(tmp_path)
    assert young.exists()
    os.utime(young, (time.time() - UNLOCKED_S - 60,) * 2)
    remove_leftovers(tmp_path)
    assert not young.exists()


def test_where_none_can_be_made_the_remedy_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"nowhere: no private folder .* set TMPDIR"):
        PrivateFolder(tmp_path / "nowhere")
    monkeypatch.setattr(private_folder.os, "access", lambda *given: False)
    monkeypatch.setattr(private_folder.tempfile, "gettempdir", lambda: "/var/folders/with/a/very/long/path")
    with pytest.raises(ConfigError, match="too long a path for Ray's sockets; set TMPDIR"):
        PrivateFolder()
