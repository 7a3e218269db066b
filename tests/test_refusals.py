"""What can be known before any compute is said before any compute: by --dry-run, and by the first seconds of a run."""

import signal

import doomed
import pytest
import torch

from harness import run as command
from harness.execution import driver

GPUS = ("no CUDA device", "two GPUs of none", "a kernel of GPUs")


@pytest.fixture(autouse=True)
def _as_here(monkeypatch, tmp_path):
    """No hub, no cluster, and no job even where nothing is refused."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(driver._Driver, "run", lambda self: driver.DONE)
    monkeypatch.setattr(driver._Driver, "_tracker", lambda self: None)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_command_line_is_refused_as_the_file_is(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(doomed.sweep())
    for flags in (["--dry-run"], []):
        assert command.main(["s.yaml", "--workers", "4000", *flags]) == driver.REFUSED
        assert "--workers: 4000 jobs at once" in capsys.readouterr().err
    assert command.main(["s.yaml", "--local"]) == driver.DONE, "nothing else is wrong with it"


@pytest.mark.parametrize("case", doomed.DOOMED)
def test_a_doomed_sweep_is_refused_before_any_job(case, tmp_path, capsys):
    if case in GPUS and torch.cuda.is_available():
        pytest.skip("this machine has what the sweep asks for")
    text, prepare, words = doomed.DOOMED[case]
    (tmp_path / "s.yaml").write_text(text)
    if prepare:
        prepare(tmp_path)
    for flags in (["--dry-run"], []):
        assert command.main(["s.yaml", *flags]) == driver.REFUSED
        said = capsys.readouterr().err
        for word in ["s.yaml: ", *words]:
            assert word in said, f"{word!r} is not in: {said}"
        assert not list(tmp_path.glob("results/doomed/*")), "a job may have begun"
