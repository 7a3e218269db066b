"""Sites for tests that ask a method directly."""

import torch

from harness.api import METHODS, Call, Method, Run, Site


def make_run(grid=(8, 8), num_steps=10, num_blocks=4, halves=2) -> Run:
    """A run of evenly spaced noise levels."""
    return Run(backbone="sd3", num_blocks=num_blocks, grid=grid, width=16, pooled_width=8, guidance_halves=halves,
               timesteps=tuple(1 - i / num_steps for i in range(num_steps)))


def started(name: str, run: Run, **options) -> Method:
    """The method, begun and reset."""
    method = METHODS.build(name, options)
    method.begin(run)
    method.reset()
    return method


def make_site(run: Run, step=0, block=0, kind="attention", seeds=(5, 9), memory=None) -> Site:
    """A site whose rows are [unconditional; conditional] of the images `seeds`."""
    rows = torch.tensor(list(seeds) * run.guidance_halves)
    call = Call(step=step, timestep=torch.full((len(rows),), run.timesteps[step]), seeds=rows,
                guidance_halves=run.guidance_halves)
    return Site(call, run, block, kind, "ff" if kind == "ffn" else "attn", {} if memory is None else memory)
