"""The dense model with adapters trained on the same data: the upper bound of what a trained method can keep.

Every token of every block is computed. Trained with the adapters, data, steps and batches of the other trained methods, on the
plain diffusion loss, it tells what of their quality is owed to the training alone.

Source: the row `Finetuned` of Shiva-DiT's Table 1, arXiv:2602.05605. Differs: the paper does not say how it was trained.
"""

from typing import Any

from torch import nn

from harness.api import METHODS, Stage, TrainableMethod


@METHODS.register("finetuned")
class Finetuned(TrainableMethod, nn.Module):
    """Nothing is attached to the model; its adapters train."""

    sites = frozenset()
    knob = None
    needs_adapters = True
    stages = (Stage("joint", share=1.0, adapters=True),)
    needs_teacher = False
    distils = False

    def start_stage(self, stage: str, generator: Any) -> list[dict[str, Any]]:
        """No parameters of its own: only the adapters train."""
        return []
