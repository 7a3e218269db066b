"""`python -m harness.run SWEEP.yaml`: run what is missing of a sweep, then report."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.api import ConfigError, require
from harness.execution import driver
from harness.execution.driver import INTERRUPTED, REFUSED
from harness.storage.durable import unwritable
from harness.sweep.shape_only import Shapes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.run", description="Run what is missing of a sweep, then report.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show trials and cost, run nothing")
    parser.add_argument("--local", action="store_true", help="one job after another in this process, without Ray")
    parser.add_argument("--workers", type=int, metavar="N", help="score jobs at once on a machine")
    parser.add_argument("--retake", action="store_true", help="take timings again that other work disturbed")
    parser.add_argument("--shape-only", action="store_true",
                        help="on random weights of the same sizes: latency, memory and FLOPs without a download")
    parser.add_argument("--resolution", type=int, metavar="PX", help="with --shape-only: pixels of a side")
    parser.add_argument("--steps", type=int, metavar="N", help="with --shape-only: sampling steps")
    parser.add_argument("--blocks", type=int, metavar="N", help="with --shape-only: the first N blocks, where all do not fit")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    args = parser.parse_args(arguments)
    sizes = {name: getattr(args, name) for name in ("resolution", "steps", "blocks")}
    for name, value in sizes.items():
        if value is not None and (not args.shape_only or value < 1):
            parser.error(f"--{name}: {value} is no size" if args.shape_only else f"--{name} goes with --shape-only")
    options = driver.Options(results=args.results, local=args.local, workers=args.workers, retake=args.retake,
                             shapes=Shapes(**sizes) if args.shape_only else None)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file or a pipe has no width that lines must fit
    try:
        wrong = unwritable(args.results)
        require(not wrong, f"--results {args.results}: {wrong}; name a folder that you may write to")
        require(args.workers is None or args.workers >= 1, f"--workers must be at least 1, got {args.workers}")
        if args.dry_run:
            return driver.dry_run(args.sweep, options, console)
        for number in (signal.SIGINT, signal.SIGTERM):  # both stop cleanly, also where a shell started us with SIGINT ignored
            signal.signal(number, signal.default_int_handler)
        return driver.run_sweep(args.sweep, options, console)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. Finished jobs are kept; run the same command again to continue.\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
