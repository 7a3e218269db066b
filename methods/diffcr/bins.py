"""From learned ratios to ratio bins, along a chain of single moves that a budget can be fitted on."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def bins_after(moves: int, ratio: Tensor, num_bins: int) -> Tensor:
    """(blocks, regions) bins, 1 the lowest and `num_bins` full, after the first `moves` of all single steps up.

    ratio: (blocks, regions). The steps are those that a growing common shift of all ratios, each rounded to its nearest bin,
    would take, in that order; ties go to the first entry. Without a shift it is the nearest bin of every ratio.
    """
    middles = (torch.arange(1, num_bins) + 0.5) / num_bins
    shifts = (middles - ratio.cpu().double().flatten()[:, None]).flatten()  # at which each step is due
    taken = shifts.argsort(stable=True)[:moves] // (num_bins - 1)
    return 1 + torch.bincount(taken, minlength=ratio.numel()).view(ratio.shape)


def nearest_moves(value: Callable[[int], float], num_moves: int, goal: float) -> int:
    """The number of moves, 0 to `num_moves`, whose `value` is nearest to `goal`; more moves must not lower it."""
    value = cache(value)  # counting a model takes seconds
    low, high = 0, num_moves
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if value(middle) >= goal else (middle, high)
    return min((low, high), key=lambda moves: abs(value(moves) - goal))
