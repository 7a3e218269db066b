"""`soft-topk`: the soft rank against naive autograd, forward and backward: time, memory, error.

Bars at N = 4096 on one sample: the exact form takes at most 1/50 of the memory and is at least 5 times faster; the binned form
is within 1e-3 (rank / N, and relative error of the gradient) and at least 50 times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness.bench.measurements import Bar, Measurement
from harness.bench.memory import peak_bytes
from harness.bench.options import BenchOptions
from harness.bench.timing import interleave
from methods.shiva.soft_topk import pairwise_rank, soft_rank, soft_rank_binned, standardise

SIZES = (256, 1024, 4096)
TAU = 0.2  # where training starts; a test covers the end, 0.05
BARS = {"exact": {"speed-up": Bar(">=", 5), "memory": Bar("<=", 1 / 50), "error": Bar("<", 1e-12)},
        "binned": {"speed-up": Bar(">=", 50), "error": Bar("<", 1e-3)}}
FORMS: dict[str, Callable[[Tensor, float], Tensor]] = {"exact": soft_rank, "binned": soft_rank_binned}


def run(options: BenchOptions) -> Iterator[Measurement]:
    """Ratios to naive autograd for one row of N normal scores, in float32; errors of the exact form in float64."""
    for num_tokens in SIZES:
        generator = torch.Generator().manual_seed(num_tokens)
        scores, grad = torch.randn(2, 1, num_tokens, generator=generator, dtype=torch.float64).to(options.device)
        scores = standardise(scores)
        yield from _costs(scores.float(), grad.float(), options)
        yield from _errors(scores, grad)


def _costs(scores: Tensor, grad: Tensor, options: BenchOptions) -> Iterator[Measurement]:
    num_tokens = scores.shape[1]
    arms = {name: _pass(form, scores, grad) for name, form in {"naive": pairwise_rank, **FORMS}.items()}
    times = interleave(arms, options.rounds or 7, options.device)
    peaks = {name: peak_bytes(arm, options.device) for name, arm in arms.items()}
    for name in FORMS:
        speed_up, interval = times.ratio("naive", name)
        facts = {"ms": times.median_ms(name), "naive_ms": times.median_ms("naive"), **times.facts()}
        yield Measurement(f"N={num_tokens} {name}: speed-up over naive", speed_up, _bar(name, "speed-up", num_tokens), interval,
                          times.cpu_ratio("naive", name) if options.device == "cpu" else None, facts)
        yield Measurement(f"N={num_tokens} {name}: peak memory / naive", peaks[name] / peaks["naive"],
                          _bar(name, "memory", num_tokens), facts={"peak_bytes": peaks[name], "naive_peak_bytes": peaks["naive"]})


def _errors(scores: Tensor, grad: Tensor) -> Iterator[Measurement]:
    num_tokens = scores.shape[1]
    rank, gradient = _pass(pairwise_rank, scores, grad)()
    for name, dtype in (("exact", torch.float64), ("binned", torch.float32)):
        found, found_gradient = _pass(FORMS[name], scores.to(dtype), grad.to(dtype))()
        for what, error in (("rank error / N", (found - rank).abs().max() / num_tokens),
                            ("relative gradient error", (found_gradient - gradient).norm() / gradient.norm())):
            kind = str(dtype).removeprefix("torch.")
            yield Measurement(f"N={num_tokens} {name}: {what}, {kind}", float(error), _bar(name, "error", num_tokens))


def _bar(form: str, what: str, num_tokens: int) -> Bar | None:
    return BARS[form].get(what) if num_tokens == max(SIZES) else None


def _pass(form: Callable[[Tensor, float], Tensor], scores: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def forward_and_backward() -> tuple[Tensor, Tensor]:
        leaf = scores.detach().requires_grad_()
        rank = form(leaf, TAU)
        rank.backward(grad)
        return rank.detach(), leaf.grad

    return forward_and_backward
