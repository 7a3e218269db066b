"""Features and scores are those of the model that made them, at the latents and in the half that the report says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from torch.nn import functional as F

import harness.metrics as metrics
from harness.api import METHODS, METRICS, ConfigError, Method, Subject
from harness.engine.injection import attach
from harness.engine.sampler import Loop, SamplerConfig
from harness.engine.tokens import Keep
from harness.metrics.dense.features import cosine
from harness.metrics.dense.trajectory import dense_trajectory, seed_rows
from harness.storage.store import Store
from harness.training.losses import normalised_error

assert metrics
PROMPTS = ["a cat", "pizza", "a dog", "a red apple"]


@pytest.fixture(scope="module")
def backbone() -> TinySD3:
    return TinySD3.from_pipeline(tiny_pipeline(), text_length=6)


def subject_of(folder, backbone, method: Method, batch_size: int = 2, student: TinySD3 | None = None) -> Subject:
    config = SamplerConfig(num_steps=3, guidance_scale=4.0, batch_size=batch_size)
    return Subject(trial={}, backbone=backbone, student=student or backbone, method=method, sampler=config,
                   meter=None, prompts=PROMPTS, seeds=[0, 1, 2, 3], store=Store(folder),
                   progress=lambda stage, done, total: None, images=np.zeros((4, 8, 8, 3), np.uint8), out_dir=folder)


def features(subject: Subject, **options) -> dict:
    measures = METRICS.build("features", {"every": 2, **options}).measure(subject)
    return {measure.name.split("/")[1]: measure for measure in measures}


# ---------------------------------------------------------------------------------------------- features


def test_the_dense_model_has_its_own_features(tmp_path, backbone):
    found = features(subject_of(tmp_path, backbone, METHODS.build("dense", {})))
    assert found["feature_mse"].value == found["prediction_mse"].value == 0
    assert found["feature_cosine"].value == pytest.approx(1, abs=1e-6)
    assert (found["feature_mse"].better, found["feature_cosine"].better) == ("lower", "higher")


def test_dropping_more_tokens_moves_the_features_further(tmp_path, backbone):
    errors, similarities = [], []
    for keep_ratio in (0.9, 0.5, 0.2):
        found = features(subject_of(tmp_path, backbone, METHODS.build("random_drop", {"keep_ratio": keep_ratio})))
        errors.append(found["feature_mse"].value)
        similarities.append(found["feature_cosine"].value)
        for measure in found.values():
            assert len(measure.per_image) == 4 and len(measure.series) == 3
            assert np.mean(measure.per_image) == pytest.approx(measure.value)
    assert 0 < errors[0] < errors[1] < errors[2] and 1 > similarities[0] > similarities[1] > similarities[2]


def test_the_features_are_those_after_every_second_block(tmp_path, backbone):
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    subject = subject_of(tmp_path, backbone, method, batch_size=4)
    found = features(subject)
    latents, loop = dense_trajectory(subject, slice(0, 4))["latents"], Loop(backbone, subject.sampler)
    recorded = {}
    for name, one in (("method", method), ("dense", METHODS.build("random_drop", {"keep_ratio": 1.0}))):
        one.begin(loop.run)
        with torch.no_grad(), attach(backbone, one, loop.run) as injected, injected.recording() as blocks:
            loop.predict(injected, 0, latents[0], loop.conditioning(PROMPTS), seed_rows(subject, slice(0, 4), 2))
        recorded[name] = [after for _, after in blocks]
    expected = np.mean([float(F.mse_loss(F.layer_norm(recorded["method"][b], (32,)), F.layer_norm(recorded["dense"][b], (32,))))
                        for b in (1, 3)])
    assert found["feature_mse"].series[0][1] == pytest.approx(expected, rel=1e-5)
    assert found["feature_mse"].notes["taps"] == "after blocks 1, 3"


def test_an_images_features_do_not_depend_on_its_batch(tmp_path, backbone):
    method = METHODS.build("random_drop", {"keep_ratio": 0.5})
    one, four = (features(subject_of(tmp_path, backbone, method, size))["feature_mse"].per_image for size in (1, 4))
    assert one == pytest.approx(four, rel=1e-4)


def test_an_adapted_student_is_compared_with_the_dense_model(tmp_path, backbone):
    transformer = copy.deepcopy(backbone.transformer)
    with torch.no_grad():
        for parameter in transformer.transformer_blocks[0].parameters():
            parameter.mul_(1.1)
    student = backbone.with_transformer(transformer, "adapted")
    found = features(subject_of(tmp_path, backbone, METHODS.build("dense", {}), student=student))
    assert found["feature_mse"].value > 0 and found["prediction_mse"].value > 0


def test_a_method_at_branch_sites_has_features_too(tmp_path, backbone):
    found = features(subject_of(tmp_path, backbone, METHODS.build("tomesd", {"keep_ratio": 0.6})))
    assert found["feature_mse"].value > 0
    assert not any(block._forward_hooks for block in backbone.transformer.transformer_blocks)


def test_taps_beyond_the_last_block_are_refused(tmp_path, backbone):
    with pytest.raises(ConfigError, match=r"features.every: 9, but backbone .* has 4 blocks"):
        features(subject_of(tmp_path, backbone, METHODS.build("dense", {})), every=9)


def test_the_measures_ignore_a_tokens_scale_and_are_the_textbook_ones():
    a, b = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    assert torch.allclose(normalised_error(3 * a + 1, a), torch.zeros(2), atol=1e-4)
    assert torch.allclose(cosine(3 * a, a), torch.ones(2))
    expected = torch.stack([torch.stack([x @ y / (x.norm() * y.norm()) for x, y in zip(*rows, strict=True)]).mean()
                            for rows in zip(a, b, strict=True)])
    assert torch.allclose(cosine(a, b), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------- scores


class Ranked(Method):
    """Scores that tell step, block, image and half; block 0 is not routed."""

    name = "ranked"

    def reduce(self, hidden_states, site):
        if site.block == 0:
            return None
        rows, num_tokens = hidden_states.shape[:2]
        half = torch.arange(rows).div(rows // 2, rounding_mode="floor")  # 0: unconditional, 1: conditional
        label = 1000 * half + 100 * site.step + 10 * site.block + site.call.seeds
        site.memory["scores"] = label[:, None] + torch.linspace(0, 0.5, num_tokens)
        return Keep(torch.arange(num_tokens // 2), num_tokens)


def test_scores_are_those_of_each_image_step_and_block(tmp_path, backbone):
    (measure,) = METRICS.build("scores", {"num_images": 3, "steps": 2}).measure(subject_of(tmp_path, backbone, Ranked(None)))
    with np.load(measure.artifact) as saved:
        scores = saved["scores"]
        assert saved["steps"].tolist() == [0, 2] and tuple(saved["grid"]) == (8, 8) and len(saved["images"]) == 3
        assert saved["noise_levels"][0] > saved["noise_levels"][1]
    assert scores.shape == (3, 2, 4, 64) and np.isnan(scores[:, :, 0]).all()
    for image in range(3):
        for line, step in enumerate((0, 2)):
            assert scores[image, line, 1:, 0].tolist() == [1000 + 100 * step + 10 * block + image for block in (1, 2, 3)]
    assert measure.value == pytest.approx(float(torch.linspace(0, 0.5, 64).std(unbiased=False)), rel=1e-3)


@pytest.mark.parametrize("name", ["dense", "random_drop"])
def test_a_method_without_scores_has_nothing_to_measure(tmp_path, backbone, name):
    assert not list(METRICS.build("scores", {}).measure(subject_of(tmp_path, backbone, METHODS.build(name, {}))))
    assert not (tmp_path / "scores.npz").exists()
