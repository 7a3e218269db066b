"""CLIP by transformers: cosines between images and texts. Shared by clip_score and clip_iqa.

Source: Radford et al. 2021, arXiv:2103.00020. Input as the model's own processor makes it from the 8-bit image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.api import require
from harness.metrics.extractors.weights import check_model, model_folder, model_id

PUBLISHED = "openai/clip-vit-large-patch14"
BATCH = 16
TOKENIZER, PROCESSOR = ("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Clip:
    """A CLIPModel with its processor. id: 12 hex digits over weights and settings."""

    model: Any
    processor: Any
    id: str

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) float32 embeddings of length 1; a text beyond the model's context is cut."""
        tokens = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt",
                                          max_length=self.model.config.text_config.max_position_embeddings)
        found = self.model.text_model(input_ids=tokens["input_ids"].to(self.model.device),
                                      attention_mask=tokens["attention_mask"].to(self.model.device))
        return _unit(self.model.text_projection(found.pooler_output))

    @torch.no_grad()
    def images(self, images: np.ndarray, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """(n, d) float32 embeddings of length 1, of (n, height, width, 3) uint8 images."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = [np.asarray(image) for image in images[start:start + BATCH]]
            pixels = self.processor.image_processor(images=batch, return_tensors="pt", input_data_format="channels_last")
            found = self.model.vision_model(pixel_values=pixels["pixel_values"].to(self.model.device))
            parts.append(_unit(self.model.visual_projection(found.pooler_output)))
            progress(min(start + BATCH, len(images)), len(images))
        return torch.cat(parts)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax."""
        return float(self.model.logit_scale.detach().exp())


def _unit(vectors: Tensor) -> Tensor:
    return vectors.float() / vectors.float().norm(dim=-1, keepdim=True)


def check(where: str, weights: str | None) -> None:
    """ConfigError naming the option `where` unless `weights` is a folder with a whole CLIP, or may be an id on the hub."""
    if weights is None:
        return
    check_model(where, weights, "clip")
    folder = Path(weights).expanduser()
    for what, names in (("tokenizer", TOKENIZER), ("image processor", PROCESSOR)):
        require(not folder.exists() or any((folder / name).exists() for name in names),
                f"{where}: '{weights}' holds no {what} ({' or '.join(names)}); save the processor beside the model")


def build(weights: str | None, device: torch.device) -> Clip:
    """CLIP from a checked folder or id; None is openai/clip-vit-large-patch14. Raises Unavailable when it cannot be had."""
    folder = model_folder(weights or PUBLISHED)
    found = model_id(folder, "clip")
    model, processor = _loaded(str(folder), found)
    return Clip(model.to(device), processor, found)


@lru_cache(maxsize=1)
def _loaded(folder: str, content: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False), \
        CLIPProcessor.from_pretrained(folder)


def scorer_id(weights: str | None, clip: Clip) -> str:
    """For notes: the model as written and the id of its content."""
    return f"{Path(weights or PUBLISHED).name}-{clip.id[:8]}"
