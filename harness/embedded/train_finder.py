"""Train the finder of subjects on scenes, resumable: `python -m harness.embedded.train_finder [--steps N] [--threads N]`.

Scenes of the training split are drawn as they are needed, blurred and noised at random, for sampled pictures are not as sharp as
real ones. --export measures the network on scenes of the reference split, which show pairs of subjects that it has not seen
together, and writes finder.safetensors and finder.json.
"""

import argparse
import logging
from pathlib import Path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="in all, also after a resume")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--export", action="store_true", help="measure and write the files of the package")
    options = parser.parse_args()
    import torch

    from harness.embedded.finder_training import FinderTraining, export

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    training = FinderTraining(options.checkpoints / "finder.pt", options.steps)
    training.run()
    if options.export:
        logging.info("%s", export(training))


if __name__ == "__main__":
    main()
