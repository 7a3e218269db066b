"""The stages of training the embedded SD3. The command line is `harness.embedded.train_emoji`."""

from pathlib import Path

import torch

from harness.data.emoji import load_emoji
from harness.embedded.emoji_flow import FlowTask
from harness.embedded.emoji_loop import ModelTraining
from harness.embedded.emoji_vae import VaeTask, build_vae, load_vae, set_latent_scale


def train_vae(checkpoints: Path, minutes: float, steps: int | None) -> None:
    """Train the autoencoder and save its averaged weights as checkpoints/vae, with the latents' scale."""
    loop = ModelTraining(VaeTask(build_vae()), checkpoints)
    loop.run(minutes, steps)
    set_latent_scale(loop.averaged, load_emoji("train"))
    loop.averaged.save_pretrained(checkpoints / "vae")


def train_decoder(checkpoints: Path, minutes: float, steps: int | None) -> None:
    """Train the decoder on, the encoder as it is; save as checkpoints/vae_final, which the export prefers."""
    loop = ModelTraining(VaeTask(load_vae(checkpoints / "vae"), decoder_only=True), checkpoints)
    loop.run(minutes, steps)
    loop.averaged.save_pretrained(checkpoints / "vae_final")


def train_flow(stage: str, checkpoints: Path, minutes: float, steps: int | None, *, compiled: bool) -> None:
    """Train one flow-matching stage; "high" begins with the weights of "low"."""
    torch.manual_seed(0)
    task = FlowTask(stage, load_vae(checkpoints / "vae"), compiled=compiled)
    before = checkpoints / "low.pt" if stage == "high" else None
    ModelTraining(task, checkpoints, resume_from=before).run(minutes, steps)


def train_stage(stage: str, checkpoints: Path, minutes: float, steps: int | None, *, compiled: bool) -> None:
    """One stage: vae, low, high or decoder."""
    if stage == "vae":
        train_vae(checkpoints, minutes, steps)
    elif stage == "decoder":
        train_decoder(checkpoints, minutes, steps)
    else:
        train_flow(stage, checkpoints, minutes, steps, compiled=compiled)
