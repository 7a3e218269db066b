"""Scores per image (CLIP score, CLIP-IQA, LPIPS, ImageReward, HPS), and what happens where a metric cannot be had."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import TinyInRegistry
from fidelity import clip_folder, dinov2_folder, pictures, silent, subject_of
from torchmetrics.functional.image.lpips import _LPIPS

from harness.api import BACKBONES, METRICS, ConfigError, Unavailable
from harness.metrics.extractors import weights
from harness.storage.store import Store
from harness.trial import build
from harness.trial.job import run_job

PROMPTS = ["a cat", "pizza", "a red apple", "zebra " * 30]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("weights"))


# ---------------------------------------------------------------------------------------------- CLIP


def direct_logits(folder, images: np.ndarray, texts: list[str]) -> torch.Tensor:
    """What transformers' own forward pass gives: scaled cosines (images, texts)."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=texts, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=20)
    with torch.no_grad():
        return model(**inputs).logits_per_image, float(model.logit_scale.exp())


def test_the_clip_score_is_transformers_own_cosine(tmp_path, clip):
    images = pictures(4, 1)
    (measure,) = METRICS.build("clip_score", {"weights": str(clip)}).measure(subject_of(tmp_path, images, prompts=PROMPTS))
    logits, scale = direct_logits(clip, images, PROMPTS)
    expected = (100 * logits.diag() / scale).clamp(min=0)
    assert measure.name == "prompt/clip_score_4" and measure.better == "higher" and measure.n == 4
    assert np.allclose(measure.per_image, expected, atol=1e-3) and np.ptp(measure.per_image) > 0.1
    assert measure.value == pytest.approx(float(expected.mean()), abs=1e-3)
    assert measure.interval is None and measure.notes["scorer_id"].startswith("clip-")  # of 4 images, none


def test_a_negative_cosine_scores_nothing(tmp_path, clip):
    images, texts = np.repeat(pictures(4, 1), 2, 0), PROMPTS * 2
    (measure,) = METRICS.build("clip_score", {"weights": str(clip)}).measure(subject_of(tmp_path, images, prompts=texts))
    negative = (direct_logits(clip, images, texts)[0].diag() < 0).tolist()
    assert any(negative) and not all(negative) and [v == 0 for v in measure.per_image] == negative


def test_clip_iqa_is_the_softmax_over_good_and_bad(tmp_path, clip):
    images = pictures(5, 2)
    (measure,) = METRICS.build("clip_iqa", {"weights": str(clip)}).measure(subject_of(tmp_path, images))
    logits, _ = direct_logits(clip, images, ["Good photo.", "Bad photo."])
    assert measure.name == "image/clip_iqa_5" and np.allclose(measure.per_image, logits.softmax(1)[:, 0], atol=1e-5)
    assert all(0 < v < 1 for v in measure.per_image) and np.ptp(measure.per_image) > 1e-5


# ---------------------------------------------------------------------------------------------- LPIPS


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_torchmetrics_on_the_same_network(tmp_path, net):
    torch.manual_seed(0)
    theirs = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    layers = (torchvision.models.alexnet if net == "alex" else torchvision.models.vgg16)
    with torch.device("meta"):
        names = list(layers().features.state_dict())
    tensors = [parameter for part in ("slice1", "slice2", "slice3", "slice4", "slice5")
               for parameter in getattr(theirs.net, part).parameters()]
    torch.save({f"features.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}, tmp_path / "net.pth")
    images, dense = pictures(3, 1, 64), pictures(3, 2, 64)
    images[0] = dense[0]
    metric = METRICS.build("lpips", {"net": net, "weights": str(tmp_path / "net.pth")})
    (measure,) = metric.measure(subject_of(tmp_path, images, dense))
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (images, dense))
    expected = theirs(a, b).flatten()
    assert measure.name == f"dense/lpips_{net}" and measure.better == "lower" and measure.per_image[0] == 0
    assert np.allclose(measure.per_image, expected, rtol=1e-3) and min(measure.per_image[1:]) > 0.001


def test_the_file_of_another_network_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(ConfigError, match=r"lpips.weights: in '.*' features.0.weight is \(1,\), .* has \(64, 3, 11, 11\)"):
        METRICS.config("lpips", {"weights": str(tmp_path / "net.pth")})


# ---------------------------------------------------------------------------------------------- in an environment of their own


STUBS = {"ImageReward": "class Model:\n    def score(self, prompt, image):\n        return len(prompt) + image.size[0] / 1000\n\n"
                        "def load(name):\n    assert name == 'ImageReward-v1.0'\n    return Model()\n",
         "hpsv2": "def score(image, prompt, hps_version):\n    assert hps_version == 'v2.1'\n"
                  "    return [image.getpixel((0, 0))[0] / 255]\n"}


@pytest.mark.parametrize(("metric", "package"), [("image_reward", "ImageReward"), ("hps", "hpsv2")])
def test_an_outside_scorer_gets_each_image_with_its_prompt(tmp_path, monkeypatch, metric, package):
    (tmp_path / f"{package}.py").write_text(STUBS[package])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    images = pictures(4, 1)
    (measure,) = METRICS.build(metric, {"command": sys.executable}).measure(subject_of(tmp_path, images, prompts=PROMPTS))
    expected = [len(p) + 0.032 for p in PROMPTS] if metric == "image_reward" else images[:, 0, 0, 0] / 255
    assert measure.name == f"prompt/{metric}_4" and measure.per_image == pytest.approx(list(expected))
    assert measure.better == "higher" and measure.notes["scorer_id"]


def test_an_outside_scorer_that_cannot_run_is_unavailable_and_says_why(tmp_path, monkeypatch):
    subject = subject_of(tmp_path, pictures(4, 1))
    with pytest.raises(Unavailable, match="needs an environment of its own; name its python in image_reward.command"):
        list(METRICS.build("image_reward", {}).measure(subject))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Unavailable, match="hps: its package is not there: hpsv2: ModuleNotFoundError: No module named 'hpsv2'"):
        list(METRICS.build("hps", {"command": sys.executable}).measure(subject))
    (tmp_path / "hpsv2.py").write_text("def score(image, prompt, hps_version):\n    raise OSError('no weights')\n")
    with pytest.raises(Unavailable, match="hps: its scorer ended with code 1: OSError: no weights"):
        list(METRICS.build("hps", {"command": sys.executable}).measure(subject))
    (tmp_path / "hpsv2.py").write_text("def score(image, prompt, hps_version):\n    return [float('nan')]\n")
    with pytest.raises(RuntimeError, match="metric hps: its scorer gave 4 scores for 4 images, or one that is not finite"):
        list(METRICS.build("hps", {"command": sys.executable}).measure(subject))
    with pytest.raises(ConfigError, match="hps.command: 'no/python' is no program"):
        METRICS.config("hps", {"command": "no/python"})


# ---------------------------------------------------------------------------------------------- unavailable


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache and addresses where nothing answers: 127.0.0.1 refuses at once."""
    monkeypatch.setattr(weights, "_failed", {})
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    from harness.metrics.dense import lpips
    from harness.metrics.extractors import inception

    monkeypatch.setattr(inception, "URLS", {name: ("https://127.0.0.1:9/net.pth", "") for name in inception.URLS})
    monkeypatch.setattr(lpips, "URLS", {name: ("https://127.0.0.1:9/net.pth", "") for name in lpips.URLS})


FETCHING = ["fid", "kid", "precision_recall", "fd_dinov2", "clip_score", "clip_iqa", "lpips"]


@pytest.mark.parametrize("name", FETCHING)
def test_without_a_network_a_metric_is_unavailable_within_seconds(tmp_path, no_network, name):
    metric, started = METRICS.build(name, {}), time.monotonic()
    subject = subject_of(tmp_path, pictures(4, 1), pictures(4, 2))
    for _ in range(2):  # the second time nothing is tried
        with pytest.raises(Unavailable, match="could not be fetched .*refused"):
            list(metric.measure(subject))
    assert time.monotonic() - started < 5 and len(metric.names(len(subject.images))) == (2 if name == "precision_recall" else 1)


def test_a_cached_file_is_not_fetched(tmp_path, no_network):
    cached = tmp_path / "hub" / "checkpoints" / "net.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    assert weights.fetched("https://127.0.0.1:9/net.pth") == cached


def test_a_model_of_another_kind_is_refused(tmp_path, clip):
    with pytest.raises(ConfigError, match="clip_score.weights: '.*' holds a model of type 'dinov2'; this metric needs 'clip'"):
        METRICS.config("clip_score", {"weights": str(dinov2_folder(tmp_path))})
    with pytest.raises(ConfigError, match="clip_iqa.weights: there is no folder '/nowhere'"):
        METRICS.config("clip_iqa", {"weights": "/nowhere"})
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(ConfigError, match="holds no tokenizer .*; save the processor beside the model"):
        METRICS.config("clip_score", {"weights": str(tmp_path)})
    METRICS.config("clip_score", {"weights": "owner/name"})  # on the hub, perhaps


def test_a_trial_reports_what_is_unavailable_and_goes_on(tmp_path, monkeypatch, no_network, clip):
    BACKBONES.names()
    monkeypatch.setitem(BACKBONES._classes, "tiny", TinyInRegistry)
    trial = {"backbone": {"name": "tiny"}, "sampler": {"num_steps": 2, "guidance_scale": 4.0, "batch_size": 4},
             "data": {"name": "emoji", "split": "reference"}, "seeds": [0, 3], "budget": None, "train": None, "threads": 1,
             "method": {"name": "random_drop", "keep_ratio": 0.5},
             "metrics": [{"name": "fid"}, {"name": "image_reward"}, {"name": "clip_score", "weights": str(clip)},
                         {"name": "paired"}]}
    part = json.loads(json.dumps(run_job("score", trial, Store(tmp_path / "store"), silent, tmp_path / "s" / "artifacts" / "0")))
    build._held.clear()
    fid = part["metrics"]["fidelity/fid_4"]
    assert fid["value"] is None and fid["unavailable"].startswith("net.pth could not be fetched (")
    assert "image_reward.command" in part["metrics"]["prompt/image_reward_4"]["unavailable"]
    assert part["metrics"]["prompt/clip_score_4"]["value"] is not None and part["metrics"]["dense/ssim"]["value"] is not None
    assert set(part["per_image"]) == {"prompt/clip_score_4", "dense/psnr_db", "dense/ssim"}
