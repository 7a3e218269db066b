"""Every metric agrees with a second implementation, points in the direction it says, and knows its own uncertainty."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from scipy.ndimage import gaussian_filter
from scipy.special import stdtrit
from torchmetrics.functional.image import peak_signal_noise_ratio

import harness.metrics as metrics
from harness.api import METHODS, METRICS, ConfigError, Subject
from harness.cost.flops import Cost, Meter
from harness.engine.sampler import Loop, SamplerConfig, sample
from harness.metrics.dense.paired import psnr_cap_db, psnr_db, ssim
from harness.statistics import intervals
from harness.storage.store import Store

assert metrics


def silent(stage: str, done: int, total: int) -> None:
    """No progress bar."""


def make_subject(tmp_path, images: np.ndarray, **changes) -> Subject:
    trial = {"data": {"name": "emoji", "split": "reference"}}
    facts = dict(trial=trial, backbone=None, student=None, method=METHODS.build("random_drop", {}), sampler=None, meter=None,
                 prompts=[""] * len(images), seeds=list(range(len(images))), store=Store(tmp_path), progress=silent,
                 images=images)
    return Subject(**{**facts, **changes})


# ---------------------------------------------------------------------------------------------- likeness to dense


def two_images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = gaussian_filter(rng.uniform(0, 255, (48, 40, 3)), (2, 2, 0))
    image = (255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)
    return image, np.clip(image + rng.normal(scale=12, size=image.shape), 0, 255).astype(np.uint8)


def test_psnr_is_the_definition_and_does_not_wrap_around():
    image, other = two_images()
    assert psnr_db(image, other) == pytest.approx(float(peak_signal_noise_ratio(
        torch.from_numpy(image).double(), torch.from_numpy(other).double(), data_range=255.0)), rel=1e-6)
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr_db(black, white) == psnr_db(white, black) == 0


def test_ssim_is_the_papers_formula():
    image, other = two_images()
    x, y = image.astype(float), other.astype(float)

    def smooth(v: np.ndarray) -> np.ndarray:
        return gaussian_filter(v, (1.5, 1.5, 0), truncate=5 / 1.5, mode="mirror")

    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    formula = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert ssim(image, other) == pytest.approx(formula, abs=1e-5)
    assert ssim(image, image) == pytest.approx(1)


def test_an_identical_pair_is_finite_and_said_to_be_identical(tmp_path):
    image, other = two_images()
    subject = make_subject(tmp_path, np.stack([image, image]), dense_images=np.stack([image, other]))
    psnr, similarity = METRICS.build("paired", {}).measure(subject)
    assert psnr.per_image[0] == pytest.approx(psnr_cap_db(image)) and psnr.notes["identical_images"] == 1
    nearly = image.copy()
    nearly[0, 0, 0] ^= 1
    assert psnr_db(image, nearly) == pytest.approx(psnr_cap_db(image))
    assert psnr.per_image[0] > psnr.per_image[1] and similarity.per_image[0] > similarity.per_image[1]
    assert psnr.better == similarity.better == "higher" and psnr.interval is None


# ---------------------------------------------------------------------------------------------- velocity


@pytest.fixture(scope="module")
def backbone() -> TinySD3:
    return TinySD3.from_pipeline(tiny_pipeline(), text_length=6)


def velocity_subject(tmp_path, backbone, method, images: int = 4) -> Subject:
    config = SamplerConfig(num_steps=3, guidance_scale=4.0, batch_size=2)
    return make_subject(tmp_path, np.zeros((images, 8, 8, 3), np.uint8), backbone=backbone, student=backbone, method=method,
                        sampler=config, meter=Meter(backbone, config),
                        prompts=["a cat", "pizza", "a dog", "a red apple"][:images])


def test_the_dense_model_has_no_velocity_error_against_itself(tmp_path, backbone):
    (measure,) = METRICS.build("velocity", {}).measure(velocity_subject(tmp_path, backbone, METHODS.build("dense", {})))
    assert measure.value == 0 and measure.better == "lower"


def test_dropping_more_tokens_errs_more(tmp_path, backbone):
    values = []
    for keep_ratio in (0.9, 0.5, 0.2):
        subject = velocity_subject(tmp_path, backbone, METHODS.build("random_drop", {"keep_ratio": keep_ratio}))
        (measure,) = METRICS.build("velocity", {}).measure(subject)
        values.append(measure.value)
        assert len(measure.per_image) == 4 and len(measure.series) == 3
        assert np.mean(measure.per_image) == pytest.approx(np.mean([v for _, v in measure.series]))
    assert 0 < values[0] < values[1] < values[2]


def test_the_velocity_error_of_the_first_step_is_that_of_the_bare_predictions(tmp_path, backbone):
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    subject = velocity_subject(tmp_path, backbone, method)
    (measure,) = METRICS.build("velocity", {"num_images": 4}).measure(subject)
    first = SamplerConfig(num_steps=3, guidance_scale=4.0, batch_size=4)
    predictions = {}
    for name, one in (("dense", METHODS.build("dense", {})), ("method", method)):
        def watch(step, latents, prediction, name=name) -> None:
            predictions.setdefault(name, prediction.clone())

        _loop_once(backbone, one, first, subject, watch)
    error = (predictions["method"] - predictions["dense"]).flatten(1).norm(dim=1) / predictions["dense"].flatten(1).norm(dim=1)
    assert measure.series[0][1] == pytest.approx(float(error.mean()), rel=1e-4)


def _loop_once(backbone, method, config, subject, watch) -> None:
    from harness.engine.injection import attach
    from harness.engine.sampler import Loop, initial_noise

    loop = Loop(backbone, config)
    method.begin(loop.run)
    noise = initial_noise(subject.seeds, backbone.latent_shape, backbone.transformer.device, backbone.transformer.dtype)
    with attach(backbone, method, loop.run) as injection:
        loop(injection, noise, loop.conditioning(subject.prompts), subject.seeds, watch)


# ---------------------------------------------------------------------------------------------- cost


def test_kept_tokens_are_the_mean_of_the_count(tmp_path):
    kept = {"attention": [[1.0, 0.5], [1.0, 0.3]], "ffn": [[1.0, 1.0], [1.0, 1.0]]}
    attention, ffn = METRICS.build("tokens", {}).measure(make_subject(tmp_path, np.zeros((1, 8, 8, 3), np.uint8), kept=kept))
    assert attention.value == pytest.approx(0.7) and ffn.value == 1
    assert attention.series == ((0, 0.75), (1, pytest.approx(0.65)))


def test_compute_metrics_are_the_meters(tmp_path, backbone):
    method = METHODS.build("tomesd", {"keep_ratio": 0.5})
    subject = velocity_subject(tmp_path, backbone, method)
    found = {m.name: m.value for m in METRICS.build("flops", {}).measure(subject)}
    cost, dense = subject.meter.count(method), subject.meter.dense
    assert found["compute/gflops_per_image"] == cost.total / 1e9
    assert found["compute/flops_cut"] == pytest.approx(1 - cost.total / dense.total)
    assert found["compute/method_gflops_per_image"] == cost.method / 1e9 > 0
    paper = [c.linear / 2 + c.attention for c in (cost, dense)]
    assert found["compute/paper_rule_cut"] == pytest.approx(1 - paper[0] / paper[1])


WIDTH, BLOCKS = 32, 4
OWN_PARAMETERS = {
    "finetuned": 0,  # adapters are merged
    "diffcr": BLOCKS * WIDTH + BLOCKS * 4,  # a weight for each channel, a ratio for each of 4 regions
    # a head and a group each but the first of 2, and D -> D/16 -> 1 for tokens
    "dydit": BLOCKS * (2 * (WIDTH + 1) + 2 * (WIDTH + 1) + (2 + 1)),
    "sparsedit": 2 * (WIDTH**2 + WIDTH),  # the two matrices of one recovery
    # 2 routers (token, time, prompt, 2 layers of 64, layer, norm, score) and the policy (2 heads, an anchor, 3 embeddings)
    "shiva": 2 * (2 * (WIDTH + 1) * 64 + (20 + 1) * 64 + 2 * 64 + 65 * 64 + 2 * 64 + 64)
    + 2 * (256 * 257 + 257) + 1 + 3 * 256}


@pytest.mark.parametrize("name", METHODS.names())
def test_what_a_method_adds_in_parameters_is_counted_for_every_method(backbone, name):
    method = METHODS.build(name, {"kind": "magcache"} if name == "diffusers_cache" else {})
    if method.trainable:
        method.begin(Loop(backbone, SamplerConfig(num_steps=2)).run)
    cost = Cost(2, 1, 0)
    meter = SimpleNamespace(count=lambda method: cost, dense=cost, run=SimpleNamespace(num_steps=1, guidance_halves=1))
    subject = SimpleNamespace(cost=None, method=method, meter=meter)
    found = {m.name: m.value for m in METRICS.build("flops", {}).measure(subject)}
    assert tuple(found) == METRICS.get("flops").measures
    assert found["compute/method_parameters"] == (OWN_PARAMETERS[name] if method.trainable else 0)


def test_nothing_is_left_attached_after_measuring(tmp_path, backbone):
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    list(METRICS.build("velocity", {}).measure(velocity_subject(tmp_path, backbone, method)))
    assert not any("forward" in vars(module) for module in backbone.transformer.modules())
    batches = sample(backbone, METHODS.build("dense", {}), SamplerConfig(num_steps=1), ["a cat"], [0])
    assert len(list(batches)) == 1


# ---------------------------------------------------------------------------------------------- intervals


def test_an_interval_of_the_mean_is_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = intervals.mean_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05) and high == pytest.approx(values.mean() + half, abs=0.05)
    assert intervals.mean_interval(values) == (low, high)  # seeded


def test_pairing_takes_out_what_pairs_share():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=200)
    a, b = hard + 0.05 + 0.01 * rng.normal(size=200), hard + 0.01 * rng.normal(size=200)
    low, high = intervals.mean_interval(a - b)
    assert 0 < low < 0.05 < high < 0.06


def test_an_interval_of_the_median_ignores_one_wild_value():
    low, high = intervals.median_interval([1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 9.0])
    assert 0.97 < low <= 1.0 <= high < 3  # the eighth value weighs a fifth in the upper end


def test_fewer_than_six_values_have_no_interval_and_equal_values_have_none_to_speak_of():
    for few in ([1.0], [1.0, 2.0, 3.0, 4.0, 5.0]):
        assert intervals.mean_interval(few) is intervals.median_interval(few) is intervals.proportion_interval(few) is None
    assert intervals.mean_interval([2.0] * 7) is None  # a skewed mean of seven is held in 93 % at best
    assert intervals.mean_interval([2.0] * 8) == intervals.median_interval([2.0] * 6) == (2.0, 2.0)


def test_an_interval_of_the_median_lies_between_order_statistics_as_tabulated():
    low, high = intervals.median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # 96.9 % from least to greatest, 78.1 % one further in
    assert 1 < low < 1.4 and high == pytest.approx(7 - low)


def test_an_interval_of_a_share_is_the_textbooks():
    assert intervals.proportion_interval([1.0] * 8 + [0.0] * 2) == pytest.approx((0.4439, 0.9748), abs=1e-4)  # Clopper, Pearson
    assert intervals.proportion_interval([0.0] * 10) == pytest.approx((0, 0.3085), abs=1e-4)


def test_leaving_out_images_gives_the_variance_of_a_mean_whatever_the_remainder():
    for n in (8, 64, 101, 1000):
        values = np.random.default_rng(n).normal(size=n)
        left_out = [float(w @ values / w.sum()) for w in intervals.leave_out(n)]
        low, high = intervals.jackknife_interval(values.mean(), left_out, n)
        expected = values.std(ddof=1) / np.sqrt(n)
        assert (high - low) / 2 == pytest.approx(expected * stdtrit(len(left_out) - 1, 0.975), rel=1e-9 if n <= 64 else 0.3)


def test_the_extrapolation_takes_out_a_bias_that_is_a_line_in_one_over_n():
    n = 320
    left_out = [5 + 7 / (n - n // 32)] * 32
    assert intervals.extrapolated(5 + 7 / n, left_out, n) == pytest.approx(5, rel=1e-12)


def test_options_out_of_range_are_refused():
    for name, option, value in (("fid", "num_subsets", 1), ("velocity", "num_images", 0), ("latency", "rounds", 1),
                                ("memory", "batch_size", 0)):
        with pytest.raises(ConfigError, match=f"{name}.{option}"):
            METRICS.build(name, {option: value})
