"""Flux: our loop is the pipeline's, and blocks with rotary positions compute the tokens that they are given."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from harness.api import METHODS, ConfigError, Method
from harness.backbones.flux import Flux, _pack, _unpack
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample
from harness.engine.tokens import Keep, Skip

PROMPTS, SEEDS = ["a red apple", "a cat"], [3, 1]
CONFIG = SamplerConfig(num_steps=3, guidance_scale=3.5, batch_size=2)


class TinyFlux(Flux):
    """Flux whose prompts are encoded by a fixed random table."""

    def encode(self, prompts):
        rows = [torch.randn(6, 24, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in prompts]
        return {"encoder_hidden_states": torch.stack(rows), "pooled_projections": torch.stack(rows).mean(1)[:, :20].contiguous()}


def pipeline(guidance_embeds=True):
    """2 double and 2 single blocks of width 32 over a 16 x 16 latent (64 tokens)."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                                         num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
                                         guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6))
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, shift_factor=0.1,
                        scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)


@pytest.fixture(scope="module")
def backbone():
    return TinyFlux.from_pipeline(pipeline(), resolution=32, text_length=6)


def latents(backbone, method, prompts=PROMPTS, seeds=SEEDS, config=CONFIG):
    return torch.cat([batch.latents for batch in sample(backbone, method, config, prompts, seeds)])


@pytest.mark.parametrize("embeds", [True, False])
def test_the_loop_is_the_pipelines(embeds):
    backbone = TinyFlux.from_pipeline(pipeline(embeds), resolution=32, text_length=6)
    assert backbone.latent_shape == (4, 16, 16) and backbone.grid == (8, 8)
    conditioning = backbone.encode(PROMPTS)
    noise = initial_noise(SEEDS, backbone.latent_shape, torch.device("cpu"), torch.float32)
    theirs = backbone.pipe(prompt_embeds=conditioning["encoder_hidden_states"], height=32, width=32, num_inference_steps=3,
                           pooled_prompt_embeds=conditioning["pooled_projections"], guidance_scale=3.5, latents=_pack(noise),
                           output_type="latent").images
    torch.testing.assert_close(latents(backbone, METHODS.build("dense", {})), _unpack(theirs, (8, 8)), atol=1e-5, rtol=0)


def test_guidance_is_an_input_and_changes_the_picture(backbone):
    assert Loop(backbone, CONFIG).guidance_halves == 1
    dense = METHODS.build("dense", {})
    other = SamplerConfig(num_steps=3, guidance_scale=1.5, batch_size=2)
    assert not torch.allclose(latents(backbone, dense), latents(backbone, dense, config=other), atol=1e-4)


def test_packing_is_undone_by_unpacking():
    image = torch.randn(2, 4, 6, 10)
    assert torch.equal(_unpack(_pack(image), (3, 5)), image)
    assert torch.equal(_pack(image)[0, 6], image[0, :, 2:4, 2:4].flatten())  # row 1, column 1 of 3 x 5


class KeepEach(Method):
    """Every row keeps tokens of its own at every block: `kept` (B, M)."""

    name, sites = "keep_each", frozenset({"block"})

    def __init__(self, kept):
        super().__init__(None)
        self.kept = kept

    def reduce(self, hidden_states, site):
        return Keep(self.kept, hidden_states.shape[1])


def predicted(backbone, method, rows):
    """The prediction of the images `rows` of PROMPTS at the first step."""
    loop = Loop(backbone, CONFIG)
    noise = initial_noise([SEEDS[row] for row in rows], backbone.latent_shape, torch.device("cpu"), torch.float32)
    with attach(backbone, method, loop.run) as injection:
        return loop.predict(injection, 0, noise, loop.conditioning([PROMPTS[row] for row in rows]), torch.tensor(rows))


def test_rows_that_keep_different_tokens_give_what_each_gives_alone(backbone):
    kept = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(row))[:24] for row in range(2)])
    together = predicted(backbone, KeepEach(kept), [0, 1])
    for row in range(2):
        torch.testing.assert_close(together[row], predicted(backbone, KeepEach(kept[row:row + 1]), [row])[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together[row], predicted(backbone, KeepEach(kept[row]), [row])[0], atol=1e-5, rtol=0)


def test_kept_tokens_keep_their_rotary_positions(backbone):
    """Keeping every token in another order is the dense model only if the tables went with the tokens."""
    shuffled = KeepEach(torch.randperm(64, generator=torch.Generator().manual_seed(0)).expand(2, -1))
    torch.testing.assert_close(predicted(backbone, shuffled, [0, 1]), predicted(backbone, METHODS.build("dense", {}), [0, 1]),
                               atol=1e-5, rtol=0)
    half = KeepEach(torch.arange(32))
    moved = predicted(backbone, half, [0])
    blocks = [*backbone.transformer.transformer_blocks, *backbone.transformer.single_transformer_blocks]
    assert all("forward" not in vars(block) for block in blocks)
    assert not torch.allclose(moved, predicted(backbone, KeepEach(torch.arange(32, 64)), [0]), atol=1e-4)


@pytest.mark.parametrize("name, options", [("random_drop", {"keep_ratio": 0.5}), ("shiva", {}),
                                           ("norm_topk", {"keep_ratio": 0.5}), ("oracle", {"keep_ratio": 0.5}),
                                           ("diffcr", {"keep_ratio": 0.5}), ("toma", {"keep_ratio": 0.5, "tile": 4}),
                                           ("taylor_forecast", {"keep_ratio": 0.6}),
                                           ("fewer_steps", {}), ("first_block_cache", {"sensitivity": 0.3})])
def test_methods_run_and_are_counted_as_they_run(backbone, name, options):
    torch.manual_seed(0)
    method = METHODS.build(name, options)
    out = latents(backbone, method)
    assert torch.isfinite(out).all() and not torch.allclose(out, latents(backbone, METHODS.build("dense", {})), atol=1e-5)
    alone = latents(backbone, method, PROMPTS[1:], SEEDS[1:])
    torch.testing.assert_close(alone[0], out[1], atol=5e-5, rtol=0)
    meter = Meter(backbone, CONFIG)
    assert 0 < meter.cut(method) < 1


@pytest.mark.parametrize("name, reason", [("dydit", "dydit.*flux.*heads"), ("tomesd", "no token positions"),
                                          ("ibtm", "no guidance")])
def test_what_cannot_run_is_refused_with_the_reason(backbone, name, reason):
    with pytest.raises(ConfigError, match=reason):
        latents(backbone, METHODS.build(name, {"keep_ratio": 0.5}))


def test_a_skipped_block_hands_its_text_on(backbone):
    class SkipAll(Method):
        name, sites = "skip_all", frozenset({"block"})

        def reduce(self, hidden_states, site):
            return Skip()

    assert torch.isfinite(predicted(backbone, SkipAll(None), [0])).all()


def test_the_dense_count_is_its_closed_form(backbone):
    """Linear layers and attention of both kinds of block; embeddings, modulation and the last projection apart."""
    cost = Meter(backbone, SamplerConfig(num_steps=1)).dense
    width, image, text = 32, 64, 6
    double = 2 * (image + text) * (4 * width**2 + 8 * width**2)
    single = 2 * (image + text) * (3 * width**2 + 4 * width**2 + 5 * width**2)
    modulation = 2 * width * (2 * 2 * 6 * width + 2 * 3 * width + 2 * width)
    conditioning = 2 * (256 * width + width**2) + 20 * width + width**2  # timestep, guidance, pooled prompt
    embeddings = 2 * (image * 16 * width + text * 24 * width + image * width * 16 + conditioning)
    assert cost.attention == 4 * 4 * (image + text) ** 2 * width
    assert cost.linear == 2 * double + 2 * single + modulation + embeddings


def test_a_saved_pipeline_is_the_same_backbone(tmp_path):
    pipe, absent = pipeline(), dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe.save_pretrained(tmp_path)
    ours, loaded, again = (TinyFlux.from_pipeline(one, resolution=32, text_length=6) for one in (
        pipe, FluxPipeline.from_pretrained(tmp_path, **absent), FluxPipeline.from_pretrained(tmp_path, **absent)))
    assert loaded.fingerprint == again.fingerprint
    dense = METHODS.build("dense", {})
    assert torch.equal(latents(ours, dense), latents(loaded, dense))
    assert float(ours.set_timesteps(4)[0]) == 1000.0
