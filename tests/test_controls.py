"""The rows that other methods are measured against: the best score there is, and the best a training alone gives."""

import pytest
import torch
from conftest import PROMPTS
from test_train import CONFIG as TRAIN
from test_train import data  # noqa: F401  (a fixture)

from harness.api import METHODS, ConfigError
from harness.cost.flops import Meter
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig, initial_noise, sample
from harness.storage.store import Store
from harness.training.train import train

CONFIG = SamplerConfig(num_steps=2, guidance_scale=1.0)


def block_change(backbone, block):
    """(B, N) norm of what a block adds to each token at the first step of the dense model."""
    loop, seen = Loop(backbone, CONFIG), {}

    def hook(module, args, kwargs, result):
        seen["norm"] = (result[1] - kwargs["hidden_states"]).norm(dim=-1)

    handle = backbone.transformer.transformer_blocks[block].register_forward_hook(hook, with_kwargs=True)
    with attach(backbone, METHODS.build("dense", {}), loop.run) as injection:
        loop.predict(injection, 0, initial_noise([1], backbone.latent_shape, torch.device("cpu"), torch.float32),
                     loop.conditioning(PROMPTS[:1]), torch.tensor([1]))
    handle.remove()
    return seen["norm"]


def test_the_oracle_computes_the_tokens_that_its_first_block_changes_most(tiny_backbone):
    method, plans = METHODS.build("oracle", {"keep_ratio": 0.25}), []
    inner = method.reduce
    method.reduce = lambda hidden_states, site: plans.append(inner(hidden_states, site)) or plans[-1]
    loop = Loop(tiny_backbone, CONFIG)
    with attach(tiny_backbone, method, loop.run) as injection:
        loop.predict(injection, 0, initial_noise([1], tiny_backbone.latent_shape, torch.device("cpu"), torch.float32),
                     loop.conditioning(PROMPTS[:1]), torch.tensor([1]))
    assert plans[0] is None
    kept = plans[1].positions().flatten()
    wanted = block_change(tiny_backbone, 1)[0].topk(16).indices.sort().values
    assert torch.equal(kept, wanted)


def test_the_oracles_scores_are_free_and_the_row_says_so(tiny_backbone):
    meter = Meter(tiny_backbone, SamplerConfig(num_steps=2))
    oracle, random = (meter.count(METHODS.build(name, {"keep_ratio": 0.5})) for name in ("oracle", "random_drop"))
    assert oracle.transformer == random.transformer and oracle.method == 0
    assert "dense pass" in METHODS.get("oracle").uncounted


def test_finetuning_trains_adapters_and_nothing_else(tiny_backbone, data, tmp_path):  # noqa: F811
    method = METHODS.build("finetuned", {})
    config = TRAIN.__class__(**{**TRAIN.__dict__, "adapter": "lora", "steps": 4, "validate_every": 0})
    trained = train(tiny_backbone, method, config, data, Store(tmp_path))
    assert list(trained.series) == ["train/diffusion", "train/grad_norm"]
    assert trained.info["num_parameters"] == 0 and trained.info["stages"]["joint"]["trained_parameters"] > 0
    images = [torch.cat([b.latents for b in sample(backbone, method, CONFIG, PROMPTS, [1, 2, 3, 4])])
              for backbone in (tiny_backbone, trained.backbone)]
    assert not torch.equal(*images)
    meter = Meter(trained.backbone, SamplerConfig(num_steps=2))
    assert meter.count(method) == meter.dense


def test_finetuning_without_adapters_is_refused(tiny_backbone, data, tmp_path):  # noqa: F811
    config = TRAIN.__class__(**{**TRAIN.__dict__, "adapter": "none", "steps": 2})
    with pytest.raises(ConfigError, match=r"train\.adapter: 'none' leaves nothing to train.*finetuned"):
        train(tiny_backbone, METHODS.build("finetuned", {}), config, data, Store(tmp_path))
