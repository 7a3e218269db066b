"""The one sampler: a denoising loop over a diffusers scheduler, one seed per image, a generator of batches.

Given the same embeddings and latents it equals the diffusers pipeline to float tolerance (tested).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.api import Backbone, Batch, Call, Method, require
from harness.engine.finite import FiniteWatch
from harness.engine.injection import Injection, attach


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """num_steps and guidance_scale: None takes the backbone's own. guidance_scale 1 is no guidance (one half).

    compile: torch.compile of each block, or of the modules inside where a method acts there: 'dynamic' builds a few graphs,
    however many tokens are kept, 'static' one for each number of tokens, 'cuda_graphs' captures each of those as a CUDA graph
    too (torch.compile's reduce-overhead mode). The method's own work stays as it is.
    attention: the kernel of scaled dot-product attention, or 'auto', torch's choice among those that are enabled. A kernel that
    cannot run here is an error, not another kernel.
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 8
    compile: Literal["off", "dynamic", "static", "cuda_graphs"] = "off"
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        require(self.num_steps is None or self.num_steps >= 1, f"sampler.num_steps must be at least 1, got {self.num_steps}")
        require(self.batch_size >= 1, f"sampler.batch_size must be at least 1, got {self.batch_size}")
        require(self.guidance_scale is None or self.guidance_scale >= 1,
                f"sampler.guidance_scale must be at least 1 (1 = no guidance), got {self.guidance_scale}")


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) standard normal; row i comes from its own CPU generator with seed seeds[i], so batches do not matter."""
    return torch.stack([_drawn(seed, shape)[0] for seed in seeds]).to(device, dtype)


def step_generators(seeds: Sequence[int], shape: tuple[int, int, int]) -> list[torch.Generator]:
    """A generator for each image, behind its initial noise: what a pipeline of diffusers goes on with when it is given them."""
    return [_drawn(seed, shape)[1] for seed in seeds]


def _drawn(seed: int, shape: tuple[int, int, int]) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), generator


def attention_kernel(name: str) -> AbstractContextManager[None]:
    """Only this kernel of scaled dot-product attention within the context; any of the enabled ones for 'auto'."""
    kernels = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
               "cudnn": SDPBackend.CUDNN_ATTENTION}
    return nullcontext() if name == "auto" else sdpa_kernel(kernels[name])


class Loop:
    """One denoising loop, prepared: timesteps, conditioning of both halves, and the call contexts.

    Split from `sample` so that timing, counting and error measurement run exactly the code that makes the images.
    method: the loop is for this one, which may take another number of steps than the sampler asks for.
    scheduler_steps: what the scheduler is asked for. num_steps: calls of the transformer, more with a scheduler of second order.
    """

    def __init__(self, backbone: Backbone, config: SamplerConfig, method: Method | None = None) -> None:
        self.backbone = backbone
        asked = config.num_steps or backbone.default_num_steps
        self.scheduler_steps = asked if method is None else method.num_steps(asked)
        self.guidance_scale = backbone.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
        self.guidance_halves = 2 if self.guidance_scale > 1 and not backbone.distilled_guidance else 1
        self.timesteps = backbone.set_timesteps(self.scheduler_steps)
        self.num_steps = len(self.timesteps)
        self.run = dataclasses.replace(backbone.run(self.timesteps, self.guidance_halves), compile=config.compile)
        self.attention = config.attention

    def conditioning(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rows [unconditional; conditional] with guidance, else the conditional rows."""
        cond = self.backbone.encode(prompts)
        if self.backbone.distilled_guidance:
            pooled = next(iter(cond.values()))
            cond["guidance"] = torch.full((len(pooled),), self.guidance_scale, device=pooled.device)
        if self.guidance_halves == 1:
            return cond
        uncond = self.backbone.encode([""])
        return {key: torch.cat([uncond[key].expand_as(value), value]) for key, value in cond.items()}

    @torch.no_grad()
    def __call__(self, injection: Injection, latents: Tensor, conditioning: dict[str, Tensor], seeds: Sequence[int],
                 watch: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """Denoise `latents` (B, C, H, W). `watch(step, latents, prediction)` sees each step before it is taken."""
        backbone, method = self.backbone, injection.method
        backbone.set_timesteps(self.scheduler_steps)  # the scheduler counts its own steps: rewind it
        drawing = {"generator": step_generators(seeds, backbone.latent_shape)} if backbone.draws_noise else {}
        method.reset()
        seed_rows = torch.tensor(list(seeds) * self.guidance_halves, dtype=torch.int64).to(latents.device)
        for step, timestep in enumerate(self.timesteps):
            prediction = self.predict(injection, step, latents, conditioning, seed_rows)
            if watch is not None:
                watch(step, latents, prediction)
            latents = backbone.scheduler.step(prediction, timestep, latents, return_dict=False, **drawing)[0]
        return latents

    @torch.no_grad()
    def predict(self, injection: Injection, step: int, latents: Tensor, conditioning: dict[str, Tensor],
                seed_rows: Tensor) -> Tensor:
        """The guided prediction (B, C, H, W) at `step`."""
        rows = latents.repeat(self.guidance_halves, 1, 1, 1)
        timestep = self.timesteps[step].to(latents.device).expand(rows.shape[0])
        call = Call(step=step, timestep=self.backbone.noise_level(timestep), seeds=seed_rows,
                    guidance_halves=self.guidance_halves)
        injection.begin_call(call)
        with attention_kernel(self.attention):
            prediction = self.backbone.denoise(rows, timestep, conditioning)
        injection.method.observe(call, prediction)
        if self.guidance_halves == 1:
            return prediction
        uncond, cond = prediction.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


def sample(backbone: Backbone, method: Method, config: SamplerConfig, prompts: Sequence[str], seeds: Sequence[int],
           on_injection: Callable[[Injection], None] | None = None) -> Iterator[Batch]:
    """Yield batches of images, image i from prompts[i] and seeds[i] alone; nothing is kept. What is no number is an error.

    on_injection: called with the live injection after the last batch (to read its token count).
    """
    require(len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds")
    loop = Loop(backbone, config, method)
    method.begin(loop.run)
    with attach(backbone, method, loop.run) as injection:
        for start in range(0, len(prompts), config.batch_size):
            part = slice(start, start + config.batch_size)
            latents = initial_noise(seeds[part], backbone.latent_shape, backbone.transformer.device, backbone.transformer.dtype)
            conditioning, watch = loop.conditioning(prompts[part]), FiniteWatch(backbone, method.name, seeds[part], prompts[part])
            latents = loop(injection, latents, conditioning, seeds[part], watch)
            watch.check(conditioning, latents)
            images = backbone.decode(latents)
            watch.check_images(images)
            indices = list(range(len(prompts)))[part]
            yield Batch(indices, list(prompts[part]), list(seeds[part]), images, latents)
        if on_injection is not None:
            on_injection(injection)
