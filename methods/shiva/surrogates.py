"""Surrogates: what stands in for hard top-k in the backward pass, as inclusion probabilities pi (B, N).

================  ====================================================  =============  ==============  ==============
surrogate         pi_i                                                  sum of pi      sum of dpi/dk   cost
================  ====================================================  =============  ==============  ==============
soft_rank         sigmoid((k - soft rank_i) / (tau_sel N))              not k          near 1, less    N^2, memory N
                                                                                        as k nears N
soft_rank_binned  the same, ranks from a histogram and an FFT           not k          the same        N
sum_to_k          sigmoid(s_i / tau_rank + c), c solved for the sum     k              1               N
softsort          the first k rows of SoftSort, added, at most 1        at most k      at most 1       N^2, memory N
neuralsort        the first k rows of NeuralSort, added, at most 1      at most k      at most 1       N^2, N <= 1024
gumbel            sum_to_k of scores under Gumbel instead of Gaussian   k              1               N
                  noise, whose hard top-k samples without replacement
sigmoid           sigmoid(s_i): no competition, no gradient to k        free           0               N
================  ====================================================  =============  ==============  ==============

tau_rank and the scores are in units of the scores' spread. SoftSort and NeuralSort normalise over tokens per rank, not over
ranks per token, so a higher score can have a lower pi (by 0.1 among 60 normal scores at tau 0.2); the others are monotone.

Source: soft_rank: Shiva-DiT, arXiv:2602.05605, Eq. 5, 6, 30. softsort: Prillo & Eisenschlos 2020, arXiv:2006.16038.
neuralsort: Grover et al. 2019, arXiv:1903.08850. gumbel: Kool et al. 2019, arXiv:1903.06059, for the perturbation.
Differs: SoftSort and NeuralSort make permutation matrices; their first k rows are added up, a broken k taking part of a row.
NeuralSort's temperature grows with sqrt(N), for its logits do. The Gumbel row relaxes by sum_to_k, which its sources do not.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from harness.api import did_you_mean, require
from methods.shiva import soft_topk
from methods.shiva.soft_topk import column

NEURALSORT_MAX_TOKENS = 1024
ROWS = 128
BISECTIONS = 60
Surrogate = Callable[[Tensor, Tensor, float, float], Tensor]


def inclusion(surrogate: str, scores: Tensor, k: Tensor | float, tau_rank: float, tau_sel: float) -> Tensor:
    """Inclusion probabilities pi (B, N) of standardised scores (B, N) for k kept tokens.

    surrogate: one of SURROGATE_NAMES. k: continuous, in [0, N], one for all rows or (B,). tau_rank: temperature in units of the
    spread of the scores. tau_sel: width of the soft rank's threshold as a fraction of N; the other surrogates do not read it.
    """
    require(surrogate in SURROGATES,
            f"shiva.surrogate: unknown surrogate '{surrogate}'.{did_you_mean(surrogate, SURROGATE_NAMES)}")
    return SURROGATES[surrogate](scores, torch.as_tensor(k, dtype=scores.dtype, device=scores.device), tau_rank, tau_sel)


def perturbation(surrogate: str, uniform: Tensor, spread: float) -> Tensor:
    """Noise (B, N) to add to the scores, from uniform numbers (B, N) in [0, 1): Gaussian, or Gumbel for `gumbel`.

    spread: factor on the standard distribution (a standard Gumbel has mean 0.58 and standard deviation 1.28).
    """
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    return spread * (-torch.log(-torch.log(uniform)) if surrogate == "gumbel" else torch.special.ndtri(uniform))


# ------------------------------------------------------------------------------------------ soft rank


def _soft_rank(scores: Tensor, k: Tensor, tau_rank: float, tau_sel: float) -> Tensor:
    return soft_topk.inclusion(scores, k, tau_rank, tau_sel)


def _soft_rank_binned(scores: Tensor, k: Tensor, tau_rank: float, tau_sel: float) -> Tensor:
    return soft_topk.inclusion(scores, k, tau_rank, tau_sel, binned=True)


# ------------------------------------------------------------------------------------------ sum to k


class _SumToK(torch.autograd.Function):
    """pi = sigmoid(s / tau + c) with sum(pi) = k; c by bisection, its gradient by the implicit function theorem."""

    @staticmethod
    def forward(ctx, scores: Tensor, k: Tensor, tau: float) -> Tensor:
        scaled, num_tokens = scores.double() / tau, scores.shape[1]
        wanted = column(k, scaled).clamp(1e-6 * num_tokens, (1 - 1e-6) * num_tokens)  # at 0 and N the shift is infinite
        level = torch.logit(wanted / num_tokens)  # with all scores equal, c = level - s / tau: so these bracket it
        low, high = level - scaled.amax(-1, keepdim=True), level - scaled.amin(-1, keepdim=True)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            short = torch.sigmoid(scaled + middle).sum(-1, keepdim=True) < wanted
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        logits = scaled + (low + high) / 2
        ctx.save_for_backward(logits)
        ctx.tau, ctx.k_shape = tau, k.shape
        return torch.sigmoid(logits).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (logits,) = ctx.saved_tensors
        slope = torch.sigmoid(logits) * torch.sigmoid(-logits)  # d pi_i / d c
        shares = slope / slope.sum(-1, keepdim=True).clamp_min(1e-300)  # d pi_i / d k, which sum to 1
        along_k = (shares * grad).sum(-1, keepdim=True)
        along_scores = slope * (grad - along_k) / ctx.tau  # (diag(v) - v v^T / sum(v)) g, v = slope / tau
        along_k = along_k.sum_to_size(ctx.k_shape.numel(), 1).reshape(ctx.k_shape)
        return along_scores.to(grad.dtype), along_k.to(grad.dtype), None


def sum_to_k(scores: Tensor, k: Tensor, tau_rank: float, tau_sel: float = 0.0) -> Tensor:
    """pi (B, N) = sigmoid(scores / tau_rank + c), c such that every row sums to k. tau_sel is not read."""
    return _SumToK.apply(scores, k, tau_rank)


# ------------------------------------------------------------------------------------------ relaxed permutations


def _first_rows(k: Tensor, scores: Tensor) -> Tensor:
    """(B, N): how much of each row of a permutation matrix belongs to the first k rows.

    At a whole k the slope is that of row k alone (the left derivative), where that of a clamp would count rows k and k + 1.
    """
    left = column(k, scores) - torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
    return torch.where((left > 0) & (left <= 1), left, (left > 1).to(left)).expand_as(scores)


def softsort(scores: Tensor, k: Tensor, tau_rank: float, tau_sel: float = 0.0) -> Tensor:
    """pi (B, N) = sum of the first k rows of SoftSort, row j = softmax_i(-|s_[j] - s_i| / tau_rank), at most 1."""
    ordered, share = scores.sort(dim=-1, descending=True).values, _first_rows(k, scores)

    def add_rows(ordered: Tensor, share: Tensor) -> Tensor:
        rows = torch.softmax(-(ordered[:, :, None] - scores[:, None, :]).abs() / tau_rank, dim=-1)
        return (share[:, None, :] @ rows).squeeze(1)

    # rows are made again in the backward pass, a few at a time: memory O(B N ROWS)
    parts = [checkpoint(add_rows, o, s, use_reentrant=False, preserve_rng_state=False)
             for o, s in zip(ordered.split(ROWS, dim=1), share.split(ROWS, dim=1), strict=True)]
    return sum(parts).clamp_max(1)


def neuralsort(scores: Tensor, k: Tensor, tau_rank: float, tau_sel: float = 0.0) -> Tensor:
    """pi (B, N) = sum of the first k rows of NeuralSort, row j = softmax_i(((N + 1 - 2 j) s_i - sum_m |s_i - s_m|) / tau), at
    most 1; tau = tau_rank sqrt(N).

    Keeps several (B, N, N) tensors for the backward pass.
    """
    num_tokens = scores.shape[1]
    require(num_tokens <= NEURALSORT_MAX_TOKENS,
            f"surrogate 'neuralsort' keeps (B, N, N) tensors and takes at most {NEURALSORT_MAX_TOKENS} tokens, got {num_tokens}; "
            "use 'softsort', 'sum_to_k' or 'soft_rank_binned'")
    distance = (scores[:, :, None] - scores[:, None, :]).abs().sum(-1)  # A_s 1
    place = torch.arange(1, num_tokens + 1, device=scores.device, dtype=scores.dtype)
    logits = (num_tokens + 1 - 2 * place)[None, :, None] * scores[:, None, :] - distance[:, None, :]
    rows = torch.softmax(logits / (tau_rank * num_tokens**0.5), dim=-1)
    return (_first_rows(k, scores)[:, None, :] @ rows).squeeze(1).clamp_max(1)


# ------------------------------------------------------------------------------------------ without competition


def sigmoid(scores: Tensor, k: Tensor, tau_rank: float = 0.0, tau_sel: float = 0.0) -> Tensor:
    """pi (B, N) = sigmoid(scores): the plain straight-through gate. k and the temperatures are not read."""
    return torch.sigmoid(scores)


SURROGATES: dict[str, Surrogate] = {"soft_rank": _soft_rank, "soft_rank_binned": _soft_rank_binned, "sum_to_k": sum_to_k,
                                    "softsort": softsort, "neuralsort": neuralsort, "gumbel": sum_to_k, "sigmoid": sigmoid}
SURROGATE_NAMES = tuple(SURROGATES)
