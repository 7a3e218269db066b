"""SparseDiT: layouts, pooled grids, and attentions that are the plain one where they should be."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import PROMPTS
from test_train import CONFIG as TRAIN
from test_train import data  # noqa: F401  (a fixture)
from torch.nn import functional as F

from harness.api import METHODS, Call, ConfigError, Run
from harness.cost.budget import solve_budget
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample
from harness.storage.store import Store
from harness.training.train import train
from methods.sparsedit.attention import CrossAttention, MeanAttention
from methods.sparsedit.layout import layout_of, pool_sizes
from methods.sparsedit.resized import Generation, MergeBack

CONFIG = SamplerConfig(num_steps=4, guidance_scale=1.0)


def run_of(grid=(16, 16), steps=12):
    return Run("sd3", 8, grid, 32, 8, tuple(1 - i / steps for i in range(steps)), 1)


def test_the_layout_of_28_blocks_is_the_authors_and_shallow_models_keep_a_module():
    assert layout_of(None, 28) == "P" + 4 * "GSSSRD" + "DDD"
    assert layout_of(None, 8) == "PGSSSRDD"
    assert layout_of(None, 4) == "PGRD"
    assert METHODS.get("sparsedit").presets["table1"]["layout"].count("G") == 3


@pytest.mark.parametrize("layout, message", [("PDDD", "is no layout"), ("GSSS", "is no layout"), ("RGDD", "is no layout"),
                                             ("PGXR", "is no layout")])
def test_what_is_no_layout_is_refused(layout, message):
    with pytest.raises(ConfigError, match=message):
        METHODS.build("sparsedit", {"layout": layout})


def test_a_layout_of_another_depth_is_refused(tiny_backbone):
    with pytest.raises(ConfigError, match="describes 5 blocks, the backbone has 4"):
        METHODS.build("sparsedit", {"layout": "PGSRD"}).begin(Loop(tiny_backbone, CONFIG).run)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("grid", [(16, 16), (32, 24)])
def test_pooled_grids_meet_the_mean_and_grow(keep, grid):
    sizes = pool_sizes(run_of(grid), keep, swing=1.0)
    tokens = [high * wide for high, wide in sizes]
    assert sum(tokens) / len(tokens) / (grid[0] * grid[1]) == pytest.approx(keep, abs=0.01)
    assert sum(tokens[:4]) < sum(tokens[-4:])
    assert all(high <= grid[0] and wide <= grid[1] for high, wide in sizes)
    even = [high * wide for high, wide in pool_sizes(run_of(grid), keep, swing=0.0)]
    assert max(even) - min(even) <= 0.15 * grid[0] * grid[1]


@pytest.mark.parametrize("block, name", [(0, "attn"), (1, "attn2"), (3, "attn")])
def test_mean_attention_is_attention_with_equal_weights(tiny_backbone, block, name):
    module = tiny_backbone.transformer.transformer_blocks[block].get_submodule(name)
    torch.manual_seed(1)
    image, text = torch.randn(2, 64, 32), torch.randn(2, 6, 32)
    inputs = {"hidden_states": image, **({"encoder_hidden_states": text} if name == "attn" else {})}
    found, dense = MeanAttention().execute(module, module.forward, (), inputs), module(**inputs)
    values = module.to_v(image)
    if name == "attn":
        values = torch.cat([values, module.add_v_proj(text)], dim=1)
        torch.testing.assert_close(found[1], dense[1], atol=1e-5, rtol=0)  # text attends as ever
        found = found[0]
    expected = module.to_out[0](torch.full((64, values.shape[1]), 1 / values.shape[1]) @ values)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block, name", [(0, "attn"), (1, "attn2"), (3, "attn")])
def test_cross_attention_to_its_own_tokens_is_the_attention(tiny_backbone, block, name):
    module = tiny_backbone.transformer.transformer_blocks[block].get_submodule(name)
    torch.manual_seed(1)
    text = {"encoder_hidden_states": torch.randn(2, 6, 32)} if name == "attn" else {}
    inputs = {"hidden_states": torch.randn(2, 64, 32), **text}
    found = CrossAttention(inputs["hidden_states"]).execute(module, module.forward, (), inputs)
    torch.testing.assert_close(found, module(**inputs), atol=1e-5, rtol=0)


def test_a_module_of_full_size_begins_as_the_dense_model(tiny_backbone):
    """Pooled to the full grid, with W1 = 0 and W2 = I, generation is the block itself and recovery forgets it."""
    method = METHODS.build("sparsedit", {"layout": "GRDD", "keep_ratio": 0.99})
    loop = Loop(tiny_backbone, CONFIG)
    method.begin(loop.run)
    method.sizes = [(8, 8)] * 4
    outputs = {}

    def hook(name):
        return lambda module, args, kwargs, result: outputs.setdefault(name, []).append(result[1])

    handles = [block.register_forward_hook(hook(i), with_kwargs=True)
               for i, block in enumerate(tiny_backbone.transformer.transformer_blocks)]
    noise = initial_noise([1], tiny_backbone.latent_shape, torch.device("cpu"), torch.float32)
    for one in (method, METHODS.build("dense", {})):
        with torch.no_grad(), attach(tiny_backbone, one, loop.run) as injection:
            loop.predict(injection, 0, noise, loop.conditioning(PROMPTS[:1]), torch.tensor([1]))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(*outputs[0], atol=1e-5, rtol=0)
    assert not torch.allclose(*outputs[1], atol=1e-3)


def test_tokens_come_back_to_their_places(tiny_backbone):
    class Where:
        grid, memory = (8, 8), {}

    x = torch.arange(64.0).view(1, 8, 8, 1).expand(1, 8, 8, 4).reshape(1, 64, 4)
    pooled = Generation((4, 4), Where).reduce(x)
    assert pooled[0, 0, 0] == (0 + 1 + 8 + 9) / 4 and pooled.shape == (1, 16, 4)
    merge = MergeBack(4)
    torch.testing.assert_close(merge(torch.randn(1, 64, 4), x), x)
    wide = F.interpolate(pooled.transpose(1, 2).unflatten(2, (4, 4)), size=(8, 8), mode="nearest")
    assert wide[0, 0, 7, 7] == pooled[0, 15, 0]


def test_a_budget_is_met_and_one_out_of_reach_names_the_reach(tiny_backbone):
    meter = Meter(tiny_backbone, CONFIG)
    solution = solve_budget(meter, "sparsedit", {}, 0.1)
    assert solution.executed == pytest.approx(0.1, abs=0.02)
    with pytest.raises(ConfigError, match="cannot cut 90.0% of the FLOPs.*ask for at most"):
        solve_budget(meter, "sparsedit", {}, 0.9)


def test_the_cost_is_its_closed_form(tiny_backbone):
    """P G R D over 64 tokens pooled to 16: what queries, keys, values, feed-forward and merge save or cost, by hand."""
    meter = Meter(tiny_backbone, SamplerConfig(num_steps=1, guidance_scale=1.0))
    method = METHODS.build("sparsedit", {"layout": "PGRD", "keep_ratio": 0.25, "swing": 0.0})
    cost, dense = meter.count(method), meter.dense
    width, few, image = 32, 16, 64
    both, saved = image + meter.loop.conditioning([""])["encoder_hidden_states"].shape[1], image - few
    pooling = (2 * image - 1) * width**2  # no query, and one row through the output projection
    generation = saved * (2 + 8 + 2) * width**2 - 9 * width**2  # block 1 has two attentions and a norm with 9 outputs, run twice
    recovery = saved * 2 * width**2 - 6 * width**2
    assert dense.linear - cost.linear == 2 * (pooling + generation + recovery)
    assert dense.attention - cost.attention == 4 * width * (image * both + saved * both + saved * image + saved * both)
    assert cost.method == 2 * 2 * image * width**2


def training_sizes(backbone, method, levels):
    """Tokens that a training call computes in the generation's block, per noise level."""
    loop, found = Loop(backbone, CONFIG), []
    with torch.no_grad(), attach(backbone, method, loop.run) as injection:
        for level in levels:
            injection.begin_call(Call(step=-1, timestep=torch.full((2,), level), seeds=torch.tensor([1, 2]), training=True))
            backbone.denoise(torch.randn(2, *backbone.latent_shape), torch.full((2,), 1000 * level), backbone.encode(PROMPTS[:2]))
            found.append(int(injection.token_count.tokens[-1, 1, ""][0]))
    return found


def test_training_pools_as_sampling_does_at_the_same_noise_level(tiny_backbone):
    method, run = METHODS.build("sparsedit", {"layout": "PGRD"}), Loop(tiny_backbone, CONFIG).run
    method.begin(run)
    wanted = [high * wide for high, wide in method.sizes]
    assert len(set(wanted)) > 1
    assert training_sizes(tiny_backbone, method, run.timesteps) == wanted


def test_it_trains_its_matrices_and_samples_what_was_counted(tiny_backbone, data, tmp_path):  # noqa: F811
    method = METHODS.build("sparsedit", {"keep_ratio": 0.3, "merge_lr": 1e-2})
    config = TRAIN.__class__(**{**TRAIN.__dict__, "adapter": "lora", "steps": 6, "validate_every": 0})
    trained = train(tiny_backbone, method, config, data, Store(tmp_path))
    assert set(trained.series) == {"train/diffusion", "train/grad_norm"}
    assert method.merge[0].sparse.weight.abs().max() > 0
    assert torch.equal(copy.deepcopy(method).merge[0].sparse.weight, method.merge[0].sparse.weight)  # it holds no graph
    counts = []
    images = list(sample(trained.backbone, method, CONFIG, PROMPTS, [1, 2, 3, 4], lambda live: counts.append(live.token_count)))
    assert torch.isfinite(images[0].images).all()
    assert counts[0].kept("ffn", 4) == Meter(tiny_backbone, CONFIG).counted(method)[1]["ffn"]


def test_blocks_that_are_recomputed_for_the_gradient_train_alike(tiny_backbone, data, tmp_path):  # noqa: F811
    """A recomputed block asks its attentions again, and must find the same keys."""
    config = TRAIN.__class__(**{**TRAIN.__dict__, "adapter": "lora", "steps": 2, "validate_every": 0})
    series = [train(tiny_backbone, METHODS.build("sparsedit", {}), replace(config, gradient_checkpointing=on), data,
                    Store(tmp_path / str(on))).series for on in (False, True)]
    plain, recomputed = ([norm for _, norm in found["train/grad_norm"]] for found in series)
    assert plain == pytest.approx(recomputed, rel=1e-5)
