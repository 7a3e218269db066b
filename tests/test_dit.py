"""DiT: prompts are classes, our loop is the pipeline's, and methods are counted as they run."""

import pytest
import torch
from diffusers import DiTPipeline
from tiny import dpm_solver, tiny_dit

from harness.api import METHODS, ConfigError, Method
from harness.backbones.dit import DiT
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample

PROMPTS, SEEDS = ["goldfish", "207", "tabby cat"], [3, 1, 4]
CONFIG = SamplerConfig(num_steps=4, guidance_scale=4.0, batch_size=2)
DENSE = METHODS.build("dense", {})


@pytest.fixture(scope="module")
def backbone():
    return DiT.from_pipeline(tiny_dit())


def latents(backbone, method=DENSE, prompts=PROMPTS, seeds=SEEDS, config=CONFIG):
    return torch.cat([batch.latents for batch in sample(backbone, method, config, prompts, seeds)])


def test_a_prompt_is_a_number_a_name_or_nothing(backbone):
    assert backbone.encode(["207", "goldfish", "tabby", "tabby cat", ""])["class_labels"].tolist() == [207, 3, 7, 7, 1000]


@pytest.mark.parametrize("prompt, words", [("a goldfish in a bowl", "no name of one; give a number from 0 to 999, or a name"),
                                           ("1000", "classes 0 to 999")])
def test_what_is_no_class_is_refused(backbone, prompt, words):
    with pytest.raises(ConfigError, match=words):
        backbone.encode([prompt])


@pytest.mark.parametrize("scheduler", [None, dpm_solver])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_loop_is_the_pipelines(monkeypatch, scheduler, guidance_scale):
    """The pipeline takes a generator and decodes; we give it our noise and compare pictures."""
    backbone = DiT.from_pipeline(tiny_dit(scheduler and scheduler()))
    noise = initial_noise(SEEDS, backbone.latent_shape, torch.device("cpu"), torch.float32)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **options: noise)
    labels = backbone.encode(PROMPTS)["class_labels"].tolist()
    theirs = backbone.pipe(labels, guidance_scale=guidance_scale, num_inference_steps=4, output_type="pt").images
    config = SamplerConfig(num_steps=4, guidance_scale=guidance_scale, batch_size=2)
    ours = torch.cat([batch.images for batch in sample(backbone, DENSE, config, PROMPTS, SEEDS)])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_method_is_told_timestep_and_class_before_the_first_block(backbone):
    """Every block embeds them for itself, so nothing of the kind passes by before block 0."""
    class Asks(Method):
        name, sites = "asks", frozenset({"block"})

        def reduce(self, hidden_states, site):
            seen.append((site.block, site.call.time_embedding, site.call.pooled_prompt))

    seen, loop = [], Loop(backbone, CONFIG)
    noise = initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32)
    with attach(backbone, Asks(None), loop.run) as injection:
        loop.predict(injection, 0, noise, loop.conditioning(["goldfish"]), torch.tensor([1, 1]))
    embedder = backbone.transformer.transformer_blocks[0].norm1.emb
    both = embedder(loop.timesteps[:1].expand(2), torch.tensor([1000, 3]), hidden_dtype=torch.float32)
    assert [block for block, _, _ in seen] == [0, 1, 2, 3]
    for _, time, label in seen:
        torch.testing.assert_close(time + label, both, atol=1e-6, rtol=0)


def test_the_dense_count_is_its_closed_form(backbone):
    cost = Meter(backbone, SamplerConfig(num_steps=1, guidance_scale=1.0)).dense
    width, image = 32, 64
    embedder = 2 * (256 * width + width**2)
    block = 2 * image * 12 * width**2 + embedder + 2 * 6 * width**2
    ends = 2 * image * (16 * width + width * 32) + embedder + 2 * 2 * width**2
    assert cost.attention == 4 * 4 * width * image**2 and cost.linear == 4 * block + ends


def test_a_saved_pipeline_loads_and_draws_the_same(tmp_path, backbone):
    backbone.pipe.save_pretrained(tmp_path)
    loaded, again = (DiT(DiT.Config(weights=str(tmp_path))) for _ in range(2))
    assert isinstance(loaded.pipe, DiTPipeline) and loaded.fingerprint == again.fingerprint
    assert torch.equal(latents(loaded, prompts=["3", "207", "7"]), latents(backbone))
    changed = tiny_dit()
    changed.transformer.proj_out_2.bias.data[0] += 1e-3
    assert DiT.from_pipeline(changed).fingerprint != DiT.from_pipeline(tiny_dit()).fingerprint
