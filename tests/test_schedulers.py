"""Schedulers of diffusers on every family: run as its pipeline runs them and counted as executed, or refused with a remedy."""

import functools
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from tiny import BETAS, TinyFlux, TinyPixArt, tiny_dit, tiny_flux, tiny_pixart

from harness.api import METHODS, ConfigError
from harness.backbones.dit import DiT
from harness.backbones.flux import _pack, _unpack
from harness.backbones.schedules import copied
from harness.cost.flops import Meter
from harness.engine.sampler import SamplerConfig, initial_noise, sample, step_generators

DENSE = METHODS.build("dense", {})
PROMPTS, SEEDS = ["a red apple", "a cat", "pizza"], [3, 1, 4]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTISTEP = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
FLOWS = {"euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
         "euler karras": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
         "euler stochastic": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
         "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}), "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
         "sde": ("DPMSolverMultistepScheduler", {**FLOW, **SDE}), **{name: (name, FLOW) for name in MULTISTEP}}
NOISES = {"ddim": ("DDIMScheduler", {"clip_sample": False}), "ddpm": ("DDPMScheduler", {"clip_sample": False}),
          "lcm noise": ("LCMScheduler", {}), "sde noise": ("DPMSolverMultistepScheduler", SDE),
          "karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
          "sde singlestep": ("DPMSolverSinglestepScheduler", SDE), **{f"{name} noise": (name, {}) for name in MULTISTEP}}
RUN = [*(("sd3", name) for name in FLOWS), *(("flux", name) for name in FLOWS if name != "heun"),
       *((family, name) for family in ("pixart", "dit") for name in NOISES)]
EVALUATIONS = {"heun": 7}
"""Of four steps; of the others four."""
DRAWING = {"euler stochastic", "lcm", "sde", "ddpm", "lcm noise", "sde noise", "sde singlestep"}


def scheduler(name, family=""):
    """The scheduler of a name of this file. Flux's pipeline gives every scheduler a shift, which some take only if told."""
    kind, options = FLOWS.get(name) or NOISES[name]
    betas = BETAS if name in NOISES else {}
    shifted = family == "flux" and kind in MULTISTEP and kind != "UniPCMultistepScheduler"
    return getattr(diffusers, kind)(**betas, **options, **({"use_dynamic_shifting": True} if shifted else {}))


def made(family, one):
    """The tiny backbone of a family with this scheduler."""
    torch.manual_seed(0)
    if family == "sd3":
        pipe = tiny_pipeline()
        pipe.scheduler = one
        return TinySD3.from_pipeline(pipe)
    if family == "flux":
        pipe = tiny_flux()
        pipe.scheduler = one
        return TinyFlux.from_pipeline(pipe, 32)
    return TinyPixArt.from_pipeline(tiny_pixart(one), text_length=6) if family == "pixart" else DiT.from_pipeline(tiny_dit(one))


def prompts_of(family):
    return ["3", "207", "7"] if family == "dit" else PROMPTS


def latents(backbone, rows, size):
    """(B, C, H, W) of the images `rows` of SEEDS, in batches of `size`."""
    config = SamplerConfig(num_steps=4, guidance_scale=3.5, batch_size=size)
    prompts = [prompts_of(backbone.name)[row] for row in rows]
    return torch.cat([batch.latents for batch in sample(backbone, DENSE, config, prompts, [SEEDS[row] for row in rows])])


def theirs(backbone, monkeypatch):
    """The diffusers pipeline on our embeddings and noise; where it gives its scheduler no generators, each image's are given."""
    pipe, cond = backbone.pipe, backbone.encode(prompts_of(backbone.name))
    pipe.scheduler = copied(backbone.scheduler)
    noise = initial_noise(SEEDS, backbone.latent_shape, torch.device("cpu"), backbone.transformer.dtype)
    generators = step_generators(SEEDS, backbone.latent_shape)
    common = {"guidance_scale": 3.5, "num_inference_steps": 4, "output_type": "latent"}
    if backbone.name == "pixart":
        return of_pixart(backbone, cond, noise, generators, common)
    if backbone.draws_noise:
        step = pipe.scheduler.step
        if backbone.name == "dit":  # its pipeline steps both guided halves
            generators += step_generators(SEEDS, backbone.latent_shape)
        given = functools.partial(step, generator=generators)
        if backbone.name == "flux":  # its pipeline steps tokens, whose numbers stand in another order

            def given(output, timestep, tokens, **options):
                output, tokens = (_unpack(value, backbone.grid) for value in (output, tokens))
                return (_pack(step(output, timestep, tokens, generator=generators, **options)[0]),)

        monkeypatch.setattr(pipe.scheduler, "step", given)
    if backbone.name == "sd3":
        uncond = backbone.encode([""] * 3)
        return pipe(prompt_embeds=cond["encoder_hidden_states"], pooled_prompt_embeds=cond["pooled_projections"], **common,
                    negative_prompt_embeds=uncond["encoder_hidden_states"], latents=noise, height=32, width=32,
                    negative_pooled_prompt_embeds=uncond["pooled_projections"]).images
    if backbone.name == "flux":
        found = pipe(prompt_embeds=cond["encoder_hidden_states"], pooled_prompt_embeds=cond["pooled_projections"], height=32,
                     width=32, latents=_pack(noise), **common).images
        return _unpack(found, backbone.grid)
    return of_dit(pipe, cond["class_labels"].tolist(), noise, common, monkeypatch)


def of_pixart(backbone, cond, noise, generators, common):
    """Its pipeline hands generators on to its scheduler; in float32 it draws the first noise from them too, as a user has it."""
    uncond = backbone.encode([""] * 3)
    if noise.dtype == torch.float32:
        noise, generators = None, [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return backbone.pipe(
        prompt=None, negative_prompt=None, prompt_embeds=cond["encoder_hidden_states"], latents=noise, generator=generators,
        prompt_attention_mask=cond["encoder_attention_mask"], negative_prompt_embeds=uncond["encoder_hidden_states"],
        negative_prompt_attention_mask=uncond["encoder_attention_mask"], use_resolution_binning=False, **common).images


def of_dit(pipe, labels, noise, common, monkeypatch):
    """Its pipeline takes no latents and gives none: what it decodes is looked at."""
    decoded = []
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **options: noise)
    monkeypatch.setattr(pipe.vae, "decode", lambda latents: decoded.append(latents) or SimpleNamespace(sample=latents))
    pipe.vae.register_to_config(scaling_factor=1.0)
    pipe(labels, **common)
    return decoded[0]


@pytest.mark.parametrize("family, name", RUN)
def test_it_runs_as_its_pipeline_runs_it(family, name, monkeypatch):
    """In batches of two, so that a solver that remembers must not carry one batch into the next."""
    backbone = made(family, scheduler(name, family))
    before = torch.random.get_rng_state()
    ours = latents(backbone, [0, 1, 2], 2)
    assert torch.equal(before, torch.random.get_rng_state()), "nothing is drawn from anything but the images' own seeds"
    scale = float(ours.abs().max())
    assert backbone.draws_noise == (name in DRAWING)
    torch.testing.assert_close(latents(backbone, [2], 1)[0], ours[2], atol=2e-5 * max(1, scale), rtol=0)
    torch.testing.assert_close(ours, theirs(backbone, monkeypatch), atol=1e-5 * max(1, scale), rtol=0)


def executed(backbone, method, config):
    """Kept fractions as executed and the number of calls of the transformer in one batch."""
    kept, calls = {}, []

    def read(live):
        kept.update({kind: live.token_count.kept(kind, live.run.num_steps) for kind in ("attention", "ffn")})

    hook = backbone.transformer.register_forward_pre_hook(lambda *args: calls.append(1))
    list(sample(backbone, method, config, prompts_of(backbone.name), SEEDS, read))
    hook.remove()
    return kept, len(calls)


@pytest.mark.parametrize("family, name", [pair for pair in RUN if pair[1] in {*EVALUATIONS, "euler", "ddim", "sde"}])
def test_it_is_counted_as_it_runs(family, name):
    """The transformer's calls per image, whatever the sampler calls a step."""
    backbone = made(family, scheduler(name, family))
    config = SamplerConfig(num_steps=4, guidance_scale=3.5, batch_size=3)
    drop, meter = METHODS.build("random_drop", {"keep_ratio": 0.5}), Meter(backbone, config)
    kept, calls = executed(backbone, drop, config)
    assert calls == EVALUATIONS.get(name, 4) == meter.run.num_steps == len(kept["attention"])
    assert type(meter.loop.backbone.scheduler) is type(backbone.scheduler)
    per_call = meter.dense.total / calls
    one = Meter(backbone, SamplerConfig(num_steps=1, guidance_scale=3.5))
    assert one.dense.total / one.run.num_steps == per_call
    assert meter.counted(drop)[1] == kept
    halved = meter.counted(METHODS.build("fewer_steps", {"step_ratio": 0.5}))[0].total
    assert halved == len(backbone.set_timesteps(2)) * per_call


@pytest.mark.parametrize("name", [name for name in METHODS.names() if name != "diffusers_cache"])
def test_every_method_runs_with_a_second_order_scheduler_and_is_counted_as_it_runs(name):
    backbone, config = made("sd3", scheduler("heun")), SamplerConfig(num_steps=4, guidance_scale=3.5, batch_size=3)
    torch.manual_seed(0)
    knob = METHODS.get(name).knob
    method = METHODS.build(name, {knob: 0.6} if knob else {})
    kept, calls = executed(backbone, method, config)
    assert calls == (3 if name == "fewer_steps" else 7)
    if not method.dynamic:
        counted = Meter(backbone, config).counted(method)[1]
        for kind, rows in kept.items():
            torch.testing.assert_close(torch.tensor(rows), torch.tensor(counted[kind]), atol=0.01, rtol=0)


REFUSED = [("sd3", "EulerDiscreteScheduler", {}, "scales its inputs.*FlowMatchHeunDiscreteScheduler"),
           ("sd3", "DDIMScheduler", {}, "DDIMScheduler.*velocity of a flow"),
           ("sd3", "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas: True"),
           ("sd3", "FlowMatchLCMScheduler", {"scale_factors": [0.5], "upscale_mode": "bilinear"}, "remove scale_factors"),
           ("sd3", "DPMSolverMultistepScheduler", {}, "prediction_type is 'epsilon'.*write prediction_type: flow_prediction"),
           ("sd3", "UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "write use_flow_sigmas: true"),
           ("flux", "FlowMatchHeunDiscreteScheduler", {}, "FlowMatchHeunDiscreteScheduler.*save the pipeline with one of"),
           ("flux", "UniPCMultistepScheduler", {}, "prediction_type"),
           ("pixart", "FlowMatchEulerDiscreteScheduler", {}, "predicts the noise"),
           ("pixart", "EulerDiscreteScheduler", {}, "scales its inputs.*DPMSolverMultistepScheduler"),
           ("pixart", "EulerAncestralDiscreteScheduler", {}, "EulerAncestralDiscreteScheduler"),
           ("pixart", "HeunDiscreteScheduler", {}, "HeunDiscreteScheduler"),
           ("pixart", "DDIMScheduler", {"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
           ("pixart", "UniPCMultistepScheduler", {"use_flow_sigmas": True}, "write use_flow_sigmas: false"),
           ("dit", "DDPMScheduler", {"variance_type": "learned_range"}, "write variance_type: fixed_small"),
           ("dit", "DPMSolverMultistepScheduler", {"variance_type": "learned"}, "remove variance_type"),
           ("pixart", "PNDMScheduler", {}, "PNDMScheduler"),
           ("dit", "KDPM2AncestralDiscreteScheduler", {}, "KDPM2AncestralDiscreteScheduler")]


@pytest.mark.parametrize("family, kind, options, words", REFUSED)
def test_what_would_run_otherwise_is_refused_with_the_file_and_a_remedy(family, kind, options, words):
    with pytest.raises(ConfigError, match=f"scheduler/scheduler_config.json: {kind}.*") as caught:
        made(family, getattr(diffusers, kind)(**options))
    assert re.search(words, str(caught.value)), caught.value


@pytest.mark.parametrize("family, one", [("sd3", "euler"), ("flux", "euler"), ("pixart", "ddim"), ("dit", "sde noise")])
def test_more_steps_than_noise_levels_are_refused(family, one):
    with pytest.raises(ConfigError, match="sampler.num_steps: 1001, but the scheduler of the model knows 1000"):
        Meter(made(family, scheduler(one)), SamplerConfig(num_steps=1001))


def test_what_a_scheduler_itself_refuses_is_an_error_of_the_option():
    with pytest.raises(ConfigError, match="sampler.num_steps: 60: LCMScheduler refuses .*take another number, or correct"):
        Meter(made("pixart", scheduler("lcm noise")), SamplerConfig(num_steps=60))


@pytest.mark.parametrize("kind", MULTISTEP)
def test_equal_first_timesteps_do_not_skip_a_step(kind):
    """Rounded to whole levels the first two of these are equal; a scheduler that looks its place up would begin at the second."""
    backbone = made("sd3", getattr(diffusers, kind)(**FLOW | {"flow_shift": 30.0}))
    timesteps = backbone.set_timesteps(36)
    assert timesteps[0] == timesteps[1]
    config = SamplerConfig(num_steps=36, guidance_scale=1.0, batch_size=1)
    assert torch.isfinite(next(sample(backbone, DENSE, config, PROMPTS[:1], [1])).latents).all()
    assert backbone.scheduler.step_index == 36
