"""What is no number is named before it is cast to a picture: whose image, which step, which part of the model.

A cast to 8 bits hides it: NaN becomes black, infinity white, and two black images agree perfectly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.api import Backbone


def finite_rows(values: Tensor) -> Tensor:
    """(B,) bool: whether all numbers of a row of (B, ...) are finite."""
    return torch.isfinite(values).flatten(1).all(1)


class FiniteWatch:
    """The images of one batch; give it to `Loop` as `watch`. Nothing waits for the device until `check`."""

    def __init__(self, backbone: Backbone, method: str, seeds: Sequence[int], prompts: Sequence[str]) -> None:
        self.backbone, self.method, self.seeds, self.prompts = backbone, method, list(seeds), list(prompts)
        self._first: Tensor | None = None
        self._steps = 0

    def __call__(self, step: int, latents: Tensor, prediction: Tensor) -> None:
        """Note which predictions (B, C, H, W) of `step` are the first of their image that are not finite."""
        broken = ~finite_rows(prediction)
        before = torch.full_like(broken, -1, dtype=torch.int64) if self._first is None else self._first
        self._first = torch.where((before < 0) & broken, step, before)
        self._steps = step + 1

    def check(self, conditioning: Mapping[str, Tensor], latents: Tensor) -> None:
        """FloatingPointError for the first image whose loop gave no finite latents (B, C, H, W)."""
        broken = ~finite_rows(latents) | (self._first >= 0)
        if not bool(broken.any()):
            return
        index = int(broken.nonzero()[0])
        step = int(self._first[index])
        text = [name for name, rows in conditioning.items() if rows.is_floating_point() and not bool(torch.isfinite(rows).all())]
        if text:
            raise self._error(index, f"the text encoder's {text[0]}", "")
        at = f" at step {max(step, 0)} of {self._steps} (the first is 0)"
        part = "the transformer's prediction" if step >= 0 else f"what {type(self.backbone.scheduler).__name__} made of it"
        raise self._error(index, part, at if step >= 0 else "")

    def check_images(self, images: Tensor) -> None:
        """FloatingPointError for the first of the decoded images (B, 3, height, width) that is not finite."""
        whole = finite_rows(images).tolist()
        if not all(whole):
            raise self._error(whole.index(False), "the picture that the autoencoder decoded", "")

    def _error(self, index: int, part: str, at: str) -> FloatingPointError:
        dtype = str(self.backbone.transformer.dtype).removeprefix("torch.")
        remedy = ("float16 ends at 65504: set backbone.dtype: bfloat16 or float32" if dtype == "float16" else
                  f"check the weights of the backbone, and method '{self.method}' at these options")
        return FloatingPointError(f"seed {self.seeds[index]}, prompt '{self.prompts[index][:60]}', backbone "
                                  f"'{self.backbone.name}' in {dtype}, method '{self.method}': {part} is NaN or infinite{at}, so "
                                  f"there is no picture; {remedy}")
