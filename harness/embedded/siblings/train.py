"""Train and export the embedded Flux and PixArt, small models on emoji beside the embedded SD3. Needs a CPU and two hours.

python -m harness.embedded.siblings.train FAMILY [--minutes M] [--steps N] ...      FAMILY: flux or pixart

  --stage NAME       flux: plain, then guided; pixart: low (32 px), then high
  --export           write the pipeline folder, fp16, and a picture of twelve prompts

With neither it does all stages in order and exports. The text encoder of both, a T5 taught by the SD3's encoders, is made
first, once. A stage saves itself every three minutes under --checkpoints and continues when called again, as `train_emoji` does.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from rich.logging import RichHandler

FAMILIES = ("flux", "pixart")
MINUTES = {"flux_plain": 45.0, "flux_guided": 12.0, "pixart_low": 15.0, "pixart_high": 60.0}
"""Of each stage, in order."""


def main() -> None:
    """Do what the command line asks for, or everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--stage")
    parser.add_argument("--minutes", type=float, help=f"length of the stage in all; default {MINUTES}")
    parser.add_argument("--steps", type=int, help="ends the stage earlier, at so many steps in all")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--out", type=Path, help="the pipeline folder; default harness/embedded/emoji_FAMILY")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="compile the step (faster, needs a C++ compiler)")
    options = parser.parse_args()
    names = [stage for stage in MINUTES if stage.startswith(options.family)]
    asked = f"{options.family}_{options.stage}"
    if options.stage and asked not in names:
        parser.error(f"--stage: {options.family} has {', '.join(name.partition('_')[2] for name in names)}")
    import torch

    from harness.embedded.siblings.stages import FOLDER, export, train_stage

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(options.threads or torch.get_num_threads())
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    everything = not (options.stage or options.export)
    for name in names if everything else filter(None, [options.stage and asked]):
        train_stage(name, options.checkpoints, options.minutes or MINUTES[name], options.steps, compiled=options.compile)
    if options.export or everything:
        export(options.family, options.checkpoints, options.out or FOLDER / f"emoji_{options.family}")


if __name__ == "__main__":
    main()
