"""PixArt: our loop is the pipeline's, text is masked, and methods are counted as they run."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PixArtSigmaPipeline
from tiny import TinyPixArt, ddim, dpm_solver, tiny_dit, tiny_pixart

from harness.api import METHODS, ConfigError, Method
from harness.backbones.pixart import PixArt
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample

PROMPTS, SEEDS = ["a red apple", "a cat", "pizza"], [3, 1, 4]
CONFIG = SamplerConfig(num_steps=4, guidance_scale=4.5, batch_size=2)
DENSE = METHODS.build("dense", {})


@pytest.fixture(scope="module")
def backbone():
    return TinyPixArt.from_pipeline(tiny_pixart(), text_length=6)


def latents(backbone, method=DENSE, prompts=PROMPTS, seeds=SEEDS, config=CONFIG):
    return torch.cat([batch.latents for batch in sample(backbone, method, config, prompts, seeds)])


def assert_near(found, wanted):
    """To 5e-6 of the largest value: an untrained model's steps at high noise divide by sqrt(alphas_cumprod), down to 0.006."""
    torch.testing.assert_close(found, wanted, atol=5e-6 * float(wanted.abs().max()), rtol=0)


def theirs(backbone, steps=4, guidance_scale=4.5, **options):
    """The diffusers pipeline on our embeddings and noise."""
    cond, uncond = backbone.encode(PROMPTS), backbone.encode([""] * len(PROMPTS))
    noise = initial_noise(SEEDS, backbone.latent_shape, torch.device("cpu"), torch.float32)
    return backbone.pipe(prompt=None, negative_prompt=None, prompt_embeds=cond["encoder_hidden_states"],
                         prompt_attention_mask=cond["encoder_attention_mask"], latents=noise, num_inference_steps=steps,
                         negative_prompt_embeds=uncond["encoder_hidden_states"], guidance_scale=guidance_scale,
                         negative_prompt_attention_mask=uncond["encoder_attention_mask"], output_type="latent",
                         use_resolution_binning=False, **options).images


@pytest.mark.parametrize("scheduler", [dpm_solver, ddim])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_the_loop_is_the_pipelines(scheduler, guidance_scale):
    """Images in two batches: a multistep solver must not carry its states from one to the next."""
    backbone = TinyPixArt.from_pipeline(tiny_pixart(scheduler()), text_length=6)
    assert backbone.latent_shape == (4, 16, 16) and backbone.grid == (8, 8)
    config = SamplerConfig(num_steps=4, guidance_scale=guidance_scale, batch_size=2)
    ours = latents(backbone, config=config)
    assert_near(ours, theirs(backbone, guidance_scale=guidance_scale))


def test_alpha_is_told_the_size_of_its_image():
    """Alpha's pipeline gives the size where the model has 128 latents a side; here one of 16 is asked for as much."""
    pipe = tiny_pixart(alpha=True, sample_size=128, num_attention_heads=3, cross_attention_dim=48)
    backbone = TinyPixArt.from_pipeline(pipe, resolution=32, text_length=6)
    assert backbone.latent_shape == (4, 16, 16)
    assert_near(latents(backbone), theirs(backbone, height=32, width=32))


def test_padding_of_a_prompt_is_not_seen(backbone):
    noise = initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32)
    conditioning = backbone.encode(["cat"])
    changed = {**conditioning, "encoder_hidden_states": conditioning["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][:, 2:] += 10.0  # of "cat" the first two of six tokens are its own
    one, other = (backbone.denoise(noise, torch.tensor([500]), given) for given in (conditioning, changed))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert torch.equal(*(backbone.port.pooled_prompt(backbone.transformer, given) for given in (conditioning, changed)))


def test_noise_is_added_as_the_scheduler_adds_it(backbone):
    clean, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    timestep = torch.tensor([0, 499, 999])
    noisy, back, target = backbone.noised(clean, noise, backbone.noise_level(timestep))
    assert torch.equal(back, timestep) and torch.equal(target, noise)
    torch.testing.assert_close(noisy, ddim().add_noise(clean, noise, timestep), atol=1e-6, rtol=0)
    assert backbone.noise_level(timestep).tolist() == pytest.approx([0.001, 0.5, 1.0])
    levels = Loop(backbone, CONFIG).run.timesteps
    assert all(0 < level <= 1 for level in levels) and list(levels) == sorted(levels, reverse=True)


def test_a_method_is_told_timestep_and_prompt(backbone):
    class Asks(Method):
        name, sites = "asks", frozenset({"block"})

        def reduce(self, hidden_states, site):
            seen.append((site.block, site.call.time_embedding.shape, site.call.pooled_prompt.shape))

    seen, loop = [], Loop(backbone, CONFIG)
    noise = initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32)
    with attach(backbone, Asks(None), loop.run) as injection:
        loop.predict(injection, 0, noise, loop.conditioning(["a"]), torch.tensor([1, 1]))
    assert seen == [(block, (2, loop.run.width), (2, loop.run.pooled_width)) for block in range(4)]


def test_the_dense_count_is_its_closed_form(backbone):
    cost = Meter(backbone, SamplerConfig(num_steps=1, guidance_scale=1.0)).dense
    width, image, text = 32, 64, 6
    block = 2 * (image * (4 + 2 + 8) * width**2 + text * 2 * width**2)  # self-attention, cross-attention, feed-forward
    captions = 2 * text * (24 * width + width**2)
    modulation = 2 * (256 * width + width**2 + 6 * width**2)
    ends = 2 * image * (16 * width + width * 32)
    assert cost.attention == 4 * 4 * width * (image**2 + image * text)
    assert cost.linear == 4 * block + captions + modulation + ends


def test_a_saved_pipeline_loads_and_draws_the_same(tmp_path, backbone):
    backbone.pipe.save_pretrained(tmp_path)
    options = {"weights": str(tmp_path), "text_length": 6}
    loaded, again = TinyPixArt(PixArt.Config(**options)), TinyPixArt(PixArt.Config(**options))
    assert isinstance(loaded.pipe, PixArtSigmaPipeline) and loaded.fingerprint == again.fingerprint
    assert TinyPixArt(PixArt.Config(**options, resolution=64)).fingerprint != loaded.fingerprint
    assert torch.equal(latents(loaded), latents(backbone))
    images = torch.rand(2, 3, 32, 32)
    assert loaded.decode(loaded.encode_images(images)).shape == images.shape
    with pytest.raises(ConfigError, match="has no text encoder"):
        PixArt(PixArt.Config(**options)).encode(["a"])
    with pytest.raises(ConfigError, match="33 pixels are no whole number of tokens of 4 x 4"):
        PixArt(PixArt.Config(**options, resolution=33))


def test_a_pipeline_of_another_family_or_scheduler_is_refused(tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a DiTPipeline.*PixArtSigmaPipeline"):
        PixArt(PixArt.Config(weights=str(tmp_path)))
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler"):
        PixArt.from_pipeline(tiny_pixart(EulerDiscreteScheduler()))
