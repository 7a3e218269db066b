"""The stages of training the small SD3 of scenes. The command line is `harness.embedded.scenes_model`."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPTokenizer

from harness.data.scene_plan import all_words
from harness.data.scenes import load_scenes
from harness.embedded.emoji_flow import FlowTask
from harness.embedded.emoji_loop import LearningRate, ModelTraining
from harness.embedded.emoji_model import EmojiModel
from harness.embedded.emoji_text import build_tokenizer
from harness.embedded.emoji_vae import BATCH_SIZE, VaeTask, build_vae, encode_all, load_vae, set_latent_scale, to_signed
from harness.storage.durable import writing

GRID = 32
"""Tokens of a side at the last stage."""
MAX_LENGTH = 20
NUM_SCENES = 20_000
"""Scenes of the training split whose latents are computed once."""
STAGES = {"low": 8, "middle": 16, "high": 32}
"""Stage -> tokens of a side."""
PROMPTS = ("a frog and an apple", "two dogs on green", "a panda", "a cat and a balloon", "a guitar and a robot", "three fish",
           "a tiger on white", "a pizza and a cake", "an owl, outlined", "a house and two trees", "a car on blue", "a penguin")


class SceneVaeTask(VaeTask):
    """The autoencoder on scenes."""

    def images(self, step: int) -> Tensor:
        """The next scenes of the training split; every third batch at half the size, for the coarser stages use it too."""
        start = step * BATCH_SIZE % NUM_SCENES
        signed = to_signed(load_scenes("train", NUM_SCENES).images[start:start + BATCH_SIZE])
        return torch.nn.functional.avg_pool2d(signed, 2) if step % 3 == 2 else signed

    def held_out(self) -> Tensor:
        """Twelve scenes of the validation split."""
        return to_signed(load_scenes("validation", 12).images[:])


class SceneFlowTask(FlowTask):
    """A stage of the transformer on scenes; latents are computed once for each stage and kept beside the checkpoints."""

    grids = STAGES
    batch_sizes = {"low": 64, "middle": 32, "high": 16}
    schedules = {"low": LearningRate(peak=1e-3, decay_from=0.9, floor=0.5),
                 "middle": LearningRate(peak=8e-4, decay_from=0.9, floor=0.5),
                 "high": LearningRate(peak=6e-4, decay_from=0.5, floor=0.02)}
    prompts = PROMPTS

    def __init__(self, name: str, vae: AutoencoderTiny, folder: Path, *, compiled: bool) -> None:
        self.folder = folder
        super().__init__(name, vae, compiled=compiled)

    def words(self) -> CLIPTokenizer:
        """Every word that a caption of a scene can hold."""
        return build_tokenizer(tuple(all_words()), MAX_LENGTH)

    def pairs(self) -> tuple[Tensor, list[str]]:
        """Raw latents (n, 4, grid, grid), memory-mapped half floats, and captions."""
        scenes = load_scenes("train", NUM_SCENES)
        path = self.folder / f"latents_{self.name}.npy"
        if not path.exists():
            encoded = encode_all(self.vae, scenes.images, shrink=GRID // self.grid)
            with writing(path) as file:
                np.save(file, encoded.half().numpy())
        return torch.from_numpy(np.load(path, allow_pickle=False)).float(), scenes.captions

    def untrained(self) -> EmojiModel:
        """The module, for a grid of 32."""
        return EmojiModel(self.tokenizer, GRID)


def train_vae(checkpoints: Path, minutes: float, steps: int | None) -> None:
    """Train the autoencoder and save its averaged weights as checkpoints/vae, with the latents' scale."""
    loop = ModelTraining(SceneVaeTask(build_vae()), checkpoints)
    loop.run(minutes, steps)
    set_latent_scale(loop.averaged, load_scenes("train", 512))
    loop.averaged.save_pretrained(checkpoints / "vae")


def train_flow(stage: str, checkpoints: Path, minutes: float, steps: int | None, *, compiled: bool) -> None:
    """Train one stage of the transformer, from the weights of the stage before."""
    torch.manual_seed(0)
    task = SceneFlowTask(stage, load_vae(checkpoints / "vae"), checkpoints, compiled=compiled)
    names = list(STAGES)
    earlier = [checkpoints / f"{name}.pt" for name in names[:names.index(stage)]]
    resume_from = next((path for path in reversed(earlier) if path.exists()), None)
    ModelTraining(task, checkpoints, resume_from=resume_from).run(minutes, steps)


def train_stage(stage: str, checkpoints: Path, minutes: float, steps: int | None, *, compiled: bool) -> None:
    """One stage: vae, or one of `STAGES`."""
    if stage == "vae":
        train_vae(checkpoints, minutes, steps)
    else:
        train_flow(stage, checkpoints, minutes, steps, compiled=compiled)
