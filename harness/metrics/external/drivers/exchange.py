"""What every driver shares: read images and prompts from a folder, write scores into it."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

MISSING = 3


def package(name):
    """The imported package; ends the process with MISSING and the reason when it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package of other times fails in any way
        sys.stderr.write(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.exit(MISSING)


def serve(score, scorer):
    """Write score(image, prompt) of every pair in the folder that the command line names. scorer: what made them."""
    folder = Path(sys.argv[1])
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    with np.load(str(folder / "images.npz"), allow_pickle=False) as stored:
        images = [Image.fromarray(image) for image in stored["images"]]
    scores = [float(score(image, prompt)) for image, prompt in zip(images, prompts)]  # noqa: B905  (Python 3.9 has no strict)
    (folder / "scores.json").write_text(json.dumps({"scores": scores, "scorer": scorer}), encoding="utf-8")
