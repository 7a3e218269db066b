"""What a training minimises beside the method's own terms. Written once: training, validation, metrics, benchmarks and studies
compare with this.

Source: Shiva-DiT, arXiv:2602.05605, Eq. 14 and 31. Differs: means in place of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

Features = Sequence[tuple[Tensor, Tensor]]
"""(input, output) image tokens (B, N, D) of each block."""


def squared_error(found: Tensor, wanted: Tensor, per_row: bool = False) -> Tensor:
    """Mean squared error of (B, ...): of everything, in float32; or (B,) of each row, in float64, for small losses."""
    if not per_row:
        return F.mse_loss(found.float(), wanted.float())
    return F.mse_loss(found.double(), wanted.double(), reduction="none").flatten(1).mean(1)


def normalised_error(found: Tensor, wanted: Tensor, per_row: bool = False) -> Tensor:
    """`squared_error` of features (B, N, D), each token after a layer norm without parameters (Eq. 31)."""
    width = found.shape[-1:]
    return squared_error(F.layer_norm(found.float(), width), F.layer_norm(wanted.float(), width), per_row)


def taps(num_blocks: int, every: int) -> range:
    """The blocks after which features are compared: every `every`-th, the first of them `every - 1`."""
    return range(every - 1, num_blocks, every)


def diffusion(predictions: Sequence[Tensor], target: Tensor, per_row: bool = False) -> Tensor:
    """The squared errors of all passes' predictions (B, C, H, W) to the target of diffusion, added."""
    return sum(squared_error(prediction, target, per_row) for prediction in predictions)


def distillation(predicted: tuple[Tensor, Tensor], features: tuple[Features, Features], every: int,
                 per_row: bool = False) -> Tensor:
    """The prediction's squared error to the teacher's, and the mean over taps of the features'.

    predicted, features: of the student and of the teacher.
    """
    found, wanted = features
    errors = [normalised_error(found[tap][1], wanted[tap][1], per_row) for tap in taps(len(wanted), every)]
    return squared_error(*predicted, per_row) + (sum(errors) / len(errors) if errors else 0.0)
