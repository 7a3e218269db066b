"""Token algebra: the only place that gathers, scatters and merges tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.api import Reduction, require


def num_kept(keep_ratio: float, num_tokens: int, multiple: int = 1) -> int:
    """M, the tokens computed out of `num_tokens`: floor(N * keep_ratio), at least 1, rounded up to `multiple`, at most N.

    The floor is the paper's (Shiva-DiT, section 3.1). The only place where a ratio becomes a count, so that FLOPs, compiled
    shapes and training agree. A thousandth of a token is added before the floor: 0.29 * 100 is 28.999999999999996.
    """
    require(0 < keep_ratio <= 1, f"keep_ratio must lie in (0, 1], got {keep_ratio}")
    kept = max(1, int(num_tokens * keep_ratio + 1e-3))
    return min(num_tokens, -(-kept // multiple) * multiple)


class Keep(Reduction):
    """Compute a subset of the tokens; the others bypass the module.

    indices: (M,) when all rows keep the same tokens, else (B, M). They are sorted ascending here, which keeps the order of
    tokens and makes keeping everything bit-exact.
    """

    def __init__(self, indices: Tensor, num_total: int) -> None:
        self.indices = indices.sort(dim=-1).values
        self.num_total = num_total
        self.num_tokens = indices.shape[-1]

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        if self.indices.ndim == 1:
            return hidden_states.index_select(1, self.indices)
        return hidden_states.gather(1, self._expanded(hidden_states.shape[-1]))

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D): computed rows in their places, the rest from `bypass` (zero when None)."""
        if bypass is None:
            bypass = computed.new_zeros(computed.shape[0], self.num_total, computed.shape[-1])
        bypass = bypass.to(computed.dtype)  # under autocast a block may return another dtype than it was given
        if self.indices.ndim == 1:
            return bypass.index_copy(1, self.indices, computed)
        return bypass.scatter(1, self._expanded(computed.shape[-1]), computed)

    def positions(self) -> Tensor:
        """(M,) or (B, M)."""
        return self.indices

    def _expanded(self, width: int) -> Tensor:
        return self.indices.unsqueeze(-1).expand(-1, -1, width)


class Merge(Reduction):
    """Fold tokens together before the module and copy the result back to every member (a merge / unmerge pair).

    Source: Bolya & Hoffman 2023, arXiv:2303.17604. At a block site the restored rows replace `bypass`.
    """

    def __init__(self, merge: Callable[[Tensor], Tensor], unmerge: Callable[[Tensor], Tensor], num_tokens: int) -> None:
        self._merge, self._unmerge, self.num_tokens = merge, unmerge, num_tokens

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        return self._merge(hidden_states)

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D): each token gets the output of the token it was folded into."""
        return self._unmerge(computed)


def top_indices(scores: Tensor, num: int, halves: int = 1, unify: str = "max") -> Tensor:
    """(B, num) indices of the largest scores (B, N); with two guided halves both get the same set.

    unify: how the halves' scores meet: 'max' (Shiva-DiT, Eq. 32), 'mean', 'cond' (the conditional half), 'off' (each half
    chooses for itself). Rows must be [unconditional; conditional].
    """
    if halves == 2 and unify != "off":
        uncond, cond = scores.chunk(2)
        scores = {"max": torch.maximum(uncond, cond), "mean": (uncond + cond) / 2, "cond": cond}[unify]
        return scores.topk(num, dim=-1).indices.repeat(2, 1)
    return scores.topk(num, dim=-1).indices


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
