"""The autoencoder of the embedded backbone: 64x64 px to 16x16x4 latents, one network for 64 and 32 px.

The loss is L1 on pixels, on their differences (edges) and on a halved copy (shapes). Latents are pulled to
zero mean and unit variance per channel, and noise is added before decoding, so that the decoder forgives the
small errors that a diffusion model makes. The decoder's last stage has no residual block: at full resolution
that one block would cost more than the rest of the network.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from harness.data.emoji import COLOURS, EmojiSet, load_emoji, load_sprites
from harness.embedded.emoji_loop import LearningRate

WIDTH = 64
LATENT_NOISE = 0.12
BATCH_SIZE = 32


def build_vae() -> AutoencoderTiny:
    """An untrained autoencoder, 3 levels, 4 latent channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3, num_encoder_blocks=(0, 1, 2),
        decoder_block_out_channels=(WIDTH,) * 3, num_decoder_blocks=(2, 1, 0), latent_channels=4)


def to_signed(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def augmented_batch(rng: np.random.Generator) -> Tensor:
    """(B, 3, H, W) in [-1, 1]: sprites mirrored, shifted, on named or random colours, at 64 or 32 px."""
    _, sprites = load_sprites()
    chosen = sprites[rng.integers(len(sprites), size=BATCH_SIZE)].astype(np.float32) / 255
    if rng.random() < 0.5:
        chosen = chosen[:, :, ::-1]
    chosen = np.roll(chosen, rng.integers(-2, 3, size=2), axis=(1, 2))
    named = np.asarray(list(COLOURS.values()), np.float32) / 255
    colour = np.where(rng.random((BATCH_SIZE, 1)) < 0.7, named[rng.integers(len(named), size=BATCH_SIZE)],
                      rng.random((BATCH_SIZE, 3))).astype(np.float32)
    alpha = chosen[..., 3:]
    images = torch.from_numpy(chosen[..., :3] * alpha + colour[:, None, None] * (1 - alpha))
    images = images.permute(0, 3, 1, 2).mul(2).sub(1)
    return F.avg_pool2d(images, 2) if rng.random() < 0.35 else images


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels + L1 of neighbour differences + L1 of the halved images, a scalar."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(error, 2).abs().mean()


def latent_penalty(latents: Tensor) -> Tensor:
    """How far each channel is from zero mean and unit variance, a scalar."""
    mean = latents.mean(dim=(0, 2, 3))
    log_std = latents.var(dim=(0, 2, 3)).add(1e-6).log() / 2
    return (mean.square() + log_std.square()).mean()


class VaeTask:
    """A stage that trains the autoencoder, or with `decoder_only` its decoder for the latents as they are."""

    def __init__(self, vae: AutoencoderTiny, *, decoder_only: bool = False) -> None:
        self.name = "decoder" if decoder_only else "vae"
        self.module = vae.to(memory_format=torch.channels_last).train()
        self.schedule = LearningRate(peak=1e-3 if decoder_only else 2e-3, decay_from=0.3, floor=0.01)
        self.decoder_only = decoder_only
        vae.encoder.requires_grad_(not decoder_only)

    def begin(self) -> None:
        """Nothing to prepare."""

    def loss(self, step: int) -> Tensor:
        """Reconstruction under latent noise, and while the encoder learns the pull to mean 0, variance 1."""
        images = self.images(step).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.module.encoder(images).float()
            output = self.module.decoder(latents + LATENT_NOISE * torch.randn_like(latents)).float()
        loss = reconstruction_loss(output, images)
        return loss if self.decoder_only else loss + 0.1 * latent_penalty(latents)

    def images(self, step: int) -> Tensor:
        """The batch of a step, (B, 3, H, W) in [-1, 1]."""
        return augmented_batch(np.random.default_rng(step))

    def held_out(self) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] for the picture."""
        emoji = load_emoji("reference")
        return to_signed(emoji.images[:: len(emoji) // 11])

    @torch.no_grad()
    def picture(self, averaged: AutoencoderTiny) -> Image.Image:
        """Held-out images above their reconstructions."""
        images = self.held_out()
        output = averaged.decoder(averaged.encoder(images))
        return tile(torch.cat([images, output]), columns=len(images))


def tile(images: Tensor, columns: int) -> Image.Image:
    """(B, 3, H, W) in [-1, 1] as one picture with so many columns, each image enlarged to 128 px."""
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().byte()
    times = 128 // images.shape[-1]
    pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)
    rows = [torch.cat(list(row), dim=2) for row in pixels.split(columns)]
    return Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().numpy())


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, images: np.ndarray, shrink: int = 1) -> Tensor:
    """Raw latents (n, 4, H/4, W/4) of uint8 images (n, H, W, 3), made `shrink` times smaller first."""
    parts = []
    for start in range(0, len(images), 256):
        chunk = images[start:start + 256]
        signed = to_signed(chunk)
        parts.append(vae.encoder(F.avg_pool2d(signed, shrink) if shrink > 1 else signed))
    return torch.cat(parts)


@torch.no_grad()
def set_latent_scale(vae: AutoencoderTiny, emoji: EmojiSet) -> None:
    """Write scaling and shift into the config so that (latents - shift) * scaling has mean 0, variance 1."""
    latents = encode_all(vae, emoji.images)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5),
                           shift_factor=round(latents.mean().item(), 5))


@torch.no_grad()
def psnr_db(vae: AutoencoderTiny, emoji: EmojiSet, half: bool = False) -> float:
    """Mean reconstruction PSNR in dB over a set, pixels in [0, 1], latents without noise."""
    values = []
    for chunk in np.array_split(emoji.images, max(1, len(emoji) // 256)):
        images = F.avg_pool2d(to_signed(chunk), 2) if half else to_signed(chunk)
        output = vae.decoder(vae.encoder(images)).clamp(-1, 1)
        mse = ((output - images) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * mse.log10())
    return torch.cat(values).mean().item()


def load_vae(folder: Path) -> AutoencoderTiny:
    """The autoencoder saved in a folder, ready to use."""
    return AutoencoderTiny.from_pretrained(folder).eval()
