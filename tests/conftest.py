"""Shared fixtures: a tiny random SD3 of the true classes, with a dual-attention block as in SD3.5."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from fake_tracking import empty_database, sweep  # noqa: F401  (fixtures)
from torch import Tensor

import methods as methods
from harness.backbones.sd3 import SD3

torch.set_num_threads(1)
PROMPTS = ["a red apple", "a cat", "pizza", "smiling face with sunglasses"]


def tiny_transformer(**changes) -> SD3Transformer2DModel:
    """4 blocks of width 32 over an 8 x 8 latent (64 tokens); block 1 has dual attention."""
    torch.manual_seed(0)
    config = dict(sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
                  num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
                  pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(1,))
    return SD3Transformer2DModel(**{**config, **changes})


def tiny_pipeline(**changes) -> StableDiffusion3Pipeline:
    """A pipeline without text encoders: embeddings are given."""
    torch.manual_seed(1)
    widths = dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
                  num_decoder_blocks=(1, 1, 1), latent_channels=4)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    return StableDiffusion3Pipeline(transformer=tiny_transformer(**changes), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
                                    vae=AutoencoderTiny(**widths), **parts)


class TinySD3(SD3):
    """SD3 whose prompts are encoded by a fixed random table."""

    num_text_tokens = 6

    def encode(self, prompts) -> dict[str, Tensor]:
        """Embeddings that depend on the text alone."""
        rows = [torch.randn(6, 24, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in prompts]
        embeds = torch.stack(rows).to(self.transformer.device)
        return {"encoder_hidden_states": embeds, "pooled_projections": embeds.mean(1)[:, :20].contiguous()}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    """Files that start processes first: they are the longest, and one core must not wait for the other at the end."""
    first = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in first)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """A failed test may show bytes that are no UTF-8; in a report they would end the whole run without a word about it."""
    return printable((yield))


def printable(value):
    """The same, with escapes where a text cannot be encoded."""
    if isinstance(value, dict):
        return {printable(key): printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(printable, value))
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class TinyInRegistry(TinySD3):
    """The tiny backbone as a sweep would ask for it."""

    name = "tiny"

    def __new__(cls, config=None):
        return cls.from_pipeline(tiny_pipeline(), text_length=6) if config is not None else super().__new__(cls)

    def __init__(self, config=None) -> None:
        pass


@pytest.fixture(autouse=True)
def _one_thread():
    """A job run in this process sets threads of its own; the next test starts from one again."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_backbone() -> TinySD3:
    """Shared by all tests: leave it as you found it."""
    return TinySD3.from_pipeline(tiny_pipeline())
