"""How the embedded Flux and PixArt are trained: `python -m harness.embedded.siblings.train`."""
