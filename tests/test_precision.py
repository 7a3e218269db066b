"""Every family in every number format: what its pipeline draws in it, to the bit, and every method in one forward pass."""

import pytest
import torch
from test_families import FAMILIES, PROMPTS, documented
from test_schedulers import latents, theirs

from harness.api import METHODS
from harness.engine.sampler import SamplerConfig, sample
from harness.storage.store import Store
from harness.training.train import TrainConfig, TrainingSet, train

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def made(family, dtype):
    """The tiny backbone of a family in a number format; its text too."""
    backbone = FAMILIES[family]()
    backbone.pipe.to(dtype=dtype)
    encode = backbone.encode

    def encoded(prompts):
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in encode(prompts).items()}

    backbone.encode = encoded
    return backbone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_draws_what_its_pipeline_draws_to_the_bit(family, dtype, monkeypatch):
    backbone = made(family, DTYPES[dtype])
    ours = latents(backbone, [0, 1, 2], 3)
    assert ours.dtype == DTYPES[dtype]
    found = theirs(backbone, monkeypatch)
    assert torch.equal(ours, found) or (dtype == "float64" and torch.allclose(ours, found, rtol=1e-10, atol=0))


@pytest.mark.parametrize("family, dtype", [*((family, "bfloat16") for family in FAMILIES), ("sd3", "float64")])
@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_runs_in_every_format(family, name, dtype):
    """What it keeps and gives back has the model's own format: scores may be finer or coarser, tokens may not.

    Finer scores than the model (bfloat16) on every family; coarser ones (float64) are a method's own affair: on one.
    """
    if documented(family)[name] != "runs":
        pytest.skip("refused in words: test_families")
    backbone, knob, seen = made(family, DTYPES[dtype]), METHODS.get(name).knob, []
    for parameter in backbone.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    for view in backbone.port.blocks(backbone.transformer):
        view.block.register_forward_pre_hook(lambda block, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].dtype),
                                             with_kwargs=True)
    torch.manual_seed(0)
    method = METHODS.build(name, {knob: 0.6} if knob else {})
    config = SamplerConfig(num_steps=2, guidance_scale=3.0, batch_size=2)
    found = next(sample(backbone, method, config, PROMPTS.get(family, ["a red apple", "a cat"])[:2], [3, 1])).latents
    assert found.dtype == DTYPES[dtype] and set(seen) <= {found.dtype} and torch.isfinite(found).all()


TRAINING = TrainConfig(steps=3, batch_size=2, warmup_steps=1, adapter_rank=2, distill_every=2, validate_every=1,
                       validation_images=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, default, family, name", [
    (*formats, family, name) for family in FAMILIES for name in METHODS.names()
    if METHODS.get(name).trainable and documented(family)[name] == "runs"
    for formats in [("bfloat16", "bfloat16"), *[("bfloat16", "float32"), ("float64", "float64")] * (family == "sd3")]])
def test_every_trained_method_trains_in_every_format(family, name, dtype, default, tmp_path):
    """Whatever torch's default format is: routers are float32 beside a model of any format.

    All families with the default that a router must not take over; the other pairs, which only a method sees, on one.
    """
    backbone = made(family, DTYPES[dtype])
    data = TrainingSet(torch.randn(6, *backbone.latent_shape), ["3", "7", "5", "9", "11", "12"], "random")
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[default])
    try:
        method = METHODS.build(name, {})
        trained = train(backbone, method, TRAINING, data, Store(tmp_path))
        config = SamplerConfig(num_steps=2, guidance_scale=3.0, batch_size=2)
        found = next(sample(trained.backbone, method, config, ["3", "7"], [3, 1])).latents
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == DTYPES[dtype] and torch.isfinite(found).all()
    assert {value.dtype for value in method.parameters()} <= {torch.float32}
