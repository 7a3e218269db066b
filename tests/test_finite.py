"""No NaN and no infinity becomes a picture: what broke is named by seed, step and part; agreement with nothing is no praise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROMPTS, TinySD3, tiny_pipeline
from test_trial import TinyInRegistry, make_trial, run

from harness.api import BACKBONES, METHODS, METRICS, ConfigError, Measure, Metric
from harness.backbones.sd3 import SD3
from harness.engine.sampler import SamplerConfig, sample
from harness.storage.store import Store
from harness.training.train import TrainConfig, TrainingSet, train, training_set
from harness.trial import build

SEEDS = [11, 12, 13, 14]
CONFIG = SamplerConfig(num_steps=4, guidance_scale=3.0, batch_size=3)
DENSE = METHODS.build("dense", {})


def drawn(backbone, method=DENSE):
    return list(sample(backbone, method, CONFIG, PROMPTS, SEEDS))


@pytest.fixture
def backbone():
    return TinySD3.from_pipeline(tiny_pipeline())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2, 3])
def test_a_prediction_that_is_no_number_names_seed_step_and_transformer(backbone, row, value):
    """Of four images in batches of three: the one, at the one step, is said; nothing later is computed of the next batch."""
    denoise, calls = backbone.denoise, []

    def broken(latents, timestep, conditioning):
        calls.append(len(latents))
        prediction = denoise(latents, timestep, conditioning)
        if len(calls) == 4 * (row // 3) + 3:  # the third step of its batch
            prediction[len(latents) // 2 + row % 3, 1, 2, 3] = value  # the conditional half
        return prediction

    backbone.denoise = broken
    with pytest.raises(FloatingPointError, match=rf"seed {SEEDS[row]}, prompt '{PROMPTS[row]}'.*'dense'.*transformer's "
                       "prediction is NaN or infinite at step 2 of 4.*check the weights"):
        drawn(backbone)
    assert len(calls) == 4 * (row // 3 + 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_decoded_picture_that_is_no_number_names_seed_and_autoencoder(backbone, value):
    decode = backbone.pipe.vae.decode

    def broken(latents, return_dict):
        images = decode(latents, return_dict=False)[0]
        images[1, 0, 5, 5] = value
        return (images,)

    backbone.pipe.vae.decode = broken
    with pytest.raises(FloatingPointError, match="seed 12.*autoencoder decoded is NaN or infinite, so there is no picture"):
        drawn(backbone)


def test_text_that_is_no_number_names_the_text_encoder(backbone):
    encode = backbone.encode
    backbone.encode = lambda prompts: {key: value * math.nan for key, value in encode(prompts).items()}
    with pytest.raises(FloatingPointError, match="seed 11.*the text encoder's encoder_hidden_states is NaN"):
        drawn(backbone)


def test_what_the_scheduler_breaks_is_the_schedulers(backbone):
    step = backbone.scheduler.step
    backbone.scheduler.step = lambda output, timestep, latents, **options: (
        step(output, timestep, latents, **options)[0] * (math.inf if timestep == backbone.scheduler.timesteps[-1] else 1),)
    with pytest.raises(FloatingPointError, match="seed 11.*what FlowMatchEulerDiscreteScheduler made of it is NaN"):
        drawn(backbone)


def test_float16_is_told_what_to_do(backbone):
    backbone.pipe.to(dtype=torch.float16)
    encode = backbone.encode
    backbone.encode = lambda prompts: {key: value.half() * 6e4 for key, value in encode(prompts).items()}
    with pytest.raises(FloatingPointError, match="in float16.*float16 ends at 65504: set backbone.dtype: bfloat16 or float32"):
        drawn(backbone)


def test_a_method_that_breaks_is_named(backbone):
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    reduce = method.reduce

    def broken(hidden_states, site):
        hidden_states.mul_(math.nan if site.step == 1 and site.block == 2 else 1)
        return reduce(hidden_states, site)

    method.reduce = broken
    with pytest.raises(FloatingPointError, match="method 'random_drop': the transformer's prediction is NaN.*step 1 of 4"):
        drawn(backbone, method)


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_named_when_the_model_is_loaded(tmp_path, part, value):
    pipe = tiny_pipeline()
    name, weight = list(getattr(pipe, part).named_parameters())[5]
    weight.data.flatten()[3] = value
    pipe.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ConfigError, match=rf"backbone.weights: '{tmp_path}': {part}.{name} holds NaN or infinity, as do 0"):
            SD3(SD3.Config(weights=str(tmp_path), dtype=dtype))


# ---------------------------------------------------------------------------------------------- in a trial


@pytest.fixture
def tiny(monkeypatch):
    """The backbone of the next trial, to be changed."""
    BACKBONES.names(), METHODS.names()
    made = TinyInRegistry(object())
    monkeypatch.setitem(BACKBONES._classes, "tiny", type("Made", (TinyInRegistry,), {"__new__": lambda cls, config=None: made}))
    build._held.clear()
    yield made
    build._held.clear()


@pytest.mark.parametrize("method", [{"name": "dense"}, {"name": "random_drop", "keep_ratio": 0.5}])
@pytest.mark.parametrize("words, change", [("flat, of one colour each", lambda latents: torch.zeros(len(latents), 3, 32, 32)),
                                           ("one picture, though their seeds differ",
                                            lambda latents: torch.linspace(0, 1, 32).expand(len(latents), 3, 32, 32))])
def test_dense_images_without_content_fail_the_trial(tiny, tmp_path, method, words, change):
    tiny.decode = change
    with pytest.raises(RuntimeError, match=words):
        run("score", make_trial(method, metrics=[{"name": "paired"}]), tmp_path)


def test_one_flat_image_among_others_is_a_picture(tiny, tmp_path):
    decode = tiny.decode
    tiny.decode = lambda latents: torch.cat([torch.zeros(1, 3, 32, 32), decode(latents)[1:]])
    part = run("score", make_trial({"name": "random_drop", "keep_ratio": 0.5}, metrics=[{"name": "paired"}]), tmp_path)
    assert np.isfinite(part["metrics"]["dense/psnr_db"]["value"])


@pytest.mark.parametrize("fields, words", [({"interval": (0.0, math.nan)}, "its interval"), ({"per_image": (1.0, math.inf)},
                                           "one of its images"), ({"series": ((0, 1.0), (1, math.nan))}, "its series")])
def test_what_is_published_beside_a_number_is_finite_too(tiny, tmp_path, monkeypatch, fields, words):
    class Odd(Metric):
        name, measures = "odd", ("odd",)

        def measure(self, subject):
            yield Measure("odd", 1.0, "lower", n=2, **fields)

    METRICS.names()
    monkeypatch.setitem(METRICS._classes, "odd", Odd)
    with pytest.raises(ArithmeticError, match=f"odd is 1.0, but {words} is not finite"):
        run("score", make_trial({"name": "dense"}, metrics=[{"name": "odd"}]), tmp_path)


# ---------------------------------------------------------------------------------------------- in a training


def test_training_images_that_the_autoencoder_breaks_are_named(backbone, tmp_path):
    class Data:
        images, captions, fingerprint = np.zeros((70, 32, 32, 3), np.uint8), ["a"] * 70, "x"

    encode = backbone.encode_images
    backbone.encode_images = lambda images: encode(images).index_fill(0, torch.tensor([2]), math.nan)
    with pytest.raises(FloatingPointError, match="latents of training image 2 are NaN"):
        training_set(backbone, Data(), Store(tmp_path))


def test_a_gradient_that_is_no_number_stops_the_training_before_it_is_applied(backbone, tmp_path):
    data = TrainingSet(torch.randn(6, 4, 8, 8), ["a"] * 6, "random")
    method = METHODS.build("shiva", {})
    method.losses = lambda: {"root": (method.policy.anchor - method.policy.anchor.detach()).abs().sqrt()}  # 0, and no slope there
    with pytest.raises(FloatingPointError, match="at step 0: the gradient is (nan|inf), the losses are finite.*no step"):
        train(backbone, method, TrainConfig(steps=4, batch_size=2, validation_images=2), data, Store(tmp_path))


@pytest.mark.parametrize("rows, words", [([3], "1 of 32 rows of 'transformer_blocks.2.attn.to_q' are zero .1 such layers"),
                                         (range(32), "32 of 32 rows")])
def test_dora_on_rows_of_zeros_is_refused_by_name_before_anything_is_trained(backbone, tmp_path, rows, words):
    """DoRA divides each row by its length: the output would be NaN before the first step."""
    backbone.transformer.transformer_blocks[2].attn.to_q.weight.data[list(rows)] = 0
    data, seen = TrainingSet(torch.randn(6, 4, 8, 8), ["a"] * 6, "random"), []
    config = TrainConfig(steps=6, batch_size=2, warmup_steps=1, adapter_rank=2)
    with pytest.raises(ConfigError, match=f"train.adapter: dora divides.*{words}.*take train.adapter: lora"):
        train(backbone, METHODS.build("shiva", {}), config, data, Store(tmp_path), lambda *report: seen.append(report))
    assert not seen, "not even the stages before those with adapters"
    for kind in ("lora", "none"):
        train(backbone, METHODS.build("shiva", {}), replace(config, adapter=kind), data, Store(tmp_path))
