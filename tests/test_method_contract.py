"""What every registered method must obey; a new method is covered the moment it is registered."""

import copy

import pytest
import torch
from conftest import PROMPTS, TinySD3, tiny_pipeline

from harness.api import METHODS, ConfigError, Method
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample
from harness.engine.tokens import Keep

CONFIG = SamplerConfig(num_steps=3, guidance_scale=4.0, batch_size=4)
SEEDS = [3, 1, 4, 159]
SHIVA_AXES = {"router_groups": [1, 3, "per_layer", "8_of_24"], "router_inputs": [[], ["time"]], "router_prenorm": [False],
              "unify": ["mean", "cond", "off"], "selection": ["random", "norm"], "first_block": [True], "k_multiple": [16],
              "ratio_policy": ["fixed", "per_layer", "per_timestep", "film", "structure_first", "random"],
              "budget_unit": ["flops"], "rejected": ["cache", "merge"]}
VARIANTS = {f"shiva {axis}={value}": ("shiva", {axis: value}) for axis, values in SHIVA_AXES.items() for value in values}
"""Axes of a method that change what happens at inference are methods of their own to this file."""
NAMES = [*(name for name in METHODS.names() if not METHODS.get(name).hooks_model), *VARIANTS]  # those others: test_families


def resolved(name: str) -> tuple[str, dict]:
    """The registered name and the options behind a name of this file."""
    return VARIANTS.get(name, (name, {}))


def knob(name: str) -> str | None:
    """The option that a budget solves for."""
    return METHODS.get(resolved(name)[0]).knob


REDUCING = [name for name in NAMES if knob(name)]


def build(name: str, **options) -> Method:
    """A method with seeded parameters (a trained one starts random)."""
    torch.manual_seed(0)
    registered, own = resolved(name)
    return METHODS.build(registered, {**own, **options})


def reduced(name: str, ratio: float) -> Method:
    """The method with its knob at `ratio`."""
    return build(name, **{knob(name): ratio})


def latents(backbone, method, prompts=PROMPTS, seeds=SEEDS, config=CONFIG, on_injection=None):
    """Final latents (B, C, H, W) of a run."""
    return torch.cat([b.latents for b in sample(backbone, method, config, prompts, seeds, on_injection)])


@pytest.fixture(scope="module")
def dense_latents(tiny_backbone):
    """The untouched model's result."""
    return latents(tiny_backbone, build("dense"))


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_dense_model(tiny_backbone, dense_latents, name):
    method = reduced(name, 1.0) if name in REDUCING else build(name)
    assert torch.equal(latents(tiny_backbone, method), dense_latents)


@pytest.mark.parametrize("name", REDUCING)
def test_compute_falls_to_the_keep_ratio(tiny_backbone, dense_latents, name):
    method, counts = reduced(name, 0.5), []
    out = latents(tiny_backbone, method, on_injection=lambda injection: counts.append(injection.token_count))
    tokens = counts[0].tokens.values()
    ratios = [m / n for m, n in tokens if m < n]
    if method.dynamic:  # how much it saves depends on the images
        assert ratios
    elif ratios and not any(ratios):  # it skips whole steps: here one of three
        assert 3 * len(ratios) == len(tokens)
    elif method.sites:
        assert ratios, "no site reduced anything"
        assert abs(sum(ratios) / len(ratios) - 0.5) < 0.011  # pooled grids of so few tokens are coarse
    else:  # it takes steps away and no tokens
        assert not ratios and method.num_steps(100) == 50
    assert not torch.allclose(out, dense_latents, atol=1e-4), "a reduction that changes nothing is a silent no-op"


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(tiny_backbone, name):
    method = reduced(name, 0.6) if name in REDUCING else build(name)
    together = latents(tiny_backbone, method)
    alone = latents(tiny_backbone, method, PROMPTS[2:3], SEEDS[2:3])
    threes = SamplerConfig(num_steps=3, guidance_scale=4.0, batch_size=3)
    backwards = latents(tiny_backbone, method, PROMPTS[::-1], SEEDS[::-1], threes)
    torch.testing.assert_close(alone[0], together[2], atol=2e-5, rtol=0)
    torch.testing.assert_close(backwards.flip(0), together, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_state_does_not_leak_between_batches(tiny_backbone, name):
    method = reduced(name, 0.6) if name in REDUCING else build(name)
    first = latents(tiny_backbone, method)
    latents(tiny_backbone, method, PROMPTS[:2], [77, 78])
    assert torch.equal(latents(tiny_backbone, method), first)


@pytest.mark.parametrize("name", [name for name in REDUCING if name != "shiva unify=off"])
def test_guided_halves_keep_the_same_tokens(tiny_backbone, name):
    method, plans = reduced(name, 0.5), []
    inner = method.reduce

    def spy(hidden_states, site):
        plans.append(inner(hidden_states, site))
        return plans[-1]

    object.__setattr__(method, "reduce", spy)
    latents(tiny_backbone, method)
    kept = [plan for plan in plans if isinstance(plan, Keep) and plan.indices.ndim == 2]
    for plan in kept:
        uncond, cond = plan.indices.chunk(2)
        assert torch.equal(uncond, cond)
    assert kept or not any(isinstance(plan, Keep) for plan in plans)


@pytest.mark.parametrize("name", NAMES)
def test_leaving_the_context_leaves_the_untouched_model(tiny_backbone, dense_latents, name):
    keys = list(tiny_backbone.transformer.state_dict())
    method = reduced(name, 0.5) if name in REDUCING else build(name)
    latents(tiny_backbone, method)
    assert not any("forward" in module.__dict__ for module in tiny_backbone.transformer.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_backbone.transformer.modules())
    assert list(tiny_backbone.transformer.state_dict()) == keys
    assert torch.equal(latents(tiny_backbone, build("dense")), dense_latents)


@pytest.mark.parametrize("name", REDUCING)
def test_without_guidance_it_runs_as_well_or_refuses(tiny_backbone, name):
    config = SamplerConfig(num_steps=2, guidance_scale=1.0, batch_size=2)
    try:
        assert torch.isfinite(latents(tiny_backbone, reduced(name, 0.5), config=config)).all()
    except ConfigError as error:
        assert "no guidance" in str(error)


@pytest.fixture(scope="module")
def twin(tiny_backbone):
    """The model on the meta device, shared: leave it as you found it."""
    made = tiny_backbone.on_meta()
    made.num_text_tokens = 6
    return made


@pytest.mark.parametrize("name", REDUCING)
def test_a_twin_on_the_meta_device_can_be_counted(tiny_backbone, twin, name):
    method = reduced(name, 0.5)
    if method.dynamic:
        method.pattern = (True, False, True)
    loop = Loop(tiny_backbone, CONFIG)
    method.begin(loop.run)
    twin_method = copy.deepcopy(method)
    if isinstance(twin_method, torch.nn.Module):
        twin_method.to("meta")
    twin_loop = Loop(twin, CONFIG)
    twin_method.begin(twin_loop.run)
    with attach(twin, twin_method, twin_loop.run) as injection:
        noise = initial_noise([1], twin.latent_shape, torch.device("meta"), torch.float32)
        out = twin_loop.predict(injection, 1, noise, twin_loop.conditioning(["a"]), torch.tensor([1, 1]).to("meta"))
    assert out.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("ratio", [0.0, 1.5, -0.2])
def test_a_ratio_outside_its_range_is_refused_with_key_and_value(name, ratio):
    with pytest.raises(ConfigError, match=rf"{resolved(name)[0]}.*{knob(name)}.*{ratio}"):
        reduced(name, ratio)


def test_a_method_that_finds_no_site_is_refused(tiny_backbone):
    class Nowhere(Method):
        name = "nowhere"
        sites = frozenset({"cross_attention"})

    loop = Loop(tiny_backbone, CONFIG)
    with pytest.raises(ConfigError, match="silently do nothing"), attach(tiny_backbone, Nowhere(None), loop.run):
        pass


def test_two_methods_cannot_share_a_block(tiny_backbone):
    run, method = Loop(tiny_backbone, CONFIG).run, build("random_drop")
    with attach(tiny_backbone, method, run), pytest.raises(RuntimeError, match="already replaced"):
        with attach(tiny_backbone, method, run):
            pass
    assert not any("forward" in module.__dict__ for module in tiny_backbone.transformer.modules())


def test_a_copied_model_runs_its_own_weights():
    backbone = TinySD3.from_pipeline(tiny_pipeline())
    method, loop = build("random_drop", keep_ratio=0.5), Loop(backbone, CONFIG)
    method.begin(loop.run)
    with attach(backbone, method, loop.run) as injection:
        twin = copy.deepcopy(backbone.transformer)
        for parameter in twin.transformer_blocks.parameters():
            parameter.data.zero_()
        args = (0, initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32), loop.conditioning(["a"]),
                torch.tensor([1, 1]))
        mine = loop.predict(injection, *args)
        backbone.transformer, original = twin, backbone.transformer
        assert not torch.allclose(loop.predict(injection, *args), mine)
        backbone.transformer = original
        assert torch.equal(loop.predict(injection, *args), mine)


def test_calling_the_model_outside_the_sampler_is_an_error(tiny_backbone):
    loop = Loop(tiny_backbone, CONFIG)
    with attach(tiny_backbone, build("random_drop"), loop.run), pytest.raises(RuntimeError, match="outside the sampler"):
        tiny_backbone.denoise(torch.randn(1, 4, 8, 8), torch.tensor([500.0]), tiny_backbone.encode(["a"]))
