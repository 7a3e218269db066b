"""Every family in every number format: what its pipeline draws in it, to the bit, and every method in one forward pass."""

import pytest
import torch
from test_families import FAMILIES
from test_schedulers import latents, theirs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def made(family, dtype):
    """The tiny backbone of a family in a number format; its text too."""
    backbone = FAMILIES[family]()
    backbone.pipe.to(dtype=dtype)
    encode = backbone.encode

    def encoded(prompts):
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in encode(prompts).items()}

    backbone.encode = encoded
    return backbone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_draws_what_its_pipeline_draws_to_the_bit(family, dtype, monkeypatch):
    backbone = made(family, DTYPES[dtype])
    ours = latents(backbone, [0, 1, 2], 3)
    assert ours.dtype == DTYPES[dtype]
    found = theirs(backbone, monkeypatch)
    assert torch.equal(ours, found) or (dtype == "float64" and torch.allclose(ours, found, rtol=1e-10, atol=0))
