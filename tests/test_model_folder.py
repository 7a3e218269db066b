"""A model's folder with missing, damaged or foreign files: refused with folder, file and remedy, most of it without loading."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinySD3, tiny_pipeline
from safetensors.torch import load_file, save_file
from tiny import TinyPixArt, tiny_dit, tiny_pixart

from harness.api import BACKBONES, ConfigError
from harness.backbones import pipeline
from harness.backbones.folder import check_folder
from harness.backbones.pixart import PixArt
from harness.backbones.sd3 import SD3

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
EMBEDDED = Path(pipeline.__file__).parents[1] / "embedded"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of sound pipelines by family; copy before you change."""
    root = tmp_path_factory.mktemp("saved")
    for name, pipe in (("sd3", tiny_pipeline()), ("pixart", tiny_pixart()), ("dit", tiny_dit())):
        pipe.save_pretrained(root / name)
    for name in ("sd3", "pixart", "flux"):
        shutil.copytree(EMBEDDED / f"emoji_{name}", root / f"emoji_{name}")
    return root


def copied(saved, name, tmp_path):
    """A copy; files are links to the sound ones, so write new files, never into them."""
    return Path(shutil.copytree(saved / name, tmp_path / "model", copy_function=os.link))


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edited(path, change):
    """Change a JSON file in place."""
    found = json.loads(path.read_text())
    found = change(found) or found
    put(path, json.dumps(found))


def resaved(path, change):
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    path.unlink()
    save_file(tensors, path)


def sharded(folder):
    """The transformer's weights in two files, the second of which is missing."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file(tensors, folder / "transformer" / names[0])
    listing = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names[0]) | {next(iter(tensors)): names[1]}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(listing))


def pickled(folder, content):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).with_suffix(".bin").write_bytes(content)


KNOWN = {  # what is done to the tiny SD3 -> a part of the message
    "no index": (lambda d: (d / "model_index.json").unlink(), "model_index.json is missing"),
    "empty index": (lambda d: put(d / "model_index.json", ""), "model_index.json cannot be read"),
    "index of another kind": (lambda d: put(d / "model_index.json", "[1]"), "model_index.json is no mapping"),
    "deep index": (lambda d: put(d / "model_index.json", "[" * 100_000), "model_index.json cannot be read"),
    "binary index": (lambda d: put(d / "model_index.json", b"\xff\xfe\x00"), "model_index.json cannot be read"),
    "another pipeline": (lambda d: edited(d / "model_index.json", lambda x: x | {"_class_name": "FluxPipeline"}),
                         "is a FluxPipeline .model_index.json., and this backbone runs StableDiffusion3Pipeline"),
    "unknown pipeline": (lambda d: edited(d / "model_index.json", lambda x: x | {"_class_name": "Nothing"}), "is a Nothing"),
    "unknown class": (lambda d: edited(d / "model_index.json", lambda x: x | {"vae": ["diffusers", "Nothing"]}),
                      r"says that the vae is \['diffusers', 'Nothing'\]"),
    "unknown library": (lambda d: edited(d / "model_index.json", lambda x: x | {"vae": ["os", "path"]}), "says that the vae is"),
    "no transformer": (lambda d: edited(d / "model_index.json", lambda x: x | {"transformer": [None, None]}),
                       "names no transformer"),
    "no vae": (lambda d: edited(d / "model_index.json", lambda x: x.pop("vae") and None), "names no vae"),
    "no scheduler": (lambda d: (d / "scheduler/scheduler_config.json").unlink(), "scheduler/scheduler_config.json is missing"),
    "no folder of the scheduler": (lambda d: shutil.rmtree(d / "scheduler"), "scheduler is no folder"),
    "no config": (lambda d: (d / "transformer/config.json").unlink(), "transformer/config.json is missing"),
    "config of another type": (lambda d: edited(d / "transformer/config.json", lambda x: x | {"num_layers": "four"}),
                               "transformer/config.json describes no SD3Transformer2DModel"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "transformer holds no weights"),
    "weights of a variant": (lambda d: (d / WEIGHTS).rename(d / WEIGHTS.replace("model.s", "model.fp16.s")),
                             "there is diffusion_pytorch_model.fp16.safetensors: name it"),
    "a shard is missing": (sharded, "00002-of-00002.safetensors is missing"),
    "cut": (lambda d: put(d / WEIGHTS, (d / WEIGHTS).read_bytes()[:-100]), "is cut off or damaged: it has"),
    "cut in the header": (lambda d: put(d / WEIGHTS, (d / WEIGHTS).read_bytes()[:50]), "is cut off or damaged: it has 50 bytes"),
    "empty weights": (lambda d: put(d / WEIGHTS, ""), "is cut off or damaged"),
    "too long": (lambda d: put(d / WEIGHTS, (d / WEIGHTS).read_bytes() + b"x"), "is cut off or damaged"),
    "a pointer for weights": (lambda d: put(d / WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
                              "is cut off or damaged"),
    "more layers": (lambda d: edited(d / "transformer/config.json", lambda x: x | {"num_layers": 6}), "config.json asks for"),
    "fewer layers": (lambda d: edited(d / "transformer/config.json", lambda x: x | {"num_layers": 3}), "config.json asks for"),
    "wider": (lambda d: edited(d / "transformer/config.json", lambda x: x | {"num_attention_heads": 3}),
              r"of shape \[32, 4, 1, 1\], and its config.json asks for \[48, 4, 1, 1\]"),
    "one weight less": (lambda d: resaved(d / WEIGHTS, lambda x: {
        name: value for name, value in x.items() if name != "proj_out.bias"}), "holds no weight 'proj_out.bias', one of 1"),
    "one of the autoencoder less": (lambda d: resaved(d / "vae/diffusion_pytorch_model.safetensors", lambda x: dict(
        list(x.items())[1:])), "vae holds no weight"),
    "another family's transformer": (lambda d: edited(d / "model_index.json", lambda x: x | {
        "transformer": ["diffusers", "FluxTransformer2DModel"]}), "transformer holds"),
}


@pytest.mark.parametrize("what", KNOWN)
def test_what_is_wrong_is_named_from_configs_and_headers_alone(saved, tmp_path, what):
    change, words = KNOWN[what]
    folder = copied(saved, "sd3", tmp_path)
    change(folder)
    for act in (lambda: check_folder(str(folder), folder, SD3.kinds), lambda: BACKBONES.build("sd3", {"weights": str(folder)})):
        with pytest.raises(ConfigError, match=f"backbone.weights: '{folder}'.*{words}") as caught:
            act()
        assert "; " in str(caught.value), "a remedy"


LOADED = {"a pickle that is none": (lambda d: pickled(d, b"\x80\x04nonsense"), "cannot be loaded"),
          "a pickle that runs something": (lambda d: pickled(d, pickle.dumps(Path.touch)), "cannot be loaded"),
          "a scheduler's option of another type": (lambda d: edited(d / "scheduler/scheduler_config.json",
                                                                    lambda x: x | {"shift": "three"}), "cannot be loaded")}


@pytest.mark.parametrize("what", LOADED)
def test_what_only_loading_shows_is_refused_as_well(saved, tmp_path, what):
    change, words = LOADED[what]
    folder = copied(saved, "sd3", tmp_path)
    change(folder)
    with pytest.raises(ConfigError, match=f"backbone.weights: '{folder}' {words}"):
        BACKBONES.build("sd3", {"weights": str(folder)})


TEXT = {"no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer is no folder"),
        "an empty tokenizer": (lambda d: [file.unlink() for file in (d / "tokenizer").iterdir()], "tokenizer has none of"),
        "a text encoder alone": (lambda d: edited(d / "model_index.json", lambda x: x | {"tokenizer": [None, None]}),
                                 "names a text_encoder and no tokenizer"),
        "a text encoder of more layers": (lambda d: edited(d / "text_encoder/config.json", lambda x: x | {"num_layers": 9}),
                                          "text_encoder holds no weight 'encoder.block"),
        "a wider text encoder": (lambda d: edited(d / "text_encoder/config.json", lambda x: x | {"d_model": x["d_model"] * 2}),
                                 "text_encoder holds '.*of shape")}


@pytest.mark.parametrize("what", TEXT)
def test_the_text_parts_are_checked_too(saved, tmp_path, what):
    change, words = TEXT[what]
    folder = copied(saved, "emoji_pixart", tmp_path)
    change(folder)
    with pytest.raises(ConfigError, match=f"backbone.weights: '{folder}'.*{words}"):
        check_folder(str(folder), folder, PixArt.kinds)


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit", "emoji_sd3", "emoji_pixart", "emoji_flux"])
def test_a_sound_folder_passes(saved, name):
    check_folder("sound", saved / name, BACKBONES.get(name.removeprefix("emoji_")).kinds)


def test_more_layers_than_weights_are_not_drawn_at_random(saved, tmp_path):
    """Where all blocks are alike, the library would load four and make up two."""
    folder = copied(saved, "pixart", tmp_path)
    edited(folder / "transformer/config.json", lambda x: x | {"num_layers": 6})
    with pytest.raises(ConfigError, match="transformer holds no weight 'transformer_blocks.4.*its config.json asks for"):
        PixArt(PixArt.Config(weights=str(folder)))
    edited(folder / "transformer/config.json", lambda x: x | {"num_layers": 3})
    with pytest.raises(ConfigError, match="holds 'transformer_blocks.3.*layers that its config.json does not have"):
        PixArt(PixArt.Config(weights=str(folder)))


@pytest.mark.parametrize("weights, words", [("/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
                                            ("./x", "there is no folder"), ("a/b/c", "there is no folder"),
                                            (__file__, "is a file; name the folder of a pipeline")])
def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(weights, words):
    with pytest.raises(ConfigError, match=f"backbone.weights: .*{words}"):
        BACKBONES.build("sd3", {"weights": weights})


def test_a_hub_id_that_nobody_gives_is_refused_with_what_to_check(monkeypatch):
    def nobody(*args, **options):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(pipeline.DiffusionPipeline, "from_pretrained", nobody)
    with pytest.raises(ConfigError, match="'no-one/nothing' cannot be loaded .OSError: We couldn't.*check the path or the hub"):
        BACKBONES.build("sd3", {"weights": "no-one/nothing"})


def test_old_autoencoders_are_known_by_their_old_names(saved, tmp_path):
    """diffusers renames the attention of autoencoders saved before 2023; it is not missing."""
    folder = copied(saved, "pixart", tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        renamed = {}
        for name, value in tensors.items():
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
            renamed[name] = value
        return renamed

    resaved(folder / "vae/diffusion_pytorch_model.safetensors", rename)
    check_folder("old", folder, PixArt.kinds)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(*(TinyPixArt(PixArt.Config(weights=str(one))).encode_images(images) for one in (folder, saved / "pixart")))


def test_a_plain_pickle_of_tensors_still_loads(saved, tmp_path):
    """Read by torch with weights_only: it cannot run anything. Some published models have no other file."""
    folder = copied(saved, "sd3", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, (folder / WEIGHTS).with_suffix(".bin"))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500.0]), TinySD3.encode(TinySD3.from_pipeline(tiny_pipeline()), ["a"]))
    assert torch.equal(*(SD3(SD3.Config(weights=str(one))).denoise(*inputs) for one in (folder, saved / "sd3")))


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_ends_in_a_traceback(saved, tmp_path, seed):
    """A file cut, a byte changed, a file of another folder, a JSON value of another type."""
    draw = random.Random(seed)
    folder = copied(saved, "sd3", tmp_path)
    path = draw.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    content = bytearray(path.read_bytes())
    act = draw.choice(["cut", "byte", "swap", "value"])
    if act == "cut":
        content = content[:draw.randrange(len(content))]
    elif act == "byte" or (act == "value" and path.suffix != ".json"):
        for _ in range(draw.randint(1, 5)):
            content[draw.randrange(min(300, len(content)))] = draw.randrange(256)
    elif act == "swap":
        others = sorted(file for file in saved.rglob("*") if file.is_file() and file.stat().st_size < 1e6)
        content = draw.choice(others).read_bytes()
    else:
        found = json.loads(content)
        found[draw.choice(sorted(found))] = draw.choice([None, -1, 0, 10**6, "x", [], {}, [None], True, 1.5])
        content = json.dumps(found).encode()
    put(path, bytes(content))
    try:
        backbone = SD3(SD3.Config(weights=str(folder)))
    except ConfigError as error:
        assert "backbone." in str(error)
    else:
        assert backbone.latent_shape[0] == 4


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_a_model_saved_without_its_text_encoders_says_so_when_it_is_given_a_prompt(saved, family):
    backbone = BACKBONES.build(family, {"weights": str(saved / family)})
    with pytest.raises(ConfigError, match="has no text encoder .text_encoder.*cannot take prompts"):
        backbone.encode(["a"])
