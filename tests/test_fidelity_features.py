"""FID, KID, precision, recall and FD-DINOv2: each against a closed form or a second implementation, on random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance
from cleanfid.resize import make_resizer
from fidelity import clean_file, dinov2_folder, inception_file, pictures, subject_of
from PIL import Image
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from harness import data
from harness.api import METRICS, ConfigError
from harness.metrics.extractors import dinov2, inception
from harness.metrics.extractors.base import count_name
from harness.metrics.extractors.catalogue import build_extractor
from harness.metrics.fidelity.fd import Frechet
from harness.metrics.fidelity.feature_sets import FeatureSets
from harness.metrics.fidelity.precision_recall import among
from harness.metrics.fidelity.spread import DistanceOptions, distance_measure, images_and_dense

CPU = torch.device("cpu")
FEW = {"num_subsets": 4, "num_permutations": 19}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    path = inception_file(folder)
    return {"torch-fidelity": path, "clean-fid": clean_file(folder, torch.load(path)), "dinov2": dinov2_folder(folder)}


@pytest.fixture
def few_real_images(monkeypatch):
    class Real:
        images, fingerprint = pictures(6, 100, 24), "f" * 64

    monkeypatch.setattr(data, "load", lambda name, split: Real)
    return Real.images


# ---------------------------------------------------------------------------------------------- extractors


def test_both_libraries_hold_the_same_network(files):
    images = pictures(2, 0, 299)  # at 299 pixels neither resizes
    ours, clean = (build_extractor(name, str(files[name]), CPU)(images) for name in ("torch-fidelity", "clean-fid"))
    assert ours.shape == (2, 2048) and np.abs(ours[0] - ours[1]).max() > 1e-2 * np.abs(ours).max()
    assert np.allclose(ours, clean, rtol=1e-3, atol=1e-4 * np.abs(ours).max())


def test_the_resize_of_clean_fid_is_pillows_per_channel_without_rounding():
    image = pictures(1, 3, 40)[0]
    by_hand = np.stack([np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
                        for c in range(3)]).clip(0, 255)
    found = inception.clean_input(image).numpy()
    assert np.array_equal(found, by_hand) and np.array_equal(found, make_resizer("PIL", False, "bicubic", (299, 299))(image)
                                                             .transpose(2, 0, 1))
    assert np.abs(found - found.round()).max() > 0.1


def test_the_libraries_differ_where_they_resize(files):
    images = np.repeat(np.repeat(pictures(1, 0, 75), 4, 1), 4, 2) ^ np.uint8(85)  # hard edges, to be made smaller
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
    clean = inception.clean_input(images[0])
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1

    assert (tf1(inputs.float(), (299, 299), align_corners=False)[0] - clean).abs().max() > 5


def test_dinov2_features_are_the_class_token_of_its_own_processor(files):
    from transformers import AutoModel, BitImageProcessor

    images = pictures(3, 1, 224)  # at 224 pixels nothing is resized
    processor = BitImageProcessor(do_resize=False, do_center_crop=False, image_mean=dinov2.MEAN, image_std=dinov2.STD)
    with torch.no_grad():
        pixels = processor(images=list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        expected = AutoModel.from_pretrained(files["dinov2"])(pixels).pooler_output
    assert np.allclose(build_extractor("dinov2", str(files["dinov2"]), CPU)(images), expected, atol=1e-4)
    small = dinov2.prepared(pictures(1, 1, 32)[0])
    assert small.shape == (3, 224, 224)


def test_features_are_keyed_by_the_content_of_the_weights(tmp_path, files):
    other = tmp_path / "moved.pth"
    other.write_bytes(files["torch-fidelity"].read_bytes())
    ids = [build_extractor("torch-fidelity", str(path), CPU).id for path in (files["torch-fidelity"], other)]
    assert ids[0] == ids[1] != build_extractor("clean-fid", str(files["clean-fid"]), CPU).id


# ---------------------------------------------------------------------------------------------- distances


def gaussians(n: int, d: int = 6) -> tuple[np.ndarray, np.ndarray, float]:
    """Two samples whose means and covariances are exactly known, and the Frechet distance of the Gaussians they stand for."""
    rng = np.random.default_rng(0)
    samples = []
    for mean, deviation in ((np.zeros(d), np.linspace(1, 2, d)), (np.linspace(0, 1, d), np.linspace(2, 0.5, d))):
        white = rng.normal(size=(n, d))
        white -= white.mean(0)
        white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
        samples.append(white * deviation + mean)
    known = (np.linspace(0, 1, d) ** 2).sum() + ((np.linspace(1, 2, d) - np.linspace(2, 0.5, d)) ** 2).sum()
    return *samples, known


def test_the_distance_of_two_gaussians_is_the_closed_form():
    a, b, known = gaussians(50)
    features = FeatureSets(a, b, None, "real")
    frechet = Frechet(images_and_dense(features), b)
    measure = distance_measure("fid", lambda weights: [frechet(w) for w in weights], features, DistanceOptions(**FEW)).measure
    assert measure.value == pytest.approx(known, rel=1e-9)
    assert measure.interval[0] < known < measure.interval[1] and measure.notes["subsets"]["size"] == 25


def spread_of(a, b, dense, **options):
    features = FeatureSets(a, b, dense, "real")
    frechet = Frechet(images_and_dense(features), b)
    return distance_measure("fid", lambda weights: [frechet(w) for w in weights], features,
                            DistanceOptions(**{**FEW, "num_permutations": 199, **options})).measure


def test_the_gap_to_dense_is_the_difference_of_the_two_distances_and_pairs_are_kept():
    rng = np.random.default_rng(1)
    dense, real = rng.normal(size=(60, 5)), rng.normal(size=(200, 5))
    far, near = dense + 0.4, dense + 0.02 * rng.normal(size=(60, 5))
    for images, low_p in ((far, True), (near, False)):
        gap = spread_of(images, real, dense).notes["to_dense"]
        assert gap["difference"] == pytest.approx(Frechet(images, real)() - Frechet(dense, real)())
        assert (gap["p"] < 0.02) == low_p and (gap["interval"][0] > 0) == low_p
    paired = spread_of(near, real, dense)
    assert np.ptp(paired.notes["to_dense"]["interval"]) < 0.2 * np.ptp(paired.interval)  # what pairs share is taken out
    assert spread_of(dense, real, dense).notes["to_dense"]["p"] == 1
    assert "to_dense" not in spread_of(dense, real, None).notes


def test_a_permutation_test_is_right_as_often_as_it_says():
    rng, values = np.random.default_rng(2), []
    real = rng.normal(size=(100, 2))
    for _ in range(60):
        pair = rng.normal(size=(2, 24, 2))
        values.append(spread_of(pair[0], real, pair[1], num_permutations=39).notes["to_dense"]["p"])
    assert np.mean(np.array(values) <= 0.2) == pytest.approx(0.2, abs=0.13) and np.mean(values) == pytest.approx(0.5, abs=0.12)


def nuclear(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance in which the trace of the root is the nuclear norm of the centred features' product."""
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * root)


@pytest.mark.parametrize("library", ["torch-fidelity", "clean-fid"])
def test_inception_metrics_are_the_librarys_numbers(tmp_path, files, few_real_images, library):
    images, dense, end = pictures(4, 1, 24), pictures(4, 2, 24), "" if library == "torch-fidelity" else "_clean"
    extractor = build_extractor(library, str(files[library]), CPU)
    a, b, d = (extractor(x) for x in (images, few_real_images, dense))
    for metric in ("fid", "kid"):
        options = {"library": library, "weights": str(files[library]), **FEW}
        (measure,) = METRICS.build(metric, options).measure(subject_of(tmp_path, images, dense))
        assert measure.name == f"fidelity/{metric}{end}_4" and measure.better == "lower" and measure.n == 4
        assert measure.notes["reference_id"].startswith(f"emoji-reference-ffffffff-inception-{library}-")
        if metric == "fid":
            assert measure.value == pytest.approx(nuclear(a, b), rel=1e-4)
            assert measure.notes["to_dense"]["difference"] == pytest.approx(nuclear(a, b) - nuclear(d, b), rel=1e-3)
        else:
            theirs = kid_features_to_metric(*map(torch.from_numpy, (a, b)), kid_subset_size=4, kid_subsets=100, verbose=False)
            assert measure.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_the_libraries_own_frechet_distances_agree_with_ours():
    a, b, _ = gaussians(50)
    for library in (fid_statistics_to_metric({"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)},
                                             {"mu": b.mean(0), "sigma": np.cov(b, rowvar=False)}, verbose=False)
                    ["frechet_inception_distance"],
                    frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))):
        assert Frechet(a, b)() == pytest.approx(library, rel=1e-6)


def test_fd_dinov2_is_the_frechet_distance_of_its_features(tmp_path, files, few_real_images):
    images = pictures(8, 1)
    (measure,) = METRICS.build("fd_dinov2", {"weights": str(files["dinov2"]), **FEW}).measure(subject_of(tmp_path, images))
    extractor = build_extractor("dinov2", str(files["dinov2"]), CPU)
    assert measure.name == "fidelity/fd_dinov2_8"
    assert measure.value == pytest.approx(Frechet(extractor(images), extractor(few_real_images))(), rel=1e-4)


# ---------------------------------------------------------------------------------------------- precision and recall


def test_precision_and_recall_of_equal_and_of_disjoint_sets():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(50, 4))
    assert among(real, real, 3).all() and not among(real + 100, real, 3).any()
    half = np.concatenate([real[:25], real[25:] + 100])
    assert among(half, real, 3).sum() == 25


def test_precision_is_of_the_generated_and_recall_of_the_real(tmp_path, few_real_images):
    real = few_real_images
    collapsed = np.repeat(real[:1], 8, 0)  # all among the real ones, and of no use to cover them
    precision, recall = METRICS.build("precision_recall", {"features": "effnet"}).measure(subject_of(tmp_path, collapsed))
    assert (precision.name, recall.name) == ("fidelity/precision_effnet_8", "fidelity/recall_effnet_8")
    assert precision.value == 1 and precision.per_image == (1.0,) * 8 and recall.value <= 1 / len(real)


def test_precision_and_recall_are_torch_fidelitys():
    rng = np.random.default_rng(3)
    made, real = rng.normal(size=(40, 3)), rng.normal(size=(55, 3)) + 1.2
    library = prc_features_to_metric(torch.from_numpy(made), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=100,
                                     save_cpu_ram=False, verbose=False)
    assert 0 < library["precision"] < 1 and 0 < library["recall"] < 1 and library["precision"] != library["recall"]
    assert among(made, real, 3).mean() == pytest.approx(library["precision"])
    assert among(real, made, 3).mean() == pytest.approx(library["recall"])


# ---------------------------------------------------------------------------------------------- names and refusals


def test_the_count_is_in_the_name():
    assert [count_name(n) for n in (32, 1000, 5000, 50_000, 1500)] == ["32", "1k", "5k", "50k", "1500"]


def test_wrong_files_are_refused_before_anything_runs(tmp_path, files):
    text, wrong, shorn = tmp_path / "note.pth", tmp_path / "other.pth", tmp_path / "shape.pth"
    text.write_text("not weights")
    torch.save({"fc.weight": torch.zeros(2)}, wrong)
    state = torch.load(files["torch-fidelity"])
    torch.save({**state, "fc.weight": torch.zeros(10, 2048)}, shorn)
    for metric, options, message in (
            ("fid", {"weights": "nowhere.pth"}, "fid.weights: there is no file 'nowhere.pth'"),
            ("fid", {"weights": str(text)}, "is no state dict that torch.save wrote"),
            ("kid", {"weights": str(wrong)}, "kid.weights: .* has no tensor 'Conv2d_1a_3x3.conv.weight'; it is of another"),
            ("fid", {"weights": str(shorn)}, r"fc.weight is \(10, 2048\), but this network has \(1008, 2048\)"),
            ("fid", {"weights": str(wrong), "library": "clean-fid"}, "is no TorchScript file"),
            ("fd_dinov2", {"weights": str(tmp_path)}, "fd_dinov2.weights: .* holds no config.json"),
            ("fd_dinov2", {"weights": "./missing"}, "there is no folder './missing'"),
            ("precision_recall", {"features": "effnet", "weights": str(wrong)}, "effnet brings its own; remove weights"),
            ("precision_recall", {"neighbours": 0}, "precision_recall.neighbours must be at least 1"),
            ("kid", {"num_subsets": 1}, "kid.num_subsets must be at least 2, got 1")):
        with pytest.raises(ConfigError, match=message):
            METRICS.config(metric, options)
    METRICS.config("fid", {"weights": str(files["clean-fid"]), "library": "clean-fid"})
