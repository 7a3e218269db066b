"""Sweeps that cannot be done, and what their users must read: refused for the file, the configs, the data or the machine."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from harness.backbones import loading

EMBEDDED = Path(loading.source_of(loading.EMBEDDED, "sd3")).parent


def sweep(methods="[dense]", backbone="{name: sd3}", metrics="[flops]", seeds="4", sampler="{num_steps: 2}", top="") -> str:
    """A small sweep file with some of it replaced."""
    return (f"name: doomed\nseeds: {seeds}\nbackbone: {backbone}\nsampler: {sampler}\nmetrics: {metrics}\n{top}\n"
            f"methods: {methods}\n")


# ---------------------------------------------------------------------------------------------- what stands beside the file


def pipeline_folder(folder: Path, family: str, **changed: dict) -> Path:
    """`folder`/model: an embedded pipeline with some keys of its configs changed, and its weights linked."""
    target = folder / "model"
    for path in sorted((EMBEDDED / f"emoji_{family}").rglob("*")):
        copy = target / path.relative_to(EMBEDDED / f"emoji_{family}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            shutil.copy(path, copy)
        elif path.is_file():
            os.symlink(path, copy)
    for name, keys in changed.items():
        path = target / {"index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}[name]
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return target


def of_another_class(folder: Path) -> None:
    pipeline_folder(folder, "pixart", index={"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]})


def of_an_unknown_class(folder: Path) -> None:
    pipeline_folder(folder, "sd3", index={"transformer": ["diffusers", "SD9Transformer2DModel"]})


def of_flux(folder: Path) -> None:
    pipeline_folder(folder, "flux")


def without_weights(folder: Path) -> None:
    next((pipeline_folder(folder, "sd3") / "transformer").glob("*.safetensors")).unlink()


def without_a_shard(folder: Path) -> None:
    listing = {"weight_map": {"a": "one-of-two.safetensors", "b": "two-of-two.safetensors"}}
    place = pipeline_folder(folder, "sd3") / "transformer"
    next(place.glob("*.safetensors")).rename(place / "one-of-two.safetensors")
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))


def cut_index(folder: Path) -> None:
    (pipeline_folder(folder, "sd3") / "model_index.json").write_text('{"_class_name": "Stable')


def an_empty_folder(folder: Path) -> None:
    (folder / "model").mkdir()


def a_file(folder: Path) -> None:
    (folder / "model").write_text("weights")


def images(folder: Path) -> None:
    """Eight pictures with captions."""
    (folder / "images").mkdir()
    for index in range(8):
        Image.fromarray(np.full((40, 40, 3), 30 * index, np.uint8)).save(folder / "images" / f"{index}.png")
    rows = "".join(f"{index}.png,picture {index}\n" for index in range(8))
    (folder / "images" / "captions.csv").write_text(f"file,caption\n{rows}")


def classes(folder: Path) -> None:
    from tiny import tiny_dit

    tiny_dit().save_pretrained(folder / "model")
    index = folder / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"3": "goldfish"}}))
    (folder / "prompts.txt").write_text("goldfish\nwolf in a suit\n")


HERE = "{name: sd3, weights: ./model}"
FLUX, PIXART = "{name: flux, dtype: float32, weights: embedded}", "{name: pixart, weights: embedded}"
IMAGES = "data: {{name: folder, path: ./images, {}}}"
TRAIN = "train: {{steps: 2, batch_size: 2, adapter: {}, {}}}"
SEARCH = "search: {{algorithm: grid, space: {{method.name: {}, {}}}}}"

# name: (sweep file, what stands beside it, what must be in the message)
DOOMED = {
    # the model
    "no such folder": (sweep(backbone="{name: sd3, weights: /models/sd35}"), None,
                       ["backbone.weights", "no folder '/models/sd35'", "correct the path"]),
    "no such relative folder": (sweep(backbone="{name: sd3, weights: models/sd/35}"), None,
                                ["backbone.weights", "'models/sd/35'", "it is taken from", "hub id such as owner/name"]),
    "an id that cannot be asked for": (sweep(backbone="{name: sd3, weights: acme/sd35}"), None,
                                       ["backbone.weights", "'acme/sd35'", "HF_HUB_OFFLINE", "fetch it first"]),
    "weights are a file": (sweep(backbone=HERE), a_file, ["backbone.weights", "./model", "is a file", "model_index.json"]),
    "no pipeline": (sweep(backbone=HERE), an_empty_folder, ["backbone.weights", "./model", "model_index.json is missing"]),
    "a cut file": (sweep(backbone=HERE), cut_index, ["backbone.weights", "model_index.json", "cannot be read", "again"]),
    "another family": (sweep(backbone=HERE), of_flux,
                       ["backbone.weights", "FluxPipeline", "runs StableDiffusion3Pipeline", "take the backbone of its family"]),
    "an unknown part": (sweep(backbone=HERE), of_an_unknown_class,
                        ["backbone.weights", "transformer", "SD9Transformer2DModel", "do not have", "correct it"]),
    "no weights": (sweep(backbone=HERE), without_weights, ["backbone.weights", "transformer holds no weights", "again"]),
    "a shard is missing": (sweep(backbone=HERE), without_a_shard,
                           ["backbone.weights", "transformer/two-of-two.safetensors is missing", "again"]),
    "another scheduler": (sweep(backbone="{name: pixart, weights: ./model}"), of_another_class,
                          ["backbone.weights", "EulerAncestralDiscreteScheduler", "save the pipeline with"]),
    "no whole number of tokens": (sweep(backbone="{name: sd3, resolution: 50}"), None, ["backbone.resolution", "50", "4 x 4"]),
    "more tokens than positions": (sweep(backbone="{name: sd3, resolution: 1024}"), None,
                                   ["backbone.resolution", "1024", "positions for"]),
    "random weights of nothing": (sweep(backbone="{name: flux, weights: shape_only}"), None,
                                  ["backbone.architecture", "shape_only", "flux-dev"]),
    "prompts that are no classes": (sweep(backbone="{name: dit, weights: ./model}",
                                          top="data: {name: prompts, path: ./prompts.txt}"), classes, 
                                    ["data", "wolf in a suit", "draws classes", "a number from 0"]),
    # the machine
    "no CUDA device": (sweep(backbone="{name: sd3, device: cuda}"), None, ["backbone.device", "'cuda'", "device: cpu"]),
    "a device of no kind": (sweep(backbone="{name: sd3, device: gpu}"), None, ["backbone.device", "'gpu'", "write cpu, cuda"]),
    "a device without values": (sweep(backbone="{name: sd3, device: meta}"), None, ["backbone.device", "'meta'", "cpu or cuda"]),
    "a kernel of GPUs": (sweep(sampler="{num_steps: 2, attention: cudnn}"), None,
                         ["sampler.attention", "'cudnn'", "'cpu'", "write auto"]),
    "graphs of GPUs": (sweep(sampler="{num_steps: 2, compile: cuda_graphs}"), None,
                       ["sampler.compile", "'cuda_graphs'", "compile: static"]),
    "two GPUs of none": (sweep(top="resources: {gpu: 2}"), None,
                         ["resources.gpu", "2 asked for", "0 CUDA devices", "RAY_ADDRESS"]),
    "one and a half GPUs": (sweep(top="resources: {gpu: 1.5}"), None, ["resources.gpu", "1.5", "whole number"]),
    "more threads than cores": (sweep(top="resources: {threads: 4000}"), None, ["resources.threads", "4000", "cores", "at most"]),
    "more timing threads": (sweep(top="resources: {timing_threads: 4000}"), None,
                            ["resources.timing_threads", "4000", "at most"]),
    "more workers than cores": (sweep(top="resources: {workers: 4000}"), None, ["resources.workers", "4000 jobs", "lower it"]),
    # the method on the model
    "tomesd on flux": (sweep("[dense, tomesd]", FLUX), None,
                       ["methods[1]", "'tomesd'", "'flux'", "rotary positions", "docs/backbones.md"]),
    "tomesd on flux with a budget": (sweep("[dense, {name: tomesd, flops_cut: 0.1}]", FLUX), None,
                                     ["methods[1]", "'tomesd'", "'flux'", "rotary positions"]),
    "sparsedit on pixart": (sweep("[dense, sparsedit]", PIXART, top=TRAIN.format("none", "seed: 0")), None,
                            ["methods[1]", "sparsedit", "joint attention"]),
    "dydit on flux": (sweep("[dense, dydit]", FLUX, top=TRAIN.format("none", "seed: 0")), None,
                      ["methods[1]", "dydit", "'flux'", "heads"]),
    "ibtm without guidance": (sweep("[ibtm]", sampler="{num_steps: 2, guidance_scale: 1}"), None,
                              ["methods[0]", "ibtm", "no guidance"]),
    "a cache for flux alone": (sweep("[dense, diffusers_cache]"), None,
                               ["methods[1]", "'diffusers_cache'", "SD3Transformer2DModel", "use taylor_forecast"]),
    "a cache that is compiled": (sweep("[diffusers_cache]", FLUX, sampler="{num_steps: 2, compile: static}"), None,
                                 ["methods[0]", "sampler.compile", "'static'", "set sampler.compile: off"]),
    "tiles on 14 x 14": (sweep("[{name: toma, tile: 4}]", "{name: sd3, resolution: 56}"), None,
                         ["methods[0]", "toma.tile", "4 x 4", "(14, 14)", "tile: 2"]),
    "windows on 14 x 14": (sweep("[{name: sdtm, window: 4}]", "{name: sd3, resolution: 56}"), None,
                           ["methods[0]", "sdtm.window", "(14, 14)", "window: 2"]),
    "cells beyond the grid": (sweep("[{name: tomesd, stride: 40}]"), None, ["methods[0]", "tomesd.stride", "40", "(16, 16)"]),
    "more blocks than there are": (sweep("[{name: ibtm, blocks: [0, 99]}]"), None, ["methods[0]", "ibtm.blocks", "[0, 99]"]),
    "no block left": (sweep("[{name: toma, dense_blocks: 40}]"), None, ["methods[0]", "toma.dense_blocks", "40"]),
    "pruning beyond the depth": (sweep("[{name: tofu, prune_blocks: 40}]"), None, ["methods[0]", "tofu.prune_blocks", "40"]),
    "more routers than blocks": (sweep("[{name: shiva, router_groups: 99}]", top=TRAIN.format("none", "seed: 0")), None,
                                 ["methods[0]", "shiva.router_groups", "99"]),
    "everything is computed": (sweep("[{name: random_drop, keep_ratio: 1.0}]"), None,
                               ["methods[0]", "keep_ratio", "1.0", "as the dense row"]),
    "all steps are taken": (sweep("[{name: fewer_steps, step_ratio: 0.9}]"), None,
                            ["methods[0]", "step_ratio", "0.9 of 2 steps"]),
    # budgets
    "beyond attention": (sweep("[{name: tomesd, flops_cut: 0.6}]"), None,
                         ["methods[0].flops_cut", "0.6", "'tomesd'", "ffn: true", "at most"]),
    "beyond everything": (sweep("[{name: random_drop, flops_cut: 0.97}]"), None, ["methods[0].flops_cut", "0.97", "at most"]),
    "beyond a trained method": (sweep("[{name: sparsedit, flops_cut: 0.9}]", top=TRAIN.format("none", "seed: 0")), None,
                                ["methods[0].flops_cut", "0.9", "'sparsedit'", "at most"]),
    "beyond a cache of steps": (sweep("[{name: first_block_cache, flops_cut: 0.6}]"), None,
                                ["methods[0]", "flops_cut", "0.6", "'first_block_cache'", "ask for less"]),
    "a default beyond a row": (sweep("[dense, tomesd]", top="budget: {flops_cut: 0.6}"), None,
                               ["budget.flops_cut", "0.6", "'tomesd'", "flops_cut of methods[1]"]),
    "a search beyond reach": (sweep(top=SEARCH.format("tomesd", "budget.flops_cut: {choice: [0.1, 0.6]}")), None,
                              ["search.space.flops_cut", "0.6", "'tomesd'", "at most"]),
    "a search that does not fit": (sweep(backbone="{name: sd3, resolution: 56}",
                                         top=SEARCH.format("toma", "method.tile: {choice: [2, 4]}")), None,
                                   ["search.space", "toma.tile", "(14, 14)"]),
    "a suggestion beyond reach": (sweep(top="search: {algorithm: optuna, num_trials: 2, objectives: [{metric: compute/flops_cut, "
                                            "direction: maximize}], space: {method.name: tomesd, budget.flops_cut: {uniform: "
                                            "[0.1, 0.6]}}}"), None, ["search.space.flops_cut", "0.6", "'tomesd'", "at most"]),
    # metrics
    "a distance of one image": (sweep(metrics="[fd]", seeds="1"), None,
                                ["metrics[0]", "fd", "at least 2", "has 1", "widen seeds"]),
    "fid of three images": (sweep(metrics="[flops, fid]", seeds="3"), None, ["metrics[1]", "fid", "at least 4", "widen seeds"]),
    "neighbours of two images": (sweep(metrics="[{name: precision_recall, features: effnet}]", seeds="2"), None,
                                 ["metrics[0]", "precision_recall.neighbours", "3", "widen seeds"]),
    "taps beyond the depth": (sweep(metrics="[{name: features, every: 99}]"), None,
                              ["metrics[0]", "features.every", "99", "smaller number"]),
    "threads of another number": (sweep(metrics="[{name: latency, threads: 1}]", top="resources: {timing_threads: 2}"), None,
                                  ["metrics[0]", "latency.threads", "1", "resources.timing_threads: 1"]),
    "a file of weights is missing": (sweep(metrics="[{name: fid, weights: /w/inception.pth}]"), None,
                                     ["fid.weights", "/w/inception.pth", "correct the path"]),
    "no program": (sweep(metrics="[{name: image_reward, command: /env/python}]"), None,
                   ["image_reward.command", "/env/python", "path of that environment's python"]),
    # data and training
    "no such data": (sweep(top="data: {name: folder, path: ./none, resolution: 64}"), None, ["data.path", "./none"]),
    "images of another size": (sweep(top=IMAGES.format("resolution: 128")), images,
                               ["data.resolution", "128", "draws 64", "write data.resolution: 64"]),
    "images of no size": (sweep(top=IMAGES.format("split: reference")), images, ["data.resolution", "resolution: 64"]),
    "a split of nothing": (sweep(top=IMAGES.format("reference_share: 0, resolution: 64")), images,
                           ["data.split", "'reference'", "reference_share above 0"]),
    "nothing left to train on": (sweep("[finetuned]", top=TRAIN.format("lora", "validate_every: 1, validation_images: 90000")),
                                 None,
                                 ["train.validation_images", "90000", "lower it"]),
    "training on other sizes": (sweep("[finetuned]", "{name: sd3, resolution: 32}", top=TRAIN.format("lora", "seed: 0")), None,
                                ["data", "64 pixels", "draws 32", "resolution: 32"]),
    "nothing to train": (sweep("[finetuned]", top=TRAIN.format("none", "seed: 0")), None,
                         ["train.adapter", "'none'", "dora or lora"]),
    "rungs without training": (sweep(top="asha: {rungs: [0.5]}"), None, ["asha", "no row of this sweep is trained"]),
    # a list in place of a value
    "a list of ratios": (sweep("[{name: random_drop, keep_ratio: [0.5, 0.7]}]"), None,
                         ["methods[0].keep_ratio", "[0.5, 0.7]", "{grid_search: [...]}"]),
    "a list of cuts": (sweep("[{name: random_drop, flops_cut: [0.2, 0.4]}]"), None,
                       ["methods[0].flops_cut", "[0.2, 0.4]", "{grid_search: [...]}"]),
    "a list of numbers of steps": (sweep(sampler="{num_steps: [2, 4]}"), None,
                                   ["sampler.num_steps", "[2, 4]", "{grid_search: [...]}"]),
}
