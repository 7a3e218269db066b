"""A results folder as a sweep leaves it, with invented numbers: what the report and the tracker are developed against.

`python tests/fake_results.py FOLDER` writes one to look at. Nothing here is a measurement.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.emoji import COLOURS, caption_of, composite, load_sprites

BLOCKS, STEPS, IMAGES = 8, 12, 64
TIME_MS = 1_795_000_000_000
SHIVA = {"router_groups": 4, "ratio_policy": "additive"}
VARIANTS: list[tuple[dict[str, Any], float | None]] = [
    ({"name": "dense"}, None),
    *[({"name": name}, cut) for name in ("random_drop", "tomesd") for cut in (0.24, 0.41)],
    *[({"name": "shiva", **SHIVA}, cut) for cut in (0.24, 0.41)],
    ({"name": "shiva", **SHIVA, "router_groups": 1}, 0.24),
    ({"name": "shiva", **SHIVA, "router_groups": 8}, 0.24),
    ({"name": "shiva", **SHIVA, "ratio_policy": "fixed"}, 0.24),
    ({"name": "shiva", **SHIVA, "ratio_policy": "fixed"}, 0.41),
]
MACHINE = {"git": {"commit": "f00dfeed", "dirty": False}, "packages": {"torch": "2.14.1"}, "device": "cpu"}
HARM = {"dense": 0.0, "random_drop": 1.0, "tomesd": 1.25, "shiva": 0.55}
SLOWNESS = {"dense": 0.0, "random_drop": 0.02, "tomesd": 0.21, "shiva": 0.06}


def make_sweep(folder: Path, images: int = IMAGES, artifacts: bool = True) -> list[dict[str, Any]]:
    """Write sweep.json, sweep.yaml and one JSON per trial into `folder`; returns the results in order."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [fake_result(folder.name, method, cut, images) for method, cut in copy.deepcopy(VARIANTS)]  # tests change them
    for result in results:
        if artifacts:
            _write_images(folder, result)
        write_result(folder, result)
    header = {"name": folder.name, "trial_ids": [r["trial_id"] for r in results], "file_hash": "0123456789ab",
              "labels": {r["trial_id"]: r["label"] for r in results},
              "question": "Does a learned router beat chance at equal compute, and what in it matters?"}
    (folder / "sweep.json").write_text(json.dumps(header), encoding="utf-8")
    (folder / "sweep.yaml").write_text(f"# invented\nname: {folder.name}\n", encoding="utf-8")
    return results


SEEDED: list[tuple[dict[str, Any], float | None]] = [
    ({"name": "dense"}, None), ({"name": "random_drop"}, 0.41),
    *[({"name": "shiva", "ratio_policy": "additive", "router_groups": "pairs", **changes}, 0.41)
      for changes in ({}, {"ratio_policy": "fixed"}, {"ratio_policy": "film"}, {"router_groups": 1},
                      {"router_groups": "per_layer"})]]


def make_seeded_sweep(folder: Path, images: int = IMAGES, artifacts: bool = True, spread: float = 0.04) -> list[dict[str, Any]]:
    """A sweep whose trained settings have three training seeds; `spread`: relative standard deviation between trainings."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [fake_result(folder.name, method, cut, images, (seed, spread) if method["name"] == "shiva" else None)
               for method, cut in copy.deepcopy(SEEDED) for seed in (range(3) if method["name"] == "shiva" else (0,))]
    for result in results:
        if artifacts:
            _write_images(folder, result)
            if result["trial"]["train"]:
                _write_scores(folder, result)
        write_result(folder, result)
    header = {"name": folder.name, "trial_ids": [r["trial_id"] for r in results], "file_hash": "0123456789ab",
              "labels": {r["trial_id"]: r["label"] for r in results}, "question": "Does the ratio policy matter?"}
    (folder / "sweep.json").write_text(json.dumps(header), encoding="utf-8")
    return results


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """One trial's JSON, as the driver merges it."""
    (folder / f"{result['trial_id']}.json").write_text(json.dumps(result), encoding="utf-8")


def fake_result(sweep: str, method: dict[str, Any], cut: float | None, images: int = IMAGES,
                training: tuple[int, float] | None = None) -> dict[str, Any]:
    """A finished trial. Reproducible: its numbers come from its own configuration.

    training: (seed, spread between seeds) where the sweep varies the training seed.
    """
    seed, spread = training or (0, 0.0)
    trial = {
        "backbone": {"name": "sd3", "weights": "embedded"},
        "sampler": {"num_steps": STEPS, "guidance_scale": 3.0, "batch_size": 8},
        "data": {"name": "emoji", "split": "reference"}, "seeds": [0, images - 1], "method": method,
        "budget": None if cut is None else {"flops_cut": cut},
        "train": {"seed": seed, "steps": 210} if method["name"] == "shiva" else None,
        "metrics": [{"name": "fd"}, {"name": "drift"}], "threads": 1}
    trial_id = hashlib.sha256(json.dumps(trial, sort_keys=True).encode()).hexdigest()[:12]
    rng = np.random.default_rng(int(trial_id, 16))
    varied = {"method.name": method["name"]} | {f"method.{k}": v for k, v in method.items() if k != "name"}
    varied |= {"budget.flops_cut": cut, **({"train.seed": seed} if training else {})}
    label = " ".join([method["name"], *([f"-{100 * cut:g}%"] if cut else []),
                      *[f"{k}={v}" for k, v in method.items() if v not in (SHIVA.get(k), "pairs") and k != "name"],
                      *([f"seed={seed}"] if seed else [])])
    harm = _harm(method, cut or 0.0) * (1 + spread * rng.normal())
    metrics, per_image = _metrics(method["name"], cut or 0.0, harm, images, rng)
    kept = _kept(method, cut or 0.0, rng)
    return {
        "schema": 1, "trial_id": trial_id, "sweep": sweep, "label": label, "status": "done", "error": None, "trial": trial,
        "varied": varied, "metrics": metrics, "per_image": per_image,
        "executed": {"kept_attention": kept, "kept_ffn": kept, "keep_ratio_solved": cut and round(1 - 1.1 * cut, 4)},
        "series": {"tokens/kept_attention": [[i, float(np.mean(row))] for i, row in enumerate(kept)],
                   **(_series(rng) if trial["train"] else {})}, "artifacts": {"images": f"artifacts/{trial_id}/images.npz"},
        "environment": {"score": {**MACHINE, "threads": 1, f"fidelity/fd_effnet_{images}": {"reference_id": "emoji-ref-5c1e"}},
                        "timing": {**MACHINE, "threads": 2, "latency/ratio_to_dense": {
                            "contaminated": False, "foreign_cpu_cores": [0.03, 0.02], "batch_size": 1, "threads": 2}}},
        "stages": {"score": {"train": 210.0, "sample": 120.5}, "timing": {"latency": 41.0}},
        "code": "c0de", "timestamp_ms": TIME_MS + len(label) * 60_000}


def _harm(method: dict[str, Any], cut: float) -> float:
    extra = {1: 0.12, 8: 0.0, "per_layer": 0.15}.get(method.get("router_groups"), 0.0)
    extra += 0.2 if method.get("ratio_policy") == "fixed" else 0.0
    return (HARM[method["name"]] + extra) * cut


def _metrics(name: str, cut: float, harm: float, images: int, rng: np.random.Generator) -> tuple[dict, dict]:
    hard = np.random.default_rng(7).normal(size=images)  # some images are hard for every method: what pairing takes out
    error = harm * np.exp(0.3 * hard + 0.1 * rng.normal(size=images))
    psnr = np.where(harm > 0, 18 - 12 * np.log10(np.maximum(error, 1e-3) + 0.2), np.inf)
    values = {"dense/velocity_error": (error, "lower"), "dense/psnr_db": (psnr, "higher"),
              "dense/ssim": (1 - 0.5 * error, "higher"), "dense/feature_mse": (0.4 * error, "lower"),
              "dense/feature_cosine": (1 - 0.2 * error, "higher")}
    gflops = 12.4 * (1 - cut) + 0.1 * (name == "shiva")
    measured_cut, ratio = 1 - gflops / 12.4, 1 - 0.85 * cut + SLOWNESS[name] * (cut > 0) + 0.01 * rng.normal()
    fd = 31 + 38 * harm + rng.normal()
    metrics = {
        "latency/ratio_to_dense": _measure(ratio, "lower", 0.02, 20),
        "latency/ms_per_image": _measure(96 * ratio, "lower", 2.5, 20),
        "latency/dense_ms_per_image": _measure(96.0, "none", 2.5, 20), "memory/peak_mib": _measure(412 - 120 * cut, "lower"),
        "compute/gflops_per_image": _measure(gflops, "lower"), "compute/flops_cut": _measure(measured_cut, "higher"),
        "compute/method_gflops_per_image": _measure(0.1 * (name == "shiva"), "none"),
        "compute/paper_rule_gflops_per_image": _measure(gflops * 0.52, "lower"),
        "compute/paper_rule_cut": _measure(measured_cut * 1.04, "higher"),
        "tokens/kept_attention": _measure(1 - 1.1 * cut, "none"), "tokens/kept_ffn": _measure(1 - 1.1 * cut, "none"),
        f"fidelity/fd_effnet_{images}": _measure(fd, "lower", 1.6, images),
        f"fidelity/kd_effnet_{images}": _measure(0.02 + 0.08 * harm, "lower", 0.005, images)}
    if harm > 0:
        for key, (per, better) in values.items():
            finite = per[np.isfinite(per)]
            metrics[key] = _measure(float(finite.mean()), better, float(1.96 * finite.std() / np.sqrt(images)), images)
    return metrics, {key: [float(v) for v in per] for key, (per, _) in values.items()} if harm > 0 else {}


def _measure(value: float, better: str, half_width: float | None = None, n: int | None = None) -> dict[str, Any]:
    interval = None if half_width is None else [float(value - half_width), float(value + half_width)]
    return {"value": float(value), "better": better, "interval": interval, "n": n}


def _kept(method: dict[str, Any], cut: float, rng: np.random.Generator) -> list[list[float]]:
    mean = 1 - 1.1 * cut
    step, block = np.mgrid[0:STEPS, 0:BLOCKS]
    wave = (method.get("ratio_policy") == "additive") * (0.18 * np.sin(2.2 * block / BLOCKS + 1) - 0.2 * (step / STEPS - 0.5))
    kept = np.clip(mean + wave + 0.01 * rng.normal(size=wave.shape) * (wave != 0), 0.1, 1)
    kept[:, 0] = 1
    return np.round(kept, 4).tolist()


def _series(rng: np.random.Generator) -> dict[str, list[list[float]]]:
    steps = np.arange(0, 210, 3)
    curve = 0.3 * np.exp(-steps / 60) + 0.12 + 0.02 * rng.normal(size=len(steps))
    ratio = 0.76 + 0.1 * np.exp(-steps / 40) * np.cos(steps / 15)
    late = np.arange(0, 210, 30)
    validation = 0.25 * np.exp(-late / 70) + 0.14 + 0.01 * rng.normal(size=len(late))
    return {"val/diffusion_mse": np.stack([late, validation], 1).tolist(),
            "val/dense_mse": np.stack([late, 0.9 * validation], 1).tolist(),
            "train/loss": np.stack([steps, curve], 1).tolist(),
            "train/mean_keep_ratio": np.stack([steps, ratio], 1).tolist()}


def _write_scores(folder: Path, result: dict[str, Any]) -> None:
    rng, steps = np.random.default_rng(5), [0, 4, 7, 11]
    ring = np.hypot(*(np.mgrid[0:16, 0:16] - 7.5)).ravel()
    scores = np.stack([[[np.full(256, np.nan) if block == 0 else -np.abs(ring - block) + rng.normal(size=256)
                         for block in range(BLOCKS)] for _ in steps] for _ in range(2)]).astype(np.float32)
    path = folder / f"artifacts/{result['trial_id']}/scores.npz"
    with np.load(folder / result["artifacts"]["images"]) as pictures:
        np.savez(path, scores=scores, steps=np.array(steps), noise_levels=np.array([1.0, 0.7, 0.4, 0.1]), grid=np.array([16, 16]),
                 images=pictures["images"][:2], prompts=pictures["prompts"][:2])
    result["artifacts"]["scores"] = f"artifacts/{result['trial_id']}/scores.npz"
    result["metrics"]["router/score_std"] = _measure(1.4, "none", n=2)


def _write_images(folder: Path, result: dict[str, Any]) -> None:
    rows, sprites = load_sprites()
    first, last = result["trial"]["seeds"]
    harm = _harm(result["trial"]["method"], (result["trial"]["budget"] or {}).get("flops_cut", 0.0))
    images, captions, rng = [], [], np.random.default_rng(3)
    for index in range(last - first + 1):
        sprite, colour = (index * 37) % len(rows), list(COLOURS)[index % len(COLOURS)]
        clean = composite(sprites[sprite], COLOURS[colour]).astype(np.float32)
        blurred = clean.reshape(16, 4, 16, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
        mixed = clean + min(1.0, 2 * harm) * (blurred - clean) + 40 * harm * rng.normal(size=clean.shape)
        images.append(np.clip(mixed, 0, 255).astype(np.uint8))
        captions.append(caption_of(rows[sprite]["name"], colour))
    path = folder / result["artifacts"]["images"]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.stack(images), prompts=np.array(captions), seeds=np.arange(first, last + 1))


if __name__ == "__main__":
    make_sweep(Path(sys.argv[1]))
