"""The common sampler against the diffusers pipeline it stands in for."""

import pytest
import torch
from conftest import PROMPTS, TinySD3, tiny_pipeline

from harness.api import METHODS, ConfigError
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("dynamic", [False, True])
def test_our_loop_equals_the_diffusers_pipeline(guidance, dynamic):
    pipe = tiny_pipeline()
    if dynamic:
        pipe.scheduler = type(pipe.scheduler)(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64)
    backbone = TinySD3.from_pipeline(pipe)
    seeds = [11, 12, 13]
    noise = initial_noise(seeds, backbone.latent_shape, torch.device("cpu"), torch.float32)
    cond, uncond = backbone.encode(PROMPTS[:3]), backbone.encode([""] * 3)
    embeds = {"prompt_embeds": cond["encoder_hidden_states"], "pooled_prompt_embeds": cond["pooled_projections"],
              "negative_prompt_embeds": uncond["encoder_hidden_states"],
              "negative_pooled_prompt_embeds": uncond["pooled_projections"]}
    theirs = pipe(**embeds, guidance_scale=guidance, num_inference_steps=5, latents=noise.clone(), height=32, width=32,
                  output_type="pt").images
    loop = Loop(backbone, SamplerConfig(num_steps=5, guidance_scale=guidance))
    method = METHODS.build("dense", {})
    with attach(backbone, method, loop.run) as injection:
        ours = backbone.decode(loop(injection, noise, loop.conditioning(PROMPTS[:3]), seeds))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_noise_of_an_image_comes_from_its_seed_alone():
    together = initial_noise([5, 6], (4, 8, 8), torch.device("cpu"), torch.float32)
    assert torch.equal(initial_noise([6], (4, 8, 8), torch.device("cpu"), torch.float32)[0], together[1])


def test_the_run_describes_noise_levels_from_one_downwards(tiny_backbone):
    run = Loop(tiny_backbone, SamplerConfig(num_steps=7)).run
    assert run.num_steps == 7 and run.timesteps[0] == pytest.approx(1.0)
    assert list(run.timesteps) == sorted(run.timesteps, reverse=True) and run.timesteps[-1] > 0


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"batch_size": 0}, {"guidance_scale": 0.5}])
def test_bad_sampler_options_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplerConfig(**bad)


def latents_with(backbone, kernel):
    """(1, C, H, W) of two guided steps."""
    config = SamplerConfig(num_steps=2, guidance_scale=3.0, attention=kernel)
    return next(sample(backbone, METHODS.build("dense", {}), config, PROMPTS[:1], [4])).latents


def test_the_attention_kernel_that_is_asked_for_is_the_one_that_runs(tiny_backbone, monkeypatch):
    ran = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        ran.append((torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    plain = latents_with(tiny_backbone, "auto")
    assert ran and all(math and flash for math, flash in ran)
    ran.clear()
    torch.testing.assert_close(latents_with(tiny_backbone, "math"), plain, atol=1e-5, rtol=1e-5)
    assert ran and not any(flash for _, flash in ran)


def test_a_kernel_that_cannot_run_here_is_an_error(tiny_backbone):
    with pytest.raises(RuntimeError, match="(?i)no .*backend|no .*kernel"):
        latents_with(tiny_backbone, "cudnn")
