"""Inception features as FID means them, by two libraries: torch-fidelity's and clean-fid's network, each with its own resize.

torch-fidelity takes the 8-bit image and resizes inside, as TensorFlow did: the values of most papers. clean-fid resizes each
channel by Pillow's antialiased bicubic, without rounding. Both networks hold the weights of 2015-12-05.

Source: Heusel et al. 2017, arXiv:1706.08500; Parmar et al. 2022, arXiv:2104.11222 (the resize).
"""

from __future__ import annotations

import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from harness.api import require
from harness.metrics.extractors.base import Extractor, planes
from harness.metrics.extractors.weights import check_file, fetched, file_id, state_dict
from harness.storage.fingerprints import stamp

URLS = {"torch-fidelity": (URL_INCEPTION_V3, "6726825d"),
        "clean-fid": ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
                      "f58cb9b6ec323ed6")}
"""Where each library fetches its weights: (address, start of the file's sha256)."""
RECIPES = {"torch-fidelity": "resize of TensorFlow 1 inside, 299, (x - 128) / 128, pool3, float32",
           "clean-fid": "Pillow bicubic per channel, 299, unrounded, (x - 128) / 128, pool3, float32"}
CLEAN_FILE = "inception-2015-12-05.pt"


class _Shapes(FeatureExtractorInceptionV3):
    """torch-fidelity's network without weights, on the meta device: what a file must hold."""

    def __init__(self) -> None:
        with torch.device("meta"), tempfile.NamedTemporaryFile(suffix=".pth") as empty:
            torch.save({}, empty.name)
            super().__init__("shapes", ["2048"], feature_extractor_weights_path=empty.name)

    def load_state_dict(self, state_dict: object, *args: object, **kwargs: object) -> None:
        """There is nothing to load."""


@lru_cache(maxsize=1)
def expected() -> dict[str, torch.Size]:
    """Name -> shape of every tensor of the network of torch-fidelity."""
    return {name: tensor.shape for name, tensor in _Shapes().state_dict().items() if "num_batches" not in name}


def check(where: str, name: str, weights: str) -> None:
    """ConfigError unless `weights` is a file that library `name` can run."""
    path = check_file(where, weights)
    if name == "torch-fidelity":
        state_dict(where, path, expected())
        return
    scripted = zipfile.is_zipfile(path) and any("/code/" in entry for entry in zipfile.ZipFile(path).namelist())
    require(scripted, f"{where}: '{weights}' is no TorchScript file; library clean-fid needs {CLEAN_FILE}, and a state dict "
            "belongs to library torch-fidelity")
    require(hasattr(torch.jit.load(path, map_location="meta"), "layers"), f"{where}: the network in '{weights}' has no part "
            f"'layers'; it is not {CLEAN_FILE}")


def build(name: str, weights: str | None, device: torch.device) -> Extractor:
    """The extractor of library `name` from a checked file, or from weights fetched once."""
    path = Path(weights).expanduser() if weights else fetched(*URLS[name])
    network = _network(name, str(path), stamp(path)).to(device)
    prepare = planes if name == "torch-fidelity" else clean_input
    return Extractor(f"inception-{name}", file_id(path, recipe=RECIPES[name]), prepare, network, device)


@lru_cache(maxsize=2)
def _network(name: str, path: str, mark: str) -> nn.Module:
    if name == "torch-fidelity":
        return _First(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path))
    from cleanfid.inception_torchscript import InceptionV3W

    with tempfile.TemporaryDirectory() as folder:  # the library wants a folder with the file under its own name
        (Path(folder) / CLEAN_FILE).symlink_to(Path(path).resolve())
        return InceptionV3W(folder, download=False, resize_inside=False).eval().requires_grad_(False)


class _First(nn.Module):
    """The only output of a network that gives a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 2048)."""
        return self.network(images)[0]


def clean_input(image: object) -> Tensor:
    """(height, width, 3) uint8 -> (3, 299, 299) float32 in [0, 255], by clean-fid's own resize."""
    from cleanfid.resize import build_resizer

    return planes(build_resizer("clean")(image))
