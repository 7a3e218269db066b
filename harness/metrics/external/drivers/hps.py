"""HPS v2.1 by the package hpsv2."""

from functools import lru_cache

import torch
from exchange import package, serve

hpsv2 = package("hpsv2")
torch.load = lru_cache(maxsize=1)(torch.load)  # the package reads its checkpoint of gigabytes for every image
serve(lambda image, prompt: hpsv2.score(image, prompt, hps_version="v2.1")[0], "HPS-v2.1")
