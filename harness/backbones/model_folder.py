"""A pipeline's folder, checked by its configs and the headers of its weights: milliseconds, and nothing is loaded.

The loaders of the libraries draw at random what a file lacks and pass over what it has too much; here that is an error.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from harness.api import ConfigError, NotHere, require

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
NEEDED = ("transformer", "scheduler", "vae")
_HEADER_LIMIT = 100_000_000
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_DEPRECATED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names in older autoencoders, which diffusers renames when it loads them."""
_LAYERS = re.compile(r"(blocks|layers|block)\.\d+\.")


class ModelFolder:
    """The folder of a pipeline; every refusal names it, the file, and the remedy."""

    def __init__(self, weights: str, path: Path) -> None:
        self.weights, self.path = weights, path

    def refuse(self, file: str, what: str, remedy: str = "save the pipeline there again, or take a sound copy") -> ConfigError:
        """The error about one of its files."""
        return ConfigError(f"backbone.weights: '{self.weights}': {file} {what}; {remedy}")

    def json(self, file: str) -> dict[str, Any]:
        """The mapping in a JSON file of the folder."""
        path = self.path / file
        if not path.is_file():
            raise self.refuse(file, "is missing")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.refuse(file, f"cannot be read ({error})") from None
        if not isinstance(found, dict):
            raise self.refuse(file, "is no mapping")
        return found

    def header(self, file: str) -> dict[str, tuple[int, ...]]:
        """{name: shape} of a safetensors file, whose length must be what its header says."""
        path = self.path / file
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                start = stream.read(8)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT
                entries = json.loads(stream.read(length)) if 8 + length <= min(size, _HEADER_LIMIT) else None
            tensors = {name: entry for name, entry in (entries or {}).items() if name != "__metadata__"}
            end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise self.refuse(file, f"is no safetensors file ({type(error).__name__})") from None
        if entries is None or end != size:
            raise self.refuse(file, f"is cut off or damaged: it has {size} bytes, and its header tells of "
                              f"{'more' if entries is None else end}")
        return shapes


def check_source(weights: str) -> None:
    """ConfigError where `weights` can only be a folder, and is none."""
    path = Path(weights)
    require(not path.is_file(), f"backbone.weights: '{weights}' is a file; name the folder of a pipeline, with {INDEX} in it")
    local = weights.startswith(("/", ".", "~")) or "\\" in weights or weights.count("/") != 1
    if local and not path.is_dir():
        raise NotHere(f"backbone.weights: there is no folder '{weights}'; correct the path (it is taken from {Path.cwd()}), or "
                      "give 'embedded' or a hub id such as owner/name")


def check_folder(weights: str, path: Path, kinds: tuple[type, ...]) -> None:
    """ConfigError where the pipeline in the folder `path` is none of `kinds`, or a file of it is missing, damaged, or of other
    sizes than its config says.
    """
    folder = ModelFolder(weights, path)
    index = folder.json(INDEX)
    name = str(index.get("_class_name"))
    kind = getattr(diffusers, name, None)
    names = " or ".join(one.__name__ for one in kinds)
    require(isinstance(kind, type) and issubclass(kind, kinds), f"backbone.weights: '{weights}' is a {name} ({INDEX}), and this "
            f"backbone runs {names}; take the backbone of its family")
    parts = {part: value for part, value in index.items() if isinstance(value, list)}
    for part in NEEDED:
        if parts.get(part) in (None, [None, None]):
            raise folder.refuse(INDEX, f"names no {part}")
    for part, value in parts.items():
        if value != [None, None]:
            _check_part(folder, part, _class_of(folder, part, value))
    for part in parts:
        tokenizer = part.replace("text_encoder", "tokenizer")
        if part.startswith("text_encoder") and parts[part] != [None, None] and parts.get(tokenizer) in (None, [None, None]):
            raise folder.refuse(INDEX, f"names a {part} and no {tokenizer}")


def _class_of(folder: ModelFolder, part: str, value: list[Any]) -> type:
    library = {"diffusers": diffusers, "transformers": transformers}.get(str(value[0]))
    if len(value) != 2 or library is None or not isinstance(getattr(library, str(value[1]), None), type):
        raise folder.refuse(INDEX, f"says that the {part} is {value}, which the installed diffusers {diffusers.__version__} and "
                            f"transformers {transformers.__version__} do not have", "correct it, or install one that has it")
    return getattr(library, value[1])


def _check_part(folder: ModelFolder, part: str, kind: type) -> None:
    if not (folder.path / part).is_dir():
        raise folder.refuse(part, f"is no folder, though {INDEX} names a {kind.__name__}")
    if part == "scheduler":
        folder.json(SCHEDULER)
    elif issubclass(kind, nn.Module):
        config = folder.json(f"{part}/config.json")
        shapes = _shapes(folder, part)
        if shapes is not None:
            _compare(folder, part, _expected(folder, part, kind, config), shapes)
    elif "Tokenizer" in kind.__name__ and not any((folder.path / part / file).is_file() for file in _TOKENIZER_FILES):
        raise folder.refuse(part, f"has none of {', '.join(_TOKENIZER_FILES)}, so there is no {kind.__name__}")


def _shapes(folder: ModelFolder, part: str) -> dict[str, tuple[int, ...]] | None:
    """{name: shape} of the weights of a part; None where they are a pickle, which the loader reads without running it."""
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        listing = f"{part}/{stem}.safetensors.index.json"
        if (folder.path / listing).is_file():
            places = folder.json(listing).get("weight_map")
            if not isinstance(places, Mapping) or not all(isinstance(file, str) for file in places.values()):
                raise folder.refuse(listing, "has no weight_map")
            shapes: dict[str, tuple[int, ...]] = {}
            for file in sorted(set(places.values())):
                if not (folder.path / part / file).is_file():
                    raise folder.refuse(f"{part}/{file}", f"is missing, though {stem}.safetensors.index.json names it")
                shapes |= folder.header(f"{part}/{file}")
            return shapes
        if (folder.path / part / f"{stem}.safetensors").is_file():
            return folder.header(f"{part}/{stem}.safetensors")
    if any((folder.path / part / file).is_file() for file in ("diffusion_pytorch_model.bin", "pytorch_model.bin")):
        return None
    others = sorted(file.name for file in (folder.path / part).iterdir() if file.suffix in (".safetensors", ".bin"))
    found = f"; there is {others[0]}: name it {stems[0]}.safetensors (of a text encoder {stems[1]}.safetensors)" if others else ""
    raise folder.refuse(part, f"holds no weights, no {stems[0]}.safetensors and no {stems[1]}.safetensors{found}")


def _expected(folder: ModelFolder, part: str, kind: type, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters that the config asks for, made on the meta device."""
    try:
        with torch.device("meta"):
            if hasattr(kind, "from_config") and kind.__module__.startswith("diffusers"):
                made = _remapped(kind, config).from_config(dict(config))
            else:
                made = kind(kind.config_class.from_pretrained(str(folder.path / part)))
    except (OSError, TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise folder.refuse(f"{part}/config.json", f"describes no {kind.__name__} ({str(error).splitlines()[0]})") from None
    return {name: tuple(weight.shape) for name, weight in made.named_parameters()}


def _remapped(kind: type, config: Mapping[str, Any]) -> type:
    """The class that diffusers takes today for a part saved as its old `Transformer2DModel`."""
    if kind.__name__ != "Transformer2DModel":
        return kind
    todays = {"ada_norm_zero": diffusers.DiTTransformer2DModel, "ada_norm_single": diffusers.PixArtTransformer2DModel}
    return todays.get(str(config.get("norm_type")), kind)


def _compare(folder: ModelFolder, part: str, expected: Mapping[str, tuple[int, ...]],
             found: Mapping[str, tuple[int, ...]]) -> None:
    found = {_renamed(name): shape for name, shape in found.items()}
    sizes = {name: next((found[other] for other in _aliases(part, name) if other in found), None) for name in expected}
    missing, remedy = [name for name, size in sizes.items() if size is None], "take config and weights of one model"
    if part.startswith("text_encoder") and all(name in missing for name in expected if _LAYERS.search(name)):
        return  # named by a rule that transformers knows and this does not
    if missing:
        raise folder.refuse(part, f"holds no weight '{missing[0]}', one of {len(missing)} that its config.json asks for", remedy)
    for name, shape in expected.items():
        if sizes[name] != shape:
            raise folder.refuse(part, f"holds '{name}' of shape {list(sizes[name])}, and its config.json asks for {list(shape)}",
                                remedy)
    extra = [name for name in found if _LAYERS.search(name) and name not in expected]
    if extra and part in ("transformer", "vae"):
        raise folder.refuse(part, f"holds '{extra[0]}', one of {len(extra)} weights of layers that its config.json does not have",
                            remedy)


def _renamed(name: str) -> str:
    for old, new in _DEPRECATED.items():
        if ".attentions." in name:
            name = name.replace(old, new)
    return name


def _aliases(part: str, name: str) -> tuple[str, ...]:
    """What a weight may be called in a file: text models were saved with a prefix more or less, and share their embedding."""
    if not part.startswith("text_encoder"):
        return (name,)
    shared = ("encoder.embed_tokens.weight",) if name == "shared.weight" else ()
    return name, f"text_model.{name}", name.removeprefix("text_model."), *shared
