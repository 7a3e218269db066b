"""Differentiable top-k: the surrogate inclusion probability that carries gradients to scores and to k.

Source: Shiva-DiT, arXiv:2602.05605, section 3.2 (Eq. 5, 6, 30), Algorithm 1 and appendix A.1.
"""

import torch
from torch import Tensor


class _SoftRank(torch.autograd.Function):
    """Soft descending rank with its closed-form backward; no (N, N) tensor outlives a chunk of rows."""

    @staticmethod
    def forward(ctx, scores: Tensor, tau: float, chunk: int) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.tau, ctx.chunk = tau, chunk
        parts = [torch.sigmoid((scores[:, None, :] - rows[:, :, None]) / tau).sum(-1) for rows in scores.split(chunk, dim=1)]
        return torch.cat(parts, dim=1) + 0.5  # the sum holds j = i, which adds 1/2: 1 + sum_{j != i} = 1/2 + sum_j

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (scores,) = ctx.saved_tensors
        parts = []
        for rows, grad_rows in zip(scores.split(ctx.chunk, dim=1), grad.split(ctx.chunk, dim=1), strict=True):
            sigma = torch.sigmoid((scores[:, None, :] - rows[:, :, None]) / ctx.tau)
            slope = sigma * (1 - sigma)  # symmetric in (i, j), so d rank / d score is a weighted graph Laplacian
            parts.append(torch.einsum("bij,bj->bi", slope, grad) - slope.sum(-1) * grad_rows)
        return torch.cat(parts, dim=1) / ctx.tau, None, None


def soft_rank(scores: Tensor, tau: float, chunk: int = 256) -> Tensor:
    """Soft descending rank (B, N) of scores (B, N): 1 + sum_{j != i} sigmoid((s_j - s_i) / tau)  (Eq. 5).

    1 is the largest. The ranks of a row sum to N (N + 1) / 2 for any tau; adding a constant to the scores changes nothing.
    Memory is O(B N chunk) forward and backward.
    """
    return _SoftRank.apply(scores, tau, chunk)


def standardise(scores: Tensor) -> Tensor:
    """Scores (B, N) with mean 0 and spread 1 per row; both statistics are detached.

    The temperature of the soft rank means something only relative to the spread of the scores. The hard top-k is unchanged.
    """
    mean = scores.mean(-1, keepdim=True).detach()
    spread = scores.std(-1, keepdim=True).detach()
    return (scores - mean) / (spread + 1e-6)


def inclusion(scores: Tensor, k: Tensor | float, tau_rank: float, tau_sel: float) -> Tensor:
    """Inclusion probability pi (B, N) = sigmoid((k - rank) / (tau_sel N))  (Eq. 6 with the length normalisation of Eq. 30).

    k: continuous number of kept tokens, N times the keep ratio, so that d pi / d k > 0 reaches the ratio policy. Without the
    factor N the gate saturates and k collapses.
    """
    return torch.sigmoid((k - soft_rank(scores, tau_rank)) / (tau_sel * scores.shape[-1]))
