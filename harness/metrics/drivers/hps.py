"""HPS v2.1 by the package hpsv2."""

from exchange import package, serve

hpsv2 = package("hpsv2")
serve(lambda image, prompt: hpsv2.score(image, prompt, hps_version="v2.1")[0], "HPS-v2.1")
