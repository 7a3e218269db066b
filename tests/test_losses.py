"""The loss of a training: small numbers by hand, and one place where it is written."""

import re
from pathlib import Path

import pytest
import torch

from harness.training import losses

ROOT = Path(__file__).parent.parent


def rows(*values):
    """(B, 1, 1, n) images."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def features(*blocks):
    """[(input, output)] of blocks whose outputs are (B, N, D); inputs are never looked at."""
    return [(torch.full((1,), float("nan")), torch.tensor(block, dtype=torch.float32)) for block in blocks]


def test_diffusion_adds_the_mean_squared_errors_of_all_passes():
    first, second, target = rows([1, 2], [0, 0]), rows([3, 5], [1, 0]), rows([0, 0], [0, 0])
    assert float(losses.diffusion([first], target)) == (1 + 4) / 4
    assert float(losses.diffusion([first, second], target)) == (1 + 4) / 4 + (9 + 25 + 1) / 4
    assert losses.diffusion([first, second], target, per_row=True).tolist() == [5 / 2 + 34 / 2, 1 / 2]


def test_features_are_compared_after_a_layer_norm_of_each_token():
    found = torch.tensor([[[0.0, 2000.0], [7000.0, 3000.0]], [[0.0, 10.0], [0.0, 10.0]]])
    wanted = torch.tensor([[[40.0, 9040.0], [1000.0, 5000.0]], [[0.0, 10.0], [0.0, 10.0]]])
    # the first tokens are (-1, 1) both, the second are (1, -1) and (-1, 1)
    assert float(losses.normalised_error(found, wanted)) == pytest.approx((4 + 4) / 8, rel=1e-6)
    assert losses.normalised_error(found, wanted, per_row=True).tolist() == pytest.approx([2, 0], rel=1e-6)


def test_distillation_is_the_predictions_error_and_the_mean_over_taps():
    up, down = [[[0, 2000]]], [[[2000, 0]]]
    predicted = (rows([1, 2]), rows([1, 5]))
    of_prediction, opposite = 9 / 2, 4
    student, teacher = features(up, up, up, up, up), features(down, up, down, down, up)
    for every, tapped in {1: [1, 0, 1, 1, 0], 2: [0, 1], 3: [1], 4: [1], 5: [0], 6: []}.items():
        expected = of_prediction + (opposite * sum(tapped) / len(tapped) if tapped else 0)
        assert float(losses.distillation(predicted, (student, teacher), every)) == pytest.approx(expected, rel=1e-6), every
        assert losses.distillation(predicted, (student, teacher), every, per_row=True).tolist() == pytest.approx([expected])


def test_taps_are_the_outputs_of_every_fourth_block():
    assert list(losses.taps(24, 4)) == [3, 7, 11, 15, 19, 23] and list(losses.taps(3, 4)) == []


def test_half_precision_is_compared_in_float32():
    found, wanted = torch.full((1, 4), 300.0, dtype=torch.float16), torch.zeros(1, 4, dtype=torch.float16)
    assert float(losses.squared_error(found, wanted)) == 90000  # float16 ends at 65,504


def test_the_loss_is_written_in_one_file():
    again = [str(file.relative_to(ROOT)) for folder in ("training", "bench", "study", "metrics")
             for file in sorted((ROOT / "harness" / folder).rglob("*.py")) if re.search(r"mse_loss|MSELoss", file.read_text())]
    assert again == ["harness/training/losses.py"]
