"""The soft rank: how many tokens score higher, made differentiable; exact and binned.

Source: Shiva-DiT, arXiv:2602.05605, section 3.2 (Eq. 5, 6, 30), Algorithm 1 and appendix A.1.
Differs: gradients are closed forms. The exact rank is computed block by block of the score matrix, so that no (N, N) tensor
exists; the binned rank is an approximation in O(N) that the paper does not have.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 15 << 15
"""Of one block of the score matrix: 1.9 MiB in float32. Smaller blocks cost more in calls, larger ones miss the memory bar."""
NUM_BINS = 4096


# ------------------------------------------------------------------------------------------ exact


def pairwise_rank(scores: Tensor, tau: float) -> Tensor:
    """Soft rank (B, N) in one expression: the form that a compiler fuses, so that no (B, N, N) tensor is written."""
    return torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / tau).sum(-1) + 0.5


def pairwise_rank_gradient(scores: Tensor, grad: Tensor, tau: float) -> Tensor:
    """dL/ds (B, N) = (1/tau) sum_j sigma'((s_j - s_i)/tau) (g_j - g_i), from dL/d rank `grad` (B, N)  (appendix A.1)."""
    sigma = torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / tau)
    return (sigma * (1 - sigma) * (grad[:, None, :] - grad[:, :, None])).sum(-1) / tau


def _fill(scores: Tensor, tau: float) -> Callable[[Tensor, slice, slice], None]:
    """fill(block, rows, columns) writes sigma((s_j - s_i)/tau), rows i and columns j, into block (B, rows, columns).

    As 1 / (1 + e^(s_i/tau) e^(-s_j/tau)), which takes no exponential per pair, where the exponentials cannot overflow.
    """
    scaled = scores / tau
    low, high = scaled.aminmax(dim=-1, keepdim=True)
    if bool((high - low < 1.9 * math.log(torch.finfo(scores.dtype).max)).all()):
        up = torch.exp(scaled - (low + high) / 2)
        down = up.reciprocal()
        return lambda block, rows, columns: torch.mul(up[:, rows, None], down[:, None, columns],
                                                      out=block).add_(1).reciprocal_()
    return lambda block, rows, columns: torch.sub(scaled[:, None, columns], scaled[:, rows, None], out=block).sigmoid_()


def _blocks(scores: Tensor, tau: float, elements: int) -> Iterator[tuple[int, int, Tensor]]:
    """Row blocks of the upper triangle of sigma((s_j - s_i)/tau): (first row, last row, (B, rows, N - first row)).

    All of them live in one buffer, so a block is gone when the next is asked for.
    """
    batch, num_tokens = scores.shape
    fill, start = _fill(scores, tau), 0
    buffer = scores.new_empty(min(max(elements, batch * num_tokens), batch * num_tokens**2))
    while start < num_tokens:
        rest = num_tokens - start
        rows = min(rest, max(1, elements // (batch * rest)))
        block = buffer[:batch * rows * rest].view(batch, rows, rest)
        fill(block, slice(start, start + rows), slice(start, None))
        yield start, start + rows, block
        start += rows


def _blocked_rank(scores: Tensor, tau: float, elements: int) -> Tensor:
    rank = torch.full_like(scores, 0.5)  # the sums hold j = i, which adds 1/2: 1 + sum_{j != i} = 1/2 + sum_j
    for start, stop, sigma in _blocks(scores, tau, elements):
        rank[:, start:stop] += sigma.sum(-1)
        rank[:, stop:] += (stop - start) - sigma[:, :, stop - start:].sum(1)  # sigma(-x) = 1 - sigma(x)
    return rank


def _blocked_gradient(scores: Tensor, grad: Tensor, tau: float, elements: int) -> Tensor:
    """The slope is symmetric in (i, j), so d rank / d score is minus a weighted graph Laplacian over tau."""
    sides = torch.stack([grad, torch.ones_like(grad)], dim=1)  # (B, 2, N): a product gives sum_j d_ij g_j and sum_j d_ij
    sums = torch.zeros_like(sides)
    for start, stop, sigma in _blocks(scores, tau, elements):
        slope = sigma.addcmul_(sigma, sigma, value=-1)  # sigma' = sigma - sigma^2
        sums[:, 0, start:stop] += (slope @ grad[:, start:, None]).squeeze(-1)
        sums[:, 1, start:stop] += slope.sum(-1)
        sums[:, :, stop:] += sides[:, :, start:stop] @ slope[:, :, stop - start:]
    return (sums[:, 0] - sums[:, 1] * grad) / tau


@cache
def _compiled() -> tuple:
    return torch.compile(pairwise_rank, dynamic=True), torch.compile(pairwise_rank_gradient, dynamic=True)


class _SoftRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, tau: float, elements: int, fused: bool) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.tau, ctx.elements, ctx.fused = tau, elements, fused
        return _compiled()[0](scores, tau) if fused else _blocked_rank(scores, tau, elements)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (scores,) = ctx.saved_tensors
        if ctx.fused:
            return _compiled()[1](scores, grad, ctx.tau), None, None, None
        return _blocked_gradient(scores, grad, ctx.tau, ctx.elements), None, None, None


def soft_rank(scores: Tensor, tau: float, elements: int = BLOCK_ELEMENTS, fused: bool | None = None) -> Tensor:
    """Soft descending rank (B, N) of scores (B, N): 1 + sum_{j != i} sigmoid((s_j - s_i) / tau)  (Eq. 5).

    1 is the largest. The ranks of a row sum to N (N + 1) / 2 for any tau; adding a constant to the scores changes nothing.
    elements: of the score matrix held at a time, forward and backward (at least one row of it); only the scores are saved.
    fused: let torch.compile fuse the closed forms; None does so on CUDA.
    """
    return _SoftRank.apply(scores, tau, elements, scores.device.type == "cuda" if fused is None else fused)


# ------------------------------------------------------------------------------------------ binned


class _Bins:
    """Scores (B, N) on a grid of `num` points per row, each token shared between its two neighbours (linear interpolation)."""

    def __init__(self, scores: Tensor, tau: float, num: int) -> None:
        low, high = scores.aminmax(dim=-1, keepdim=True)
        self.num = num
        self.step = ((high - low) / (num - 1)).clamp_min(1e-6 * tau)  # (B, 1); equal scores fall on one point
        place = (scores - low) / self.step
        left = place.floor().clamp(0, num - 2)
        self.right_share = place - left
        self.left = left.long()
        self.offsets = torch.arange(1 - num, num, device=scores.device, dtype=scores.dtype) * self.step / tau  # (B, 2 num - 1)

    def spread(self, weight: Tensor) -> Tensor:
        """(B, N) -> (B, num): histogram of the tokens with these weights."""
        out = weight.new_zeros(weight.shape[0], self.num)
        right = weight * self.right_share
        return out.scatter_add_(1, self.left, weight - right).scatter_add_(1, self.left + 1, right)

    def read(self, curve: Tensor) -> Tensor:
        """(B, num) -> (B, N): the curve at each token's score."""
        return torch.lerp(curve.gather(1, self.left), curve.gather(1, self.left + 1), self.right_share)

    def convolve(self, kernel: Tensor, *histograms: Tensor) -> list[Tensor]:
        """Sum_n kernel[n - m] histogram[n] at every m; kernel (B, 2 num - 1) holds the offsets 1 - num .. num - 1."""
        size = 2 * self.num  # what wraps around falls outside the part that is read
        spectrum = torch.fft.rfft(kernel.flip(-1), size)
        products = (torch.fft.irfft(spectrum * torch.fft.rfft(h, size), size) for h in histograms)
        return [product[:, self.num - 1:2 * self.num - 1] for product in products]


class _SoftRankBinned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, tau: float, num_bins: int) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.tau, ctx.num_bins = tau, num_bins
        bins = _Bins(scores, tau, num_bins)
        (curve,) = bins.convolve(torch.sigmoid(bins.offsets), bins.spread(torch.ones_like(scores)))
        return bins.read(curve) + 0.5

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (scores,) = ctx.saved_tensors
        bins = _Bins(scores, ctx.tau, ctx.num_bins)
        slope = torch.sigmoid(bins.offsets) * torch.sigmoid(-bins.offsets)
        weighted, plain = bins.convolve(slope, bins.spread(grad), bins.spread(torch.ones_like(grad)))
        return (bins.read(weighted) - bins.read(plain) * grad) / ctx.tau, None, None


def soft_rank_binned(scores: Tensor, tau: float, num_bins: int = NUM_BINS) -> Tensor:
    """`soft_rank` (B, N) through a histogram of the scores and an FFT convolution with the sigmoid: O(N + bins log bins).

    The backward pass is the closed form on the same bins. The error in rank / N is about (range of scores / (bins tau))^2 / 40:
    under 1e-4 for normal scores of spread 1, 4,096 bins and tau 0.05. Ranks still sum to N (N + 1) / 2 and gradients to zero.
    """
    return _SoftRankBinned.apply(scores, tau, num_bins)


# ------------------------------------------------------------------------------------------ inclusion probability


def standardise(scores: Tensor) -> Tensor:
    """Scores (B, N) with mean 0 and spread 1 per row; both statistics are detached.

    The temperature of the soft rank means something only relative to the spread of the scores. The hard top-k is unchanged.
    """
    mean = scores.mean(-1, keepdim=True).detach()
    spread = scores.std(-1, keepdim=True).detach()
    return (scores - mean) / (spread + 1e-6)


def inclusion(scores: Tensor, k: Tensor | float, tau_rank: float, tau_sel: float, binned: bool = False) -> Tensor:
    """Inclusion probability pi (B, N) = sigmoid((k - rank) / (tau_sel N))  (Eq. 6 with the length normalisation of Eq. 30).

    k: continuous number of kept tokens, one for all rows or (B,): N times the keep ratio, so that d pi / d k > 0 reaches the
    ratio policy. Without the factor N the gate saturates and k collapses.
    """
    rank = soft_rank_binned(scores, tau_rank) if binned else soft_rank(scores, tau_rank)
    return torch.sigmoid((column(k, scores) - rank) / (tau_sel * scores.shape[-1]))


def column(k: Tensor | float, scores: Tensor) -> Tensor:
    """k, a number or (B,), as (1, 1) or (B, 1) in the type of `scores`."""
    return torch.as_tensor(k).to(scores).reshape(-1, 1)
