"""What a stored number says of itself; and of results made before numbers did, what their names meant then.

This is the only place where a measure's name decides anything: see `_from_name`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from harness.api.measure import GROUPS, Traits

NAMES = tuple(one.name for one in fields(Traits))
_HEADINGS = {
    "compute/gflops_per_image": "GFLOP / image", "compute/flops_cut": "FLOPs cut",
    "latency/ratio_to_dense": "latency (dense = 1)", "memory/peak_mib": "peak MiB",
    "latency/ms_per_image": "ms / image", "latency/dense_ms_per_image": "dense ms / image",
    "compute/method_gflops_per_image": "of it the method's own",
    "compute/paper_rule_gflops_per_image": "GFLOP / image, paper's rule", "compute/paper_rule_cut": "cut, paper's rule",
    "tokens/kept_attention": "tokens kept, attention", "tokens/kept_ffn": "tokens kept, FFN",
    "dense/psnr_db": "PSNR to dense, dB", "dense/ssim": "SSIM to dense", "dense/velocity_error": "velocity error",
    "dense/feature_mse": "feature MSE to dense", "dense/feature_cosine": "feature cosine to dense",
    "dense/prediction_mse": "prediction MSE to dense", "compute/method_parameters": "parameters added",
    "compute/router_parameters": "router parameters", "router/score_std": "SD of router scores"}
_TITLES = {"dense/velocity_error": "relative velocity error to dense", "dense/psnr_db": "PSNR to dense images, dB",
           "dense/ssim": "SSIM to dense images"}
_LEADS = {"fidelity/fid_": 2, "fidelity/fd_": 1, "dense/velocity_error": 3, "dense/psnr_db": 2, "dense/ssim": 1}
_WINDOWS = {"prompt/clip_score": ("share", 0.002), "prompt/image_reward": ("absolute", 0.05),
            "fidelity/precision": ("absolute", 0.02), "image/clip_iqa": ("absolute", 0.02)}
_EXTRACTORS = {"effnet": "EfficientNet-Lite0 features", "dinov2": "DINOv2 features", "clean": "clean-fid's Inception features"}


def traits(name: str, stored: Mapping[str, Any]) -> Traits:
    """What a number says of itself. stored: its record in a part or a result."""
    if stored.get("group") is None:
        return _from_name(name)
    told = {key: stored[key] for key in NAMES if key in stored}
    if told.get("window"):
        told["window"] = tuple(told["window"])
    return Traits(**told)


@cache
def _from_name(name: str) -> Traits:
    """The rules of the versions that stored no traits: what stood before the slash said what a number is about."""
    group, slash, rest = name.partition("/")
    about = group if group in GROUPS else "cost" if slash else "other"
    starts = [start for start in (*_LEADS, *_WINDOWS) if name.startswith(start)]
    window = next((_WINDOWS[start] for start in starts if start in _WINDOWS), ("share", 0.02))
    return Traits(group=about, heading=_HEADINGS.get(name, ""), title=_distance(rest) if group == "fidelity" else
                  _TITLES.get(name, ""), percent=name.endswith("_cut") or group == "tokens",  # type: ignore[arg-type]
                  lead=next((_LEADS[start] for start in starts if start in _LEADS), 0),
                  window=None if "_inf_" in name else window)  # type: ignore[arg-type]


def _distance(rest: str) -> str:
    """'FD to real images (EfficientNet-Lite0 features, n = 24)' of 'fd_effnet_24'."""
    *kinds, n = rest.split("_") if "_" in rest else [rest, ""]
    n = f"n = {n}, extrapolated to infinitely many" if "inf" in kinds else f"n = {n}"
    kind, *extractor = [one for one in kinds if one != "inf"]
    shown = kind if kind in ("precision", "recall") else kind.upper()
    return f"{shown} to real images ({', '.join(_EXTRACTORS.get(one, one) for one in extractor) or 'Inception features'}, {n})"
