"""Backbones from a folder, through the same code as a hub id."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from diffusers import DiffusionPipeline
from transformers import T5EncoderModel

from harness.api import BACKBONES, Backbone, ConfigError
from harness.backbones import sd3
from harness.backbones.loading import load
from harness.backbones.pixart import PixArt
from harness.backbones.sd3 import SD3


def test_a_folder_saved_without_text_encoders_loads_and_draws_the_same(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    loaded = SD3(SD3.Config(weights=str(tmp_path), text_length=6))
    twin = TinySD3.from_pipeline(pipe)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500.0]), twin.encode(["a"]))
    assert torch.equal(loaded.denoise(*inputs), twin.denoise(*inputs))


def test_the_fingerprint_sees_weights_schedule_and_precision(tmp_path):
    base = TinySD3.from_pipeline(tiny_pipeline()).fingerprint
    assert TinySD3.from_pipeline(tiny_pipeline()).fingerprint == base
    changed = tiny_pipeline()
    changed.transformer.proj_out.bias.data[0] += 1e-3
    assert TinySD3.from_pipeline(changed).fingerprint != base
    shifted = tiny_pipeline()
    shifted.scheduler = type(shifted.scheduler)(shift=3.0)
    assert TinySD3.from_pipeline(shifted).fingerprint != base


@pytest.mark.parametrize("options,words", [({"weights": "embeded-typo/nowhere", "dtype": "float64"}, "dtype"),
                                           ({"offload": True}, "offload"), ({"device": "cuda:9"}, "device")])
def test_what_cannot_load_is_refused_with_its_key(options, words):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so asking for one is no error")
    with pytest.raises(ConfigError, match=words):
        BACKBONES.build("sd3", options, "backbone")


@pytest.mark.parametrize("kind", [SD3, PixArt])
def test_offloaded_parts_come_to_the_device_for_their_calls_alone(kind, monkeypatch):
    """The device is torch's meta device: an operation across two devices raises there as it does on a GPU."""
    config = dataclasses.replace(kind.Config(weights="embedded"), device="meta", offload=True)
    kept, to, moves = {}, torch.nn.Module.to, []

    def move(module, *args, **kwargs):
        target = str(args[0]) if args else ""
        if target == "cpu" and module in kept:  # nothing can be read from the meta device: what was there before is put back
            moves.append((type(module).__name__, target))
            module.load_state_dict(kept[module], assign=True)
            return module
        if target == "meta":
            kept[module] = {name: value.clone() for name, value in module.state_dict().items()}
            moves.append((type(module).__name__, target))
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    pipe = load(config, (DiffusionPipeline,), kind.name)
    assert [target for _, target in moves] == ["meta"] and pipe.transformer.device.type == "meta"
    if isinstance(pipe.text_encoder, T5EncoderModel):  # it looks at the values of its mask, and the meta device has none
        pipe.text_encoder.forward = lambda ids, attention_mask: (pipe.text_encoder.shared(ids),)
    backbone = kind.from_pipeline(pipe, text_length=16)
    moves.clear()
    assert {value.device.type for value in backbone.encode(["a red apple"]).values()} == {"meta"}
    encoders = [name for name, target in moves if target == "meta"]
    assert encoders == [type(part).__name__ for name, part in pipe.components.items()
                        if name.startswith("text_encoder") and part is not None]
    assert [name for name, target in moves if target == "cpu"] == encoders
    moves.clear()
    images = backbone.decode(torch.zeros(1, *backbone.latent_shape, device="meta"))
    assert backbone.encode_images(images).shape == (1, *backbone.latent_shape)
    assert [target for _, target in moves] == ["meta", "cpu"] * 2
    assert {weight.device.type for weight in pipe.vae.parameters()} == {"cpu"}


def test_a_backbone_that_lacks_a_member_cannot_be_made():
    class Half(SD3):
        on_meta = Backbone.on_meta

    with pytest.raises(TypeError, match="on_meta"):
        Half(SD3.Config())


def test_images_survive_the_autoencoder_of_the_embedded_model():
    from harness.data import load as load_data

    backbone = SD3(SD3.Config())
    images = torch.from_numpy(load_data("emoji", "reference").images[::200]).permute(0, 3, 1, 2).float() / 255
    again = backbone.decode(backbone.encode_images(images))
    psnr = -10 * torch.log10(((again - images) ** 2).mean())
    assert psnr > 24
    latents = backbone.encode_images(images)
    assert latents.shape[1:] == backbone.latent_shape and 0.7 < latents.std() < 1.4


def test_the_embedded_model_follows_its_prompt():
    """The velocity it predicts for a noised emoji is nearer to the truth with the right caption than with another."""
    from harness.data import load as load_data

    backbone, data = SD3(SD3.Config()), load_data("emoji", "reference")
    picks = list(range(0, len(data), len(data) // 24))[:24]
    images = torch.from_numpy(data.images[picks]).permute(0, 3, 1, 2).float() / 255
    latents, generator = backbone.encode_images(images), torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    noisy, timestep, target = backbone.noised(latents, noise, torch.full((len(picks),), 0.9))
    captions = [data.captions[i] for i in picks]
    errors = []
    for texts in (captions, captions[1:] + captions[:1], [""] * len(picks)):
        with torch.no_grad():
            errors.append(float((backbone.denoise(noisy, timestep, backbone.encode(texts)) - target).pow(2).mean()))
    right, wrong, none = errors
    assert right < 0.7 * wrong and right < 0.9 * none


def test_the_embedded_folder_is_small_enough_to_ship():
    folder = Path(sd3.__file__).parents[1] / "embedded" / "emoji_sd3"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 40e6
