"""The two flow-matching stages of the embedded backbone, and how it samples.

"low" learns on images of 32 px, 64 tokens, at a third of the price of a step; "high" continues with the same
weights on the 256 tokens of 64 px.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from harness.data.emoji import load_emoji
from harness.embedded.emoji_loop import LearningRate
from harness.embedded.emoji_model import LATENT_CHANNELS, NUM_ZERO_ROWS, EmojiModel
from harness.embedded.emoji_text import build_tokenizer, hide_words, token_ids
from harness.embedded.emoji_vae import encode_all, tile

GRIDS = {"low": 8, "high": 16}
BATCH_SIZES = {"low": 64, "high": 32}
SCHEDULES = {"low": LearningRate(peak=1e-3, decay_from=0.7, floor=0.5),
             "high": LearningRate(peak=8e-4, decay_from=0.5, floor=0.02)}
TRAIN_SHIFT = {"low": 1.0, "high": 1.0}
CAPTION_DROP = 0.1
HIDDEN_WORDS = 0.01

SAMPLE_SHIFT = 1.0
GUIDANCE_SCALE = 2.0
NUM_STEPS = 20
PROMPTS = (
    "red apple on a white background", "smiling face with sunglasses on a blue background",
    "pizza on a teal background", "dog face on a yellow background",
    "cat face on a purple background", "red heart on a white background",
    "banana on a blue background", "frog face on a pink background",
    "hamburger on a green background", "strawberry on a gray background",
    "angry face on a black background", "panda face on an orange background")


def sample_timesteps(batch_size: int, shift: float) -> Tensor:
    """Logit-normal timesteps (B,) in (0, 1), stratified over the batch, shifted towards noise as SD3 does."""
    uniform = (torch.randperm(batch_size) + torch.rand(batch_size)) / batch_size
    timestep = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)).sigmoid()
    return shift * timestep / (1 + (shift - 1) * timestep)


class FlowTask:
    """A stage that trains transformer and text encoders on cached latents of the train split."""

    schedules: Mapping[str, LearningRate] = SCHEDULES
    batch_sizes: Mapping[str, int] = BATCH_SIZES
    grids: Mapping[str, int] = GRIDS
    prompts: tuple[str, ...] = PROMPTS
    """What the picture shows, two rows of six."""

    def __init__(self, name: str, vae: AutoencoderTiny, *, compiled: bool) -> None:
        self.name, self.vae = name, vae
        self.schedule, self.batch_size, self.grid = self.schedules[name], self.batch_sizes[name], self.grids[name]
        self.tokenizer = self.words()
        latents, captions = self.pairs()
        self.latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        self.ids = token_ids(self.tokenizer, captions)
        self.empty = token_ids(self.tokenizer, [""])
        self.module = self.untrained()
        self._forward: nn.Module = torch.compile(self.module, dynamic=False) if compiled else self.module
        self._order = torch.empty(0, dtype=torch.long)

    def words(self) -> CLIPTokenizer:
        """The tokenizer of the captions."""
        return build_tokenizer()

    def pairs(self) -> tuple[Tensor, list[str]]:
        """Raw latents (n, 4, grid, grid) and captions of what is trained on."""
        emoji = load_emoji("train")
        return encode_all(self.vae, emoji.images, shrink=self.grids["high"] // self.grid), emoji.captions

    def untrained(self) -> EmojiModel:
        """The module."""
        return EmojiModel(self.tokenizer)

    def begin(self) -> None:
        """Lay the grid of this stage over the picture; the table is part of the weights from here on."""
        self.module.set_grid(self.grid)

    def _captions(self, chosen: Tensor) -> Tensor:
        ids = hide_words(self.ids[chosen], self.tokenizer, HIDDEN_WORDS)
        return torch.where(torch.rand(len(ids), 1) < CAPTION_DROP, self.empty, ids)

    def loss(self, step: int) -> Tensor:
        """Rectified flow: mean squared error of the velocity noise - latents."""
        if len(self._order) < self.batch_size:
            self._order = torch.randperm(len(self.ids))
        chosen, self._order = self._order.split((self.batch_size, len(self._order) - self.batch_size))
        latents = self.latents[chosen]
        noise = torch.randn_like(latents)
        timestep = sample_timesteps(len(latents), TRAIN_SHIFT.get(self.name, 1.0))
        t = timestep.view(-1, 1, 1, 1)
        num_zero_rows = torch.tensor(NUM_ZERO_ROWS)[torch.randint(len(NUM_ZERO_ROWS), (len(latents),))]
        noisy = (1 - t) * latents + t * noise
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self._forward(noisy, timestep, self._captions(chosen), num_zero_rows)
        return (velocity.float() - (noise - latents)).square().mean()

    def picture(self, averaged: EmojiModel) -> Image.Image:
        """The twelve prompts, guided, 20 steps."""
        latents = sample_latents(averaged, token_ids(self.tokenizer, list(self.prompts)), self.empty, grid=self.grid)
        return decode_tiled(self.vae, latents, columns=6)


@torch.no_grad()
def decode_tiled(vae: AutoencoderTiny, latents: Tensor, columns: int) -> Image.Image:
    """Unit-variance latents (B, 4, H, W) as one picture."""
    return tile(vae.decoder(latents / vae.config.scaling_factor + vae.config.shift_factor), columns)


def sampling_sigmas(num_steps: int, shift: float) -> Sequence[float]:
    """Noise levels from 1 to 0, num_steps + 1 of them, as `FlowMatchEulerDiscreteScheduler` spaces them."""
    sigmas = torch.linspace(1, 1 / 1000, num_steps)
    return [*(shift * sigmas / (1 + (shift - 1) * sigmas)).tolist(), 0.0]


@torch.no_grad()
def sample_latents(model: EmojiModel, ids: Tensor, empty: Tensor, *, grid: int, seed: int = 0,
                   guidance_scale: float = GUIDANCE_SCALE) -> Tensor:
    """Unit-variance latents (B, 4, grid, grid) by guided Euler steps, as the pipeline draws them."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(ids), LATENT_CHANNELS, grid, grid, generator=generator)
    both = torch.cat([empty.expand(len(ids), -1), ids])
    rows = torch.full((len(both),), NUM_ZERO_ROWS[0])
    sigmas = sampling_sigmas(NUM_STEPS, SAMPLE_SHIFT)
    for now, then in pairwise(sigmas):
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(torch.cat([latents, latents]), torch.full((len(both),), now), both, rows).float()
        unguided, guided = velocity.chunk(2)
        latents = latents + (then - now) * (unguided + guidance_scale * (guided - unguided))
    return latents
