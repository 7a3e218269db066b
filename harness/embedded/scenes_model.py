"""Train the small SD3 of scenes: 128 pixels, 1,024 image tokens. Needs a CPU and many hours, in as many sittings as one likes.

python -m harness.embedded.scenes_model [--stage NAME] [--minutes M] [--steps N] [--checkpoints DIR] [--threads N]

  vae        the autoencoder, 128 px to 32 x 32 x 4
  low        transformer and text encoders on 64 image tokens (pictures of 32 px)
  middle     the same weights on 256 tokens (64 px)
  high       the same weights on 1,024 tokens (128 px)

Without --stage the stages are done in this order. A stage writes a checkpoint and a sheet of samples every three minutes and goes
on from there when it is called again; --minutes and --steps count from the beginning of a stage.
"""

import argparse
import logging
from pathlib import Path

from rich.logging import RichHandler

MINUTES = {"vae": 30.0, "low": 120.0, "middle": 120.0, "high": 240.0}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(MINUTES))
    parser.add_argument("--minutes", type=float, help=f"length of the stage in all; default {MINUTES}")
    parser.add_argument("--steps", type=int, help="ends the stage earlier, at so many steps in all")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints/scenes"))
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    import torch

    from harness.embedded.scenes_stages import train_stage

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(options.threads or torch.get_num_threads())
    for stage in [options.stage] if options.stage else list(MINUTES):
        train_stage(stage, options.checkpoints, options.minutes or MINUTES[stage], options.steps, compiled=options.compile)


if __name__ == "__main__":
    main()
