"""Train and export the embedded backbone: a small SD3 on emoji. Needs a CPU and a few hours.

python -m harness.embedded.train_emoji [--minutes M] [--steps N] ...

  --stage vae        autoencoder
  --stage low        transformer and text encoders on 64 image tokens
  --stage high       the same weights on 256 image tokens
  --stage decoder    a sharper decoder for the same latents
  --export           write the pipeline folder, fp16
  --grid FILE.png    draw twelve prompts from that folder
  --revive           turn that folder back into checkpoints, for --stage high to train further

With none of these it does the stages in this order and exports. A stage saves itself every three minutes
under --checkpoints and continues from there when called again with larger --minutes or --steps, which count
from the beginning of the stage; a killed run loses only the minutes since its last save.
"""

import argparse
import logging
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

MINUTES = {"vae": 10.0, "low": 35.0, "high": 70.0, "decoder": 20.0}
OUT = Path(__file__).parent / "emoji_sd3"


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--stage", choices=tuple(MINUTES))
    parser.add_argument("--minutes", type=float, help=f"length of the stage in all; default {MINUTES}")
    parser.add_argument("--steps", type=int, help="ends the stage earlier, at so many steps in all")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--grid", type=Path, metavar="FILE.png")
    parser.add_argument("--revive", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT, help="the pipeline folder")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="compile the step (a quarter faster, needs a C++ compiler)")
    return parser.parse_args()


def main() -> None:
    """Do what the command line asks for, or everything."""
    options = parse()
    import torch

    from harness.embedded.emoji_export import export, revive, sample_grid
    from harness.embedded.emoji_stages import train_stage

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(options.threads or torch.get_num_threads())
    everything = not (options.stage or options.export or options.grid or options.revive)
    if options.revive:
        revive(options.out, options.checkpoints)
    for stage in MINUTES if everything else filter(None, [options.stage]):
        train_stage(stage, options.checkpoints, options.minutes or MINUTES[stage], options.steps, compiled=options.compile)
    if options.export or everything:
        export(options.checkpoints, options.out)
    if options.grid:
        sample_grid(options.out).save(options.grid)
        Console().print(f"drawn: {options.grid}")


if __name__ == "__main__":
    main()
