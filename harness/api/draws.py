"""Random numbers that depend on what they are for and on nothing else: no state, any order, any batch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

_MIX_1, _MIX_2, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # splitmix64, as signed int64


def _mix(x: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele et al. 2014); int64 products wrap, shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hashed_uniform(seeds: Tensor, step: int, block: int, num: int) -> Tensor:
    """(B, num) float32 uniform numbers in [0, 1) from a hash of (seed, step, block, index).

    Counter-based, so a number depends on no batch, order, device or earlier draw, and drawing costs no host sync.
    """
    counter = torch.arange(num, device=seeds.device, dtype=torch.int64)
    offset = (_GOLDEN * (1 + step * 4096 + block) + 2**63) % 2**64 - 2**63  # wrapped to int64 as the tensor ops are
    state = _mix(seeds.to(torch.int64) + offset)
    bits = _mix(state[:, None] + counter * _GOLDEN)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / float(1 << 24)
