"""The distances to real images agree with the library and the textbook, and the shipped reference is the right one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid as cleanfid
from PIL import Image
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from harness.api import METHODS, METRICS, Subject
from harness.data import load
from harness.metrics.extractors.effnet import NAME, extractor_id, features_of, network, scaled
from harness.metrics.fidelity import reference
from harness.metrics.fidelity.fd import Frechet, KernelDistance
from harness.metrics.fidelity.reference import SHIPPED, load_reference
from harness.statistics import intervals
from harness.storage.store import Store


def silent(stage: str, done: int, total: int) -> None:
    """No progress bar."""


# ---------------------------------------------------------------------------------------------- the extractor


def test_the_extractor_recognises_a_photograph():
    photo = Image.open(matplotlib.get_data_path() + "/sample_data/grace_hopper.jpg").convert("RGB")
    top = (photo.height - photo.width) // 2
    square = photo.crop((0, top, photo.width, top + photo.width)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    chances = network()(scaled(pixels)).softmax(-1)[0]
    assert int(chances.argmax()) == 652 and float(chances[652]) > 0.3  # military uniform


def test_features_do_not_depend_on_the_batch():
    images = load("emoji", "reference").images[:5]
    together, alone = features_of(images, batch_size=5), features_of(images, batch_size=1)
    assert torch.allclose(together, alone, atol=1e-4)
    assert together.shape == (5, 1280) and (together >= 0).all() and (together <= 6).all()


def test_the_shipped_reference_is_what_the_extractor_gives_now():
    images = load("emoji", "reference")
    with np.load(SHIPPED) as stored:
        key, features = json.loads(str(stored["key"])), stored["features"]
    assert key == {"data": images.fingerprint, "extractor": extractor_id()}
    picks = [0, 400, 1300]
    assert np.allclose(features[picks], features_of(images.images[picks]).numpy(), atol=5e-3)


def test_a_reference_of_another_extractor_is_not_used(tmp_path, monkeypatch, caplog):
    few = SimpleNamespace(images=load("emoji", "reference").images[:3], fingerprint=load("emoji", "reference").fingerprint)
    monkeypatch.setattr(reference.data, "load", lambda name, split: few)
    shipped = load_reference("emoji", "reference", Store(tmp_path), silent)
    assert len(shipped.features) > 1000
    monkeypatch.setattr(reference, "extractor_id", lambda: "0" * 12)
    computed = load_reference("emoji", "reference", Store(tmp_path), silent)
    assert len(computed.features) == 3 and "another extractor" in caplog.text and computed.id != shipped.id
    assert np.abs(computed.features - shipped.features[:3]).max() < 5e-3


# ---------------------------------------------------------------------------------------------- distances to real images


def cloud(n: int, seed: int, shift: float = 0.0, d: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ np.diag(np.linspace(0.5, 2, d)) + shift


@pytest.mark.parametrize("n", [200, 9])
def test_the_frechet_distance_is_the_textbooks(n):
    a, b = cloud(n, 1, 0.3), cloud(300, 2)
    ours = Frechet(a, b)()
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    textbook = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * scipy.linalg.sqrtm(sa @ sb).real)
    library = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False)
    assert ours == pytest.approx(library["frechet_inception_distance"], rel=1e-5)
    if n > 12:  # sqrtm of a singular product is not accurate
        assert ours == pytest.approx(textbook, rel=1e-5)


def test_clean_fid_agrees_on_the_same_features():
    a, b = cloud(400, 1, 0.3), cloud(500, 2)
    theirs = cleanfid.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert Frechet(a, b)() == pytest.approx(theirs, rel=1e-5)
    np.random.seed(0)  # clean-fid draws from the global generator; subsets of all images leave nothing to draw
    theirs = cleanfid.kernel_distance(a[:400], b[:400], num_subsets=1, max_subset_size=400)
    ours = KernelDistance(a[:400], b[:400]).value
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_weighted_frechet_distance_is_that_of_repeated_rows():
    a, b, weights = cloud(30, 1), cloud(100, 2), np.random.default_rng(0).integers(0, 4, 30)
    repeated = np.repeat(a, weights, axis=0)
    assert Frechet(a, b)(weights) == pytest.approx(Frechet(repeated, b)(), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(40, 64), (300, 12)])
def test_what_calls_share_changes_no_frechet_distance(n, d):
    """Leaving rows out, halves and mixtures, in any order, are the distances of just those rows."""
    a, b, rng = cloud(n, 1, 0.3, d), cloud(500, 2, d=d), np.random.default_rng(0)
    frechet = Frechet(a, b)
    for weights in [np.ones(n), *intervals.leave_out(n)[:3], rng.integers(0, 2, n), np.ones(n), *rng.integers(0, 2, (2, n))]:
        assert frechet(weights) == pytest.approx(Frechet(a[weights > 0], b)(), rel=1e-7)


def test_the_kernel_distance_is_torch_fidelitys():
    a, b = cloud(60, 1, 0.2), cloud(80, 2)
    ours = KernelDistance(a, b).value
    library = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=60, kid_subsets=100, verbose=False)
    assert ours == pytest.approx(library["kernel_inception_distance_mean"], rel=1e-5)


def test_the_kernel_distance_of_all_images_is_the_unbiased_estimate():
    a, b = cloud(40, 1, 0.2), cloud(50, 2)
    everything = KernelDistance(a, b)(np.ones(40))
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    k_xx = kernel(a, a)
    assert everything == pytest.approx((k_xx.sum() - np.trace(k_xx)) / (40 * 39) - 2 * kernel(a, b).mean(), rel=1e-9)


def test_both_distances_rise_with_damage_and_vanish_for_equal_sets():
    b = cloud(400, 2)
    same, near, far = (Frechet(x, b)() for x in (b, cloud(400, 3), cloud(400, 3, 1.0)))
    assert abs(same) < 1e-9 and same < near < far
    near, far = (KernelDistance(x, b).value for x in (cloud(400, 3), cloud(400, 3, 1.0)))
    assert abs(near) < 0.1 * far


def test_the_interval_of_the_frechet_distance_is_the_spread_of_other_samples():
    b = cloud(2000, 2)
    measures = [Frechet(cloud(100, seed, 0.3), b) for seed in range(10, 110)]
    values, widths = [measure() for measure in measures], []
    for value, measure in zip(values, measures, strict=True):
        low, high = intervals.jackknife_interval(value, [measure(w) for w in intervals.leave_out(100)], 100)
        widths.append(high - low)
        assert low < value < high
    wider = np.mean(widths) / (2 * 1.96 * np.std(values))
    assert 1 < wider < 1.5  # a jackknife counts what is quadratic in the images twice, and is conservative near the reference


def make_subject(tmp_path, images: np.ndarray) -> Subject:
    return Subject(trial={"data": {"name": "emoji", "split": "reference"}}, backbone=None, student=None, sampler=None, meter=None,
                   method=METHODS.build("random_drop", {}), prompts=[""] * len(images), seeds=list(range(len(images))),
                   store=Store(tmp_path), progress=silent, images=images)


def test_real_images_are_nearer_to_the_reference_than_damaged_ones(tmp_path):
    real = load("emoji", "train").images[::130]
    noise = np.random.default_rng(0).normal(scale=25, size=real.shape)
    damaged = np.clip(real + noise, 0, 255).astype(np.uint8)
    found = {}
    for name, images in (("real", real), ("damaged", damaged)):
        measures = list(METRICS.build("fd", {}).measure(make_subject(tmp_path, images)))
        assert [m.name for m in measures] == [f"fidelity/fd_effnet_{len(real)}", f"fidelity/kd_effnet_{len(real)}"]
        assert all(m.better == "lower" and m.interval[0] < m.value < m.interval[1] and m.n == len(real) for m in measures)
        assert "n <= 1280" in measures[0].notes["bias"] and measures[0].notes["reference_id"].startswith("emoji-reference-")
        found[name] = [m.value for m in measures]
    assert found["real"][0] < found["damaged"][0] and 2 * found["real"][1] < found["damaged"][1]


def test_torch_fidelity_reaches_the_same_number_through_the_registered_extractor():
    images = load("emoji", "reference").images
    one, two = (_Images(torch.from_numpy(images[part]).permute(0, 3, 1, 2)) for part in (slice(0, 12), slice(700, 712)))
    library = calculate_metrics(input1=one, input2=two, fid=True, kid=True, feature_extractor=NAME, kid_subset_size=12,
                                kid_subsets=100, cuda=False, cache=False, verbose=False, batch_size=4, save_cpu_ram=True)
    a, b = (features_of(images[part]).double().numpy() for part in (slice(0, 12), slice(700, 712)))
    assert Frechet(a, b)() == pytest.approx(library["frechet_inception_distance"], rel=1e-4)
    assert KernelDistance(a, b).value == pytest.approx(library["kernel_inception_distance_mean"], rel=1e-4)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]
