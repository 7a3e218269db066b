"""Token algebra: the only place that gathers, scatters and merges tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        if self.num_tokens == self.num_total:
            return hidden_states
        if self.indices.ndim == 1:
            return hidden_states.index_select(1, self.indices)
        return hidden_states.flatten(0, 1).index_select(0, self._rows()).unflatten(0, self.indices.shape)

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D): computed rows in their places, the rest from `bypass` (zero when None)."""
        if self.num_tokens == self.num_total:
            return computed
        if bypass is None:
            bypass = computed.new_zeros(computed.shape[0], self.num_total, computed.shape[-1])
        bypass = bypass.to(computed.dtype)  # under autocast a block may return another dtype than it was given
        if self.indices.ndim == 1:
            return bypass.index_copy(1, self.indices, computed)
        return bypass.flatten(0, 1).index_copy(0, self._rows(), computed.flatten(0, 1)).view_as(bypass)

    def positions(self) -> Tensor:
        """(M,) or (B, M)."""
        return self.indices

    def _rows(self) -> Tensor:
        """(B M,) into the rows of all images in one list: whole rows are copied 5 to 25 times faster than by gather, scatter."""
        batch = self.indices.shape[0]
        return (self.indices + self.num_total * torch.arange(batch, device=self.indices.device)[:, None]).flatten()


class CachedKeep(Keep):
    """Keep, where a token that is not computed repeats the residual of the last time that it was.

    residuals: (B, N, D) of the site's previous step, None before the first; `updated` holds the new ones after `restore`. At a
    branch the residual is the branch's output, for the block adds it.
    """

    def __init__(self, indices: Tensor, num_total: int, residuals: Tensor | None) -> None:
        super().__init__(indices, num_total)
        self._residuals = residuals
        self.updated: Tensor | None = None

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        self._selected = super().reduce(hidden_states)
        return self._selected

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D)."""
        old = self._residuals
        if bypass is None:
            self.updated = super().restore(computed, old)
            return self.updated
        old = torch.zeros_like(bypass) if old is None else old
        self.updated = super().restore(computed - self._selected, old)
        return super().restore(computed, bypass + old)


class AbsorbKeep(Keep):
    """Keep, where each token that is not computed is averaged into the most similar kept one and shares its residual.

    similar: (B, N, D), tokens to compare by cosine similarity. Unlike `Merge`, tokens keep what they were before the block:
    each member of a group adds the group's residual to itself. At a branch the residual is the branch's output.
    """

    def __init__(self, indices: Tensor, similar: Tensor) -> None:
        batch, num_total = similar.shape[:2]
        super().__init__(indices if indices.ndim == 2 else indices.expand(batch, -1), num_total)
        rejected = similar.new_ones(batch, num_total).scatter(1, self.indices, 0.0)
        others = rejected.topk(num_total - self.num_tokens, dim=1).indices  # (B, N - M), the complement, without a host sync
        unit = torch.nn.functional.normalize(similar.float(), dim=-1)
        rows = [unit.gather(1, index.unsqueeze(-1).expand(-1, -1, unit.shape[-1])) for index in (others, self.indices)]
        nearest = (rows[0] @ rows[1].transpose(1, 2)).argmax(-1)  # (B, N - M), a place among the kept
        own = torch.arange(self.num_tokens, device=nearest.device).expand(batch, -1)
        self._group = torch.zeros_like(rejected, dtype=torch.int64).scatter(1, self.indices, own).scatter(1, others, nearest)

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D): the mean of each kept token and those it absorbs."""
        batch, _, width = hidden_states.shape
        total = hidden_states.new_zeros(batch, self.num_tokens, width)
        total = total.scatter_add(1, self._group.unsqueeze(-1).expand(-1, -1, width), hidden_states)
        count = hidden_states.new_zeros(batch, self.num_tokens).scatter_add(
            1, self._group, hidden_states.new_ones(self._group.shape))
        self._mean = total / count.unsqueeze(-1)
        return self._mean

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D)."""
        residual = computed if bypass is None else computed - self._mean
        residual = residual.gather(1, self._group.unsqueeze(-1).expand(-1, -1, residual.shape[-1]))
        return residual if bypass is None else bypass + residual


class PerRow(Reduction):
    """A plan of its own for each row, for rows that keep different numbers of tokens.

    plans: one per row, None computes every token. Rows that share one plan object (or None) run together and see it with their
    rows alone; the others run one by one. num_tokens is the largest.
    """

    def __init__(self, plans: Sequence[Reduction | None], num_total: int) -> None:
        self.plans = list(plans)
        self._counts = [_count(plan, num_total) for plan in self.plans]
        self.num_tokens = max(self._counts)

    @property
    def mean_tokens(self) -> float:
        """Mean over the rows."""
        return sum(self._counts) / len(self._counts)

    def groups(self) -> list[tuple[list[int], Reduction | None]]:
        """(rows, their plan), in the order of the first row of each."""
        rows: dict[int, list[int]] = {}
        for row, plan in enumerate(self.plans):
            rows.setdefault(id(plan), []).append(row)
        return [(members, self.plans[members[0]]) for members in rows.values()]


class Mixture(Reduction):
    """Several plans run one after the other; their results (text too) are added with `weights`, which may carry gradients.

    Source: the two-bin passes of DiffCR, You et al. 2025, arXiv:2412.16822. weights: one scalar tensor per plan.
    """

    def __init__(self, plans: Sequence[Reduction | None], weights: Sequence[Tensor], num_total: int) -> None:
        self.plans, self.weights = list(plans), list(weights)
        self._counts = [_count(plan, num_total) for plan in self.plans]
        self.num_tokens = max(self._counts)

    @property
    def mean_tokens(self) -> float:
        """Weighted by `weights`: what one pass at the mixed ratio would compute."""
        return sum(count * float(weight.detach()) for count, weight in zip(self._counts, self.weights, strict=True))


def _count(plan: Reduction | None, num_total: int) -> int:
    """Tokens per row that `plan` computes of `num_total`; None, of a plan or in one, stands for all."""
    return num_total if plan is None or plan.num_tokens is None else plan.num_tokens


class Skip(Reduction):
    """Compute nothing: `residual` (B, N, D), nothing when None, is what the module adds to the image tokens; text passes as it
    came. Beside text an attention cannot be skipped: the text would lack what it gives.
    """

    num_tokens = 0

    def __init__(self, residual: Tensor | None = None) -> None:
        self._residual = residual

    def restore(self, computed: Tensor | None, bypass: Tensor | None) -> Tensor:
        """(B, N, D)."""
        return bypass if self._residual is None else bypass + self._residual


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


# ---------------------------------------------------------------------------------------------- groups of tokens


class Fold(Reduction):
    """Groups of tokens: each group is computed as one token, and each of its members gets the result.

    kept: (B, M) position of the token that represents a group. group: (B, N) the group, 0..M-1, of each token.
    mode: what is computed for a group: 'mean' of its members, 'prune' its representative alone, 'mlerp' the mean stretched to
    the largest norm among the members (ToFu, Kim et al. 2024, arXiv:2312.01026). A token alone in its group is never changed.
    """

    def __init__(self, kept: Tensor, group: Tensor, mode: str = "mean") -> None:
        self.kept, self.group, self.mode = kept, group, mode
        self.num_tokens = kept.shape[1]

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D). Sums and norms are taken in float32."""
        alone = _take(hidden_states, self.kept)
        if self.mode == "prune":
            return alone
        x = hidden_states.float()
        empty = x.new_zeros(alone.shape[:2])
        size = empty.scatter_add(1, self.group, torch.ones_like(x[..., 0])).unsqueeze(-1)
        folded = torch.zeros_like(alone, dtype=x.dtype).scatter_add(1, self.group.unsqueeze(-1).expand_as(x), x) / size
        if self.mode == "mlerp":
            largest = empty.scatter_reduce(1, self.group, x.norm(dim=-1), "amax").unsqueeze(-1)
            folded = folded / (folded.norm(dim=-1, keepdim=True) + 1e-6) * largest
        return torch.where(size > 1, folded.to(alone.dtype), alone)

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D): each token gets the output of its group."""
        return _take(computed, self.group)

    def positions(self) -> Tensor:
        """(B, M)."""
        return self.kept


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def fold_into(num_total: int, src: Tensor, dst: Tensor, mode: str = "mean") -> Fold:
    """The `Fold` of token src[b, i] into token dst[b, i], both (B, R) positions; no token is in both, none twice in src."""
    batch, num_folded = src.shape
    gone = torch.zeros(batch, num_total, device=src.device).scatter(1, src, 1.0)
    kept = gone.argsort(dim=1, stable=True)[:, : num_total - num_folded]
    slots = torch.arange(kept.shape[1], device=src.device).expand(batch, -1)
    group = torch.zeros_like(gone, dtype=torch.int64).scatter(1, kept, slots)
    return Fold(kept, group.scatter(1, src, group.gather(1, dst)), mode)


def fold_best(scores: Tensor, dst: Tensor, src: Tensor, num: int, bonus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(src, dst), each (B, num): the sources with the highest best score, and the destination that gave it.

    scores: (B, S, K) of sources src (B, S) to destinations dst (B, K). bonus: (B, S) added to the best scores.
    """
    best, nearest = scores.max(dim=-1)
    order = (best if bonus is None else best + bonus).topk(num, dim=1).indices
    return src.gather(1, order), dst.gather(1, nearest.gather(1, order))


def cosine(hidden_states: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """(B, S, K) cosine similarity of tokens src (B, S) and dst (B, K) of hidden_states (B, N, D), in float32."""
    unit = torch.nn.functional.normalize(hidden_states.float(), dim=-1)
    return _take(unit, src) @ _take(unit, dst).transpose(1, 2)


def cells(grid: tuple[int, int], side: int, device: torch.device) -> Tensor:
    """(K, side * side) positions of the tokens of each whole cell of the grid, cells and members in raster order."""
    height, width = grid[0] // side, grid[1] // side
    index = torch.arange(grid[0] * grid[1], device=device).view(grid)[: height * side, : width * side]
    return index.reshape(height, side, width, side).transpose(1, 2).reshape(height * width, side * side)


def tiling_sides(grid: tuple[int, int]) -> str:
    """'2, 7 or 14': sides of the square cells, of two tokens or more, that leave none of the grid over; for messages."""
    fit = [str(side) for side in range(2, min(grid) + 1) if grid[0] % side == 0 and grid[1] % side == 0]
    return " or ".join(filter(None, [", ".join(fit[:-1]), *fit[-1:]])) or "none but other resolutions"


def others(chosen: Tensor, num_total: int) -> Tensor:
    """(B, N - K) positions, ascending, of the tokens not in `chosen` (B, K)."""
    mask = torch.zeros(chosen.shape[0], num_total, device=chosen.device).scatter(1, chosen, 1.0)
    return mask.argsort(dim=1, stable=True)[:, : num_total - chosen.shape[1]]


class SoftMerge(Reduction):
    """Tiles of tokens mixed into fewer by a matrix before the module, and mixed back by another after it (ToMA).

    order: (N,) positions of the tokens, tile by tile. mix: (B, P, K, n), unmix: (B, P, n, K) for P tiles of n tokens.
    slots: (M,) the rows among P * K that are computed, for tiles that use fewer than K. kept: (B, M) position of each.
    """

    def __init__(self, order: Tensor, mix: Tensor, unmix: Tensor, slots: Tensor, kept: Tensor) -> None:
        self._order, self._mix, self._unmix, self._slots, self._kept = order, mix, unmix, slots, kept
        self._inverse = order.argsort()
        self.num_tokens = slots.shape[0]

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D)."""
        tiles = hidden_states.index_select(1, self._order).unflatten(1, (self._mix.shape[1], -1))
        return (self._mix.to(tiles.dtype) @ tiles).flatten(1, 2).index_select(1, self._slots)

    def restore(self, computed: Tensor, bypass: Tensor | None) -> Tensor:
        """(B, M, D) -> (B, N, D)."""
        num_tiles, num_slots = self._mix.shape[1:3]
        rows = computed.new_zeros(computed.shape[0], num_tiles * num_slots, computed.shape[-1])
        tiles = rows.index_copy(1, self._slots, computed).unflatten(1, (num_tiles, num_slots))
        return (self._unmix.to(tiles.dtype) @ tiles).flatten(1, 2).index_select(1, self._inverse)

    def positions(self) -> Tensor:
        """(B, M)."""
        return self._kept
