"""diffusers' own caches on Flux: what ran is what is counted, nothing leaks, and afterwards the model is the untouched one."""

import pytest
import torch
from tiny import TinyFlux, tiny_flux

from harness.api import METHODS, ConfigError
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig, sample

PROMPTS, SEEDS = ["a red apple", "a cat", "a dog"], [3, 1, 2]
CONFIG = SamplerConfig(num_steps=10, guidance_scale=3.5, batch_size=2)
KINDS = ("taylorseer", "pyramid_attention", "fastercache", "magcache")


@pytest.fixture(scope="module")
def flux() -> TinyFlux:
    """Shared: leave it as you found it."""
    return TinyFlux.from_pipeline(tiny_flux(), resolution=32)


def caching(kind, **options):
    """A cache that is at work at nearly every noise level."""
    return METHODS.build("diffusers_cache", {"kind": kind, "range": [0.0, 0.95], "threshold": 0.2, **options})


def drawn(backbone, method, config=CONFIG, seeds=SEEDS):
    """Latents (B, C, H, W) and the kept fractions as executed."""
    kept = {}

    def read(live):
        kept.update({kind: live.token_count.kept(kind, live.run.num_steps) for kind in ("attention", "ffn")})

    return torch.cat([batch.latents for batch in sample(backbone, method, config, PROMPTS, seeds, read)]), kept


@pytest.mark.parametrize("kind", KINDS)
def test_what_ran_is_what_is_counted(flux, kind):
    meter, method = Meter(flux, CONFIG), caching(kind)
    _, counted = meter.counted(method)
    latents, kept = drawn(flux, method)
    assert kept == counted and min(map(min, kept["attention"])) == 0
    assert 0.2 < meter.cut(method) < 0.8
    assert not torch.allclose(latents, drawn(flux, METHODS.build("dense", {}))[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_depends_on_its_neighbours_or_on_the_batch_before(flux, kind):
    method = caching(kind)
    together, _ = drawn(flux, method)
    alone, _ = drawn(flux, method, SamplerConfig(num_steps=10, guidance_scale=3.5, batch_size=1))
    torch.testing.assert_close(alone, together, atol=2e-5, rtol=0)
    assert torch.equal(drawn(flux, method)[0], together)


@pytest.mark.parametrize("kind", KINDS)
def test_computing_every_step_is_the_dense_model_and_nothing_is_left_behind(flux, kind):
    dense, _ = drawn(flux, METHODS.build("dense", {}))
    assert torch.equal(drawn(flux, caching(kind, interval=1, threshold=0))[0], dense)
    drawn(flux, caching(kind))
    assert not any("forward" in vars(module) for module in flux.transformer.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in flux.transformer.modules())
    assert torch.equal(drawn(flux, METHODS.build("dense", {}))[0], dense)


def test_a_longer_interval_saves_more(flux):
    meter = Meter(flux, CONFIG)
    cuts = [meter.cut(caching("taylorseer", interval=interval)) for interval in (2, 3, 5)]
    assert cuts == sorted(cuts) and cuts[0] < cuts[-1]


def test_a_transformer_without_caches_is_refused_with_what_to_use(tiny_backbone):
    with pytest.raises(ConfigError, match="SD3Transformer2DModel no cache.*taylor_forecast"):
        drawn(tiny_backbone, caching("taylorseer"))


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"range": [0.8, 0.1]}, {"threshold": -1}, {"kind": "teacache"}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        METHODS.build("diffusers_cache", wrong)
