"""The stages of training the embedded Flux and PixArt, and their export; `harness.embedded.siblings.train` is the command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from string import Template
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from transformers import T5EncoderModel, T5TokenizerFast

import methods as _methods  # noqa: F401  (pictures are drawn by the method 'dense')
from harness.data.emoji import load_emoji
from harness.embedded.emoji_export import stage_facts
from harness.embedded.emoji_loop import ModelTraining
from harness.embedded.siblings.model import BUILD, STAGES, SiblingTask, backbone_of, draw
from harness.embedded.siblings.t5 import train_t5
from harness.storage.durable import swap_in

FOLDER = Path(__file__).parent.parent


def text_encoder(sd3: StableDiffusion3Pipeline, checkpoints: Path) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """The T5 that both families use: read from `checkpoints` or from the family exported first, or trained and left there."""
    folder = checkpoints / "t5"
    other = FOLDER / "emoji_pixart"
    if not folder.exists() and other.exists():
        shutil.copytree(other / "text_encoder", folder)
        shutil.copytree(other / "tokenizer", folder, dirs_exist_ok=True)
    if not folder.exists():
        made, tokenizer = train_t5(sd3)
        temporary = checkpoints / "t5.new"
        made.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    encoder = T5EncoderModel.from_pretrained(folder)
    return encoder.eval().requires_grad_(False), T5TokenizerFast.from_pretrained(folder)


def untrained(family: str, checkpoints: Path) -> Any:
    """A pipeline of the family whose transformer knows nothing."""
    sd3 = StableDiffusion3Pipeline.from_pretrained(FOLDER / "emoji_sd3")
    torch.manual_seed(0)
    return BUILD[family](sd3, *text_encoder(sd3, checkpoints))


def train_stage(name: str, checkpoints: Path, minutes: float, steps: int | None, *, compiled: bool) -> None:
    """One stage; it begins with the weights of the stage before."""
    family = name.partition("_")[0]
    names = [stage for stage in STAGES if stage.startswith(family)]
    before = checkpoints / f"{names[names.index(name) - 1]}.pt" if names.index(name) else None
    teacher = None
    if STAGES[name].distilled and before is not None:
        teacher = untrained(family, checkpoints).transformer
        teacher.load_state_dict(torch.load(before, weights_only=True)["ema"])
        teacher.eval().requires_grad_(False)
    task = SiblingTask(name, untrained(family, checkpoints), teacher, compiled=compiled)
    ModelTraining(task, checkpoints, resume_from=before).run(minutes, steps)


def export(family: str, checkpoints: Path, out: Path) -> None:
    """Write the pipeline folder of the last stage's averaged weights beside `out` and swap it in."""
    names = [stage for stage in STAGES if stage.startswith(family)]
    pipe = untrained(family, checkpoints)
    pipe.transformer.load_state_dict(torch.load(checkpoints / f"{names[-1]}.pt", weights_only=True)["ema"])
    draw(backbone_of(family, pipe)).save(checkpoints / f"{family}.png")
    emoji = load_emoji("train")
    measured = {"stages": {name: stage_facts(checkpoints, name) for name in names}, "train_pairs": len(emoji),
                "train_fingerprint": emoji.fingerprint}
    temporary = out.with_name(out.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(temporary)
    _tidy(temporary)
    (temporary / "training.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(_readme(family, measured), encoding="utf-8")
    swap_in(temporary, out)


def _tidy(folder: Path) -> None:
    """Leave out what a loader noted of this machine, and a key of the autoencoder that its own constructor warns about."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if path.parent.name == "vae":
            config.pop("block_out_channels", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _readme(family: str, measured: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {facts['steps']} | {STAGES[name].batch_size} | {facts['minutes']} | {facts['loss']} |"
                     for name, facts in measured["stages"].items())
    template = Template((FOLDER / f"emoji_{family}_readme.md").read_text(encoding="utf-8"))
    return template.substitute(stages=rows, train_pairs=measured["train_pairs"], train_short=measured["train_fingerprint"][:12])
