"""Training with several processes, and `python -m harness.execution.pretrain`: the same losses, found by the run that follows."""

import io
import json
from pathlib import Path

import pytest
import torch
from conftest import TinyInRegistry, TinySD3, tiny_pipeline
from rich.console import Console
from torch import distributed, multiprocessing, nn

from harness import data as data_module
from harness.api import BACKBONES, METHODS, ConfigError
from harness.data.emoji import EmojiSet
from harness.execution import pretrain
from harness.execution.progress import JobState
from harness.execution.results_folder import Job
from harness.storage.store import Store
from harness.sweep.file import load
from harness.sweep.resolve import resolve
from harness.training.ranks import Ranks
from harness.training.train import TrainConfig, TrainingSet, train
from harness.trial import build, job

CONFIG = TrainConfig(steps=8, batch_size=4, warmup_steps=2, adapter_rank=2, adapter_lr=1e-3, distill_every=2, checkpoint_every=2,
                     validate_every=2, validation_images=4)
OPTIONS = {"router_lr": 3e-3, "policy_lr": 3e-2, "keep_ratio": 0.5}


def train_tiny(store: Path, progress=lambda stage, done, total: None):
    torch.manual_seed(5)
    latents = nn.functional.interpolate(torch.randn(12, 4, 2, 2), scale_factor=4, mode="bilinear")
    data = TrainingSet(latents, [f"thing {i}" for i in range(12)], "test data")
    method = METHODS.build("shiva", OPTIONS)
    trained = train(TinySD3.from_pipeline(tiny_pipeline()), method, CONFIG, data, Store(store), progress)
    weights = torch.cat([p.detach().flatten() for p in [*method.parameters(), *trained.backbone.transformer.parameters()]])
    return trained.series, weights


def one_of(rank: int, size: int, folder: Path) -> None:
    """A process of a training together; each leaves its curves and weights."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    series, weights = train_tiny(folder / "store")
    (folder / f"{rank}.json").write_text(json.dumps(series))
    torch.save(weights, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.processes
def test_two_processes_learn_what_one_learns(tmp_path):
    multiprocessing.spawn(one_of, args=(2, tmp_path), nprocs=2)
    together = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    weights = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert together[0] == together[1] and torch.equal(*weights), "every process ends with what is stored"
    series, alone = train_tiny(tmp_path / "alone")
    assert {"train/diffusion", "train/distill", "train/budget", "val/dense_mse"} <= set(series) == set(together[0])
    for name, points in series.items():
        if name != "train/grad_norm":
            assert [value for _, value in together[0][name]] == pytest.approx([v for _, v in points], rel=1e-4, abs=1e-4), name
    torch.testing.assert_close(weights[0], alone, rtol=1e-2, atol=1e-3)
    silent, _ = train_tiny(tmp_path / "store", lambda *report: pytest.fail(f"{report}: it was stored"))
    assert {name: [list(point) for point in points] for name, points in silent.items()} == together[0]


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(0, 3)))
    with pytest.raises(ConfigError, match="train.batch_size: 4 .* 3 processes"):
        train_tiny(tmp_path)


def test_rows_of_all_processes_make_the_batch():
    rows = [list(range(8))[Ranks(rank, 4).rows(8)] for rank in range(4)]
    assert rows == [[0, 1], [2, 3], [4, 5], [6, 7]]


# ---------------------------------------------------------------------------------------------- the command


SWEEP = """
name: tiny
seeds: 0-3
backbone: tiny
sampler: {num_steps: 3, guidance_scale: 4.0, batch_size: 2}
metrics: [flops]
train: {steps: 4, batch_size: 2, warmup_steps: 1, adapter_rank: 2, distill_every: 2}
methods:
  - dense
  - {name: random_drop, flops_cut: 0.25}
  - {name: shiva, flops_cut: 0.25}
"""


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """A sweep file with one trained row on the tiny backbone and eight training images."""
    BACKBONES.names()
    monkeypatch.setitem(BACKBONES._classes, "tiny", TinyInRegistry)
    images = data_module.load("emoji", "train")
    small = EmojiSet(images.images[:8, ::2, ::2].copy(), images.captions[:8], images.ids[:8])
    monkeypatch.setattr(data_module, "load", lambda name, split: small)
    (tmp_path / "tiny.yaml").write_text(SWEEP)
    yield tmp_path / "tiny.yaml"
    build._held.clear()


def test_what_was_pretrained_is_loaded_by_the_run(sweep, tmp_path):
    out = io.StringIO()
    assert pretrain.pretrain(sweep, tmp_path / "results", Console(file=out, width=160)) == 1
    assert "1 trained rows, 1 process" in out.getvalue() and "joint" in out.getvalue()
    [trial] = [entry.trial for entry in resolve(load(sweep)).entries if entry.trial["train"]]
    seen = []
    job.pretrain(trial, Store(tmp_path / "results" / ".cache"), lambda stage, done, total: seen.append(stage))
    assert seen == [], "nothing was trained or encoded again"


def test_a_bad_sweep_is_refused_before_anything_is_built(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(SWEEP.replace("steps: 4", "step: 4").replace("backbone: tiny", "backbone: sd3"))
    assert pretrain.main([str(tmp_path / "bad.yaml")]) == pretrain.REFUSED
    assert "step" in capsys.readouterr().err


def test_the_time_left_of_a_resumed_stage_counts_only_what_was_seen():
    row = JobState(Job("score", "0123", "shiva", "code", 1, {}), None, share=0.6, first_share=0.5, stage_began=100.0)
    assert row.left(110.0) == pytest.approx(40.0)  # a tenth took 10 s, four tenths are left
    row.share = 0.51
    assert row.left(110.0) is None
