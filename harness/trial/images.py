"""The images of a trial: what each seed is asked to show, sampling, the shared dense images, and saving."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness import data
from harness.api import METHODS, Backbone, Method
from harness.engine.injection import Injection
from harness.engine.sampler import Loop, SamplerConfig, sample
from harness.storage import arrays
from harness.storage.code_hash import code_hash
from harness.storage.durable import writing
from harness.storage.store import Store

Progress = Callable[[str, int, int], None]

GRID_IMAGES, GRID_COLUMNS, GRID_SIDE_PX, GRID_CAPTION_PX = 12, 6, 160, 30


@dataclass(frozen=True)
class SampledImages:
    """images: (n, height, width, 3) uint8. kept: fractions of tokens as executed, {'attention' | 'ffn': [step][block]}."""

    images: np.ndarray
    kept: dict[str, list[list[float]]]


@lru_cache(maxsize=4)
def _shuffled_captions(options: str, split: str) -> tuple[str, ...]:
    """The captions of a split in an order that is fixed by their ids, so that any stretch of seeds is a mixture."""
    images = data.load(json.loads(options), split)
    order = sorted(range(len(images.captions)), key=lambda i: hashlib.sha256(images.ids[i].encode()).digest())
    return tuple(images.captions[i] for i in order)


def prompts_of(options: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """The prompt of each seed: a function of the data set and that seed only; n consecutive seeds take n different pairs."""
    captions = _shuffled_captions(json.dumps(options, sort_keys=True), options["split"])
    return [captions[seed % len(captions)] for seed in seeds]


def calibration_prompts(options: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """Training captions for what is fitted to images before sampling; where there are none, empty prompts, never the trial's."""
    if not data.can_train(options):
        return [""] * len(seeds)
    return prompts_of({**data.trained_on(options), "split": "train"}, seeds)


def sample_pictures(backbone: Backbone, method: Method, config: SamplerConfig, prompts: Sequence[str], seeds: Sequence[int],
                    progress: Callable[[int, int], None]) -> SampledImages:
    """Sample one image per seed, as the 8-bit pictures that are saved and measured."""
    kept: dict[str, list[list[float]]] = {}

    def read_tokens(live: Injection) -> None:
        kept.update({kind: live.token_count.kept(kind, live.run.num_steps) for kind in ("attention", "ffn")})

    images: np.ndarray | None = None
    progress(0, len(seeds))
    for batch in sample(backbone, method, config, prompts, seeds, read_tokens):
        pictures = (batch.images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        if images is None:
            images = np.empty((len(seeds), *pictures.shape[1:]), np.uint8)
        images[batch.indices] = pictures
        progress(batch.indices[-1] + 1, len(seeds))
    return SampledImages(images, kept)


def dense_pictures(backbone: Backbone, config: SamplerConfig, prompts: Sequence[str], seeds: Sequence[int], store: Store,
                   progress: Progress) -> SampledImages:
    """The dense model's images of the same seeds: made by whoever needs them first, read by everyone else."""
    loop = Loop(backbone, config)
    resolved = {**asdict(config), "num_steps": loop.scheduler_steps, "guidance_scale": loop.guidance_scale}
    inputs = {"backbone": backbone.fingerprint, "sampler": resolved, "prompts": list(prompts), "seeds": list(seeds),
              "device": backbone.transformer.device.type,
              "code": code_hash(__name__, type(backbone), METHODS.get("dense"))}

    def make(folder: Path) -> None:
        made = sample_pictures(backbone, METHODS.build("dense", {}), config, prompts, seeds,
                               lambda done, total: progress("sample dense", done, total))
        arrays.save(folder / "images.npz", images=made.images)

    return SampledImages(arrays.load(store.get_or_make("dense", inputs, make) / "images.npz")["images"], {})


def save_pictures(path: Path, images: np.ndarray, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Write images (n, height, width, 3) uint8, prompts and seeds as one npz."""
    arrays.save(path, images=images, prompts=np.array(prompts), seeds=np.array(seeds, np.int64))


def save_grid(path: Path, images: np.ndarray, prompts: Sequence[str]) -> None:
    """Write the first images with their prompts as one picture; all methods show the same seeds."""
    count = min(GRID_IMAGES, len(images))
    columns, rows = min(GRID_COLUMNS, count), -(-count // GRID_COLUMNS)
    canvas = Image.new("RGB", (columns * GRID_SIDE_PX, rows * (GRID_SIDE_PX + GRID_CAPTION_PX)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for index in range(count):
        left, top = index % GRID_COLUMNS * GRID_SIDE_PX, index // GRID_COLUMNS * (GRID_SIDE_PX + GRID_CAPTION_PX)
        small = images.shape[1] < GRID_SIDE_PX
        picture = Image.fromarray(images[index]).resize((GRID_SIDE_PX - 4,) * 2,
                                                        Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
        canvas.paste(picture, (left + 2, top + 2))
        draw.multiline_text((left + 3, top + GRID_SIDE_PX - 1), _wrapped(prompts[index]), fill="black", font=font, spacing=1)
    with writing(path) as file:
        canvas.save(file, "png")


def _wrapped(text: str, width: int = 30, lines: int = 2) -> str:
    words, out = text.split(), [""]
    for word in words:
        if out[-1] and len(out[-1]) + len(word) >= width:
            out.append("")
        out[-1] = f"{out[-1]} {word}".strip()
    return "\n".join(out[:lines])
