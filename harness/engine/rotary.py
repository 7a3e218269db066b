"""Rotary positions of the tokens that are computed, of all rows alike or of each row its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.api import Reduction


def gather_rotary(table: tuple[Tensor, Tensor], plan: Reduction, num_tokens: int) -> tuple[Any, Any]:
    """(cos, sin) tables of (T + N, d), text first, with the image rows of `plan` alone; one of their own for each row."""
    positions = plan.positions()
    num_text = table[0].shape[0] - num_tokens
    text = torch.arange(num_text, device=positions.device)
    if positions.ndim == 1:
        index = torch.cat([text, positions + num_text])
        return table[0].index_select(0, index), table[1].index_select(0, index)
    index = torch.cat([text.expand(positions.shape[0], -1), positions + num_text], dim=1)
    return _TablePerRow(table[0][index]), _TablePerRow(table[1][index])


class _TablePerRow:
    """A rotary table (B, S, d) where diffusers expects (S, d): it inserts its own axes by indexing, and gets ours instead."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __getitem__(self, index: Any) -> Tensor:
        if index != (None, slice(None), None, slice(None)):  # what `apply_rotary_emb` asks for with sequence_dim 1
            raise RuntimeError(f"this diffusers reads rotary tables by {index}, so rows of a batch cannot keep different tokens; "
                               "use a batch size of 1")
        return self._table[:, :, None, :]
