"""What the tests of the fidelity metrics share: subjects of random images, and random weights of the true classes as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from harness.api import METHODS, Subject
from harness.storage.store import Store


def silent(stage: str, done: int, total: int) -> None:
    """No progress bar."""


def pictures(n: int, seed: int, side: int = 32) -> np.ndarray:
    """(n, side, side, 3) uint8: smooth blobs of colour."""
    noise = np.random.default_rng(seed).normal(size=(n, side, side, 3))
    smooth = gaussian_filter(noise, (0, 3, 3, 0))
    return np.clip(128 + 400 * smooth, 0, 255).astype(np.uint8)


def subject_of(folder: Path, images: np.ndarray, dense: np.ndarray | None = None, prompts: list[str] | None = None) -> Subject:
    return Subject(trial={"data": {"name": "emoji", "split": "reference"}}, backbone=None, student=None, sampler=None, meter=None,
                   method=METHODS.build("random_drop", {}), prompts=prompts or ["a cat"] * len(images),
                   seeds=list(range(len(images))), store=Store(folder), progress=silent, images=images, dense_images=dense)


class _Empty(FeatureExtractorInceptionV3):
    def load_state_dict(self, state_dict, *args, **kwargs) -> None:
        """There is nothing to load."""


def inception_file(folder: Path) -> Path:
    """A random Inception as torch-fidelity's file, with weights that keep the scale of what passes."""
    torch.manual_seed(0)
    path = folder / "inception.pth"
    torch.save({}, path)
    network = _Empty("random", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


class _Scripted(nn.Module):
    """The published TorchScript file has its network in `layers`."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def clean_file(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """The same weights as clean-fid's TorchScript file, in clean-fid's own copy of the network."""
    from cleanfid import inception_pytorch as theirs

    network = theirs._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, block in {"5b": theirs.FIDInceptionA(192, pool_features=32), "5c": theirs.FIDInceptionA(256, pool_features=64),
                        "5d": theirs.FIDInceptionA(288, pool_features=64), "7b": theirs.FIDInceptionE_1(1280),
                        "6b": theirs.FIDInceptionC(768, channels_7x7=128), "6c": theirs.FIDInceptionC(768, channels_7x7=160),
                        "6d": theirs.FIDInceptionC(768, channels_7x7=160), "6e": theirs.FIDInceptionC(768, channels_7x7=192),
                        "7c": theirs.FIDInceptionE_2(2048)}.items():
        setattr(network, f"Mixed_{name}", block)
    network.load_state_dict(state)
    parts = [network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3, nn.MaxPool2d(3, 2), network.Conv2d_3b_1x1,
             network.Conv2d_4a_3x3, nn.MaxPool2d(3, 2)]
    parts += [getattr(network, f"Mixed_{name}") for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]
    layers = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1)).eval().requires_grad_(False)
    path = folder / "clean.pt"
    with torch.no_grad():
        traced = torch.jit.trace(_Scripted(layers), torch.rand(1, 3, 299, 299))
    traced.save(str(path))
    return path


def dinov2_folder(folder: Path) -> Path:
    """A tiny Dinov2Model."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56,
                             initializer_range=0.3)).save_pretrained(folder / "dinov2")
    return folder / "dinov2"


def clip_folder(folder: Path) -> Path:
    """A tiny CLIPModel with a tokenizer of single letters and the usual image processor at 16 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    place = folder / "clip"
    place.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["."]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters),
                                                      "<|startoftext|>", "<|endoftext|>"])}
    (place / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (place / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": 20, "eos_token_id": len(vocabulary) - 1,
            "bos_token_id": len(vocabulary) - 2}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # or all images would look alike to it
                parameter.mul_(3)
    model.save_pretrained(place)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(place)
    return place
